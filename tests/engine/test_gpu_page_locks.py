"""Locked memory is copied without its caller waiting; CUDA's refusals are told, and leave nothing behind."""

from __future__ import annotations

import ctypes
import mmap

import pytest
import torch

from duomo.engine.gpu_page_locks import GpuPageLocks


class ScriptedCudart:
    """Answers as told, and remembers what it was asked."""

    def __init__(self, answer: int) -> None:
        self.answer = answer
        self.pending = 0
        self.asked: list[tuple[object, ...]] = []

    def cudaHostRegister(self, *what: int) -> int:  # CUDA's name
        self.asked.append(("register", *what))
        self.pending = self.answer
        return self.answer

    def cudaHostUnregister(self, *what: int) -> int:  # CUDA's name
        self.asked.append(("unregister", *what))
        return 0


def scripted(monkeypatch: pytest.MonkeyPatch, answer: int) -> ScriptedCudart:
    cudart = ScriptedCudart(answer)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: cudart.asked.append(("synchronize",)))

    def launch(*what: object, device: torch.device) -> None:
        """As torch does: what CUDA refused before is raised by the launch behind it, once."""
        cudart.asked.append(("launch",))
        pending, cudart.pending = cudart.pending, 0
        if pending:
            raise RuntimeError(f"CUDA error {pending}")

    monkeypatch.setattr(torch, "ones", launch)

    class Here:
        def __init__(self, device: torch.device) -> None:
            assert device.type == "cuda"

        def __enter__(self) -> None: ...

        def __exit__(self, *what: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "device", Here)
    return cudart


def test_what_was_locked_is_unlocked_once_and_after_the_devices_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    cudart, locks = scripted(monkeypatch, 0), GpuPageLocks(torch.device("cuda", 0))
    locks.lock(4096, 100)
    locks.unlock(8192)
    locks.unlock(4096)
    locks.unlock(4096)
    assert cudart.asked == [("register", 4096, 100, 1), ("synchronize",), ("unregister", 4096)]


def test_a_refusal_is_told_and_not_undone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    cudart, locks = scripted(monkeypatch, 2), GpuPageLocks(torch.device("cuda", 0))
    locks.lock(4096, 100)
    locks.unlock(4096)
    assert cudart.asked == [("register", 4096, 100, 1), ("launch",)] and "error 2" in caplog.text
    assert not cudart.pending, "the next launch of this thread would raise it"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="page locks are CUDA's")
def test_locked_memory_is_seen_as_such_and_copied_rightly() -> None:
    pages = mmap.mmap(-1, 1 << 20)
    words = torch.frombuffer(pages, dtype=torch.int64)
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    locks = GpuPageLocks(torch.device("cuda", 0))
    locks.lock(address, 1 << 20)
    assert words.is_pinned()
    there = torch.arange(words.numel(), device="cuda")
    words.copy_(there, non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(words, torch.arange(words.numel()))
    locks.unlock(address)
    assert not words.is_pinned()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="page locks are CUDA's")
def test_what_was_refused_is_not_raised_by_the_next_launch(caplog: pytest.LogCaptureFixture) -> None:
    pages = mmap.mmap(-1, 1 << 20)
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    locks = GpuPageLocks(torch.device("cuda", 0))
    locks.lock(address, 1 << 20)
    locks.lock(address, 1 << 20)
    assert "locks no page" in caplog.text, "what is locked already is refused"
    assert int(torch.full((4,), 3, device="cuda").sum()) == 12
    locks.unlock(address)
