"""Calls that keep the interpreter: what the driver is told, and on a card that nobody else runs meanwhile."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch

from duomo.engine.gpu_graphs import GpuGraphs
from duomo.engine.gpu_held_calls import HeldCalls
from duomo.engine.gpu_host_ring import HostRing

FUNCTIONS = ("cuGraphLaunch", "cuMemcpyAsync", "cuEventRecord", "cuEventQuery")


class Function:
    """Of a library as ctypes opens it: it is told the types of its arguments first."""

    def __init__(self, answer: Callable[..., int]) -> None:
        self.argtypes: list[Any] = []
        self._answer = answer

    def __call__(self, *arguments: int) -> int:
        assert len(arguments) == len(self.argtypes)
        return self._answer(*arguments)


class Driver:
    """Answers every function with `code` and keeps what it was asked."""

    def __init__(self, code: int) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self._code = code
        for name in FUNCTIONS:
            setattr(self, name, Function(partial(self._answer, name)))

    def _answer(self, name: str, *arguments: int) -> int:
        self.asked.append((name, *arguments))
        return self._code

    def cuGetErrorName(self, code: int, out: Any) -> int:
        out._obj.value = b"CUDA_ERROR_ILLEGAL_ADDRESS" if code == 700 else None
        return 0


def test_the_driver_is_told_handles_addresses_and_sizes() -> None:
    driver = Driver(code=0)
    calls = HeldCalls(driver)
    calls.replay(1, 2)
    calls.copy(3, 4, 5, 6)
    calls.mark(7, 8)
    assert calls.is_over(9)
    assert driver.asked == [("cuGraphLaunch", 1, 2), ("cuMemcpyAsync", 3, 4, 5, 6), ("cuEventRecord", 7, 8), ("cuEventQuery", 9)]


@pytest.mark.parametrize(("code", "text"), [(700, "CUDA_ERROR_ILLEGAL_ADDRESS"), (12345, "CUDA error 12345")])
def test_what_the_driver_refuses_is_raised_by_its_name(code: int, text: str) -> None:
    calls = HeldCalls(Driver(code))
    asked: list[tuple[str, Callable[[], object]]] = [
        ("cuGraphLaunch", lambda: calls.replay(1, 2)),
        ("cuMemcpyAsync", lambda: calls.copy(3, 4, 5, 6)),
        ("cuEventRecord", lambda: calls.mark(7, 8)),
        ("cuEventQuery", lambda: calls.is_over(9)),
    ]
    for name, call in asked:
        with pytest.raises(RuntimeError, match=f"{name} failed: {text}"):
            call()


def test_what_is_not_over_yet_is_no_error() -> None:
    assert not HeldCalls(Driver(code=600)).is_over(9)


def test_addresses_are_as_wide_as_pointers() -> None:
    """A library of C truncates an argument without a type to an int."""
    driver = Driver(code=0)
    HeldCalls(driver)
    for name in FUNCTIONS:
        assert all(ctypes.sizeof(kind) == ctypes.sizeof(ctypes.c_void_p) for kind in getattr(driver, name).argtypes)


@contextmanager
def a_thread_that_counts() -> Iterator[list[int]]:
    """How often another thread had the interpreter: it gives it back at once, and has it only when it is given away."""
    count, is_over = [0], threading.Event()

    def main() -> None:
        while not is_over.is_set():
            count[0] += 1
            time.sleep(0)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(10.0)
    thread = threading.Thread(target=main)
    thread.start()
    try:
        yield count
    finally:
        is_over.set()
        thread.join()
        sys.setswitchinterval(interval)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the driver's calls need a card")
def test_copies_and_replays_are_right_and_keep_the_interpreter() -> None:
    device = torch.device("cuda", 0)
    graphs = GpuGraphs(device)
    words, doubled = (torch.zeros(64, dtype=torch.int32, device=device) for _ in range(2))

    def double() -> None:
        doubled.copy_(words * 2)

    with graphs.capturing():
        double()
        graphs.capture("double", double)
    up, down = HostRing(64, device), HostRing(64, device)
    landed, given_away = [], 0
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch ships no types for it
    with torch.cuda.stream(stream), a_thread_that_counts() as count:
        for turn in range(200):
            given, got = up.take(), down.take()
            given.array[:] = range(turn, turn + 64)
            before = count[0]
            given.upload(words)
            graphs.run("double", double)
            got.download(doubled[:32])
            got.download(doubled[32:], at=32)
            got.mark()
            given_away += count[0] != before
            got.wait()
            landed.append(got.array.tolist())
            time.sleep(0)
        assert count[0] > 1, "the other thread had no turn at all: nothing was shown"
    assert given_away == 0
    assert landed == [[2 * word for word in range(turn, turn + 64)] for turn in range(200)]
