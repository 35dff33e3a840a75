"""Owns pinned memory through which the host and one GPU hand each other a step's numbers. Knows nothing of what they mean.

Buffers are used in turn. One comes back to its user when the copy queued on it last is over, which is long past unless more steps are under
way than there are buffers. Without a GPU (tests in Triton's interpreter) copies are over when they return.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from duomo.engine.gpu_held_calls import HeldCalls, held_calls

DEPTH = 3  # a step that runs, one that waits for it, one that is planned


_WORD_BYTES = 4


class HostBuffer:
    """int32 words on the host; `array` is the same memory for numpy. turn counts how often it was handed out."""

    def __init__(self, num_words: int, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self.words = torch.zeros(num_words, dtype=torch.int32, pin_memory=is_cuda)
        self.array: NDArray[np.int32] = self.words.numpy()
        self.turn = 0
        self._link = _Link(self.words, device) if is_cuda else None

    def upload(self, target: Tensor) -> None:
        """Queue the copy of the first words into `target`, contiguous int32, on the current stream."""
        if self._link is None:
            target.copy_(self.words[: target.numel()])
        else:
            self._link.upload(target)
        self.mark()

    def download(self, source: Tensor, at: int = 0) -> None:
        """Queue the copy of `source`, contiguous int32, to word `at`, on the current stream. mark() after the last."""
        if self._link is None:
            self.words[at : at + source.numel()].copy_(source)
        else:
            self._link.download(source, at)

    def mark(self) -> None:
        """What was queued up to here is what wait() waits for."""
        if self._link is not None:
            self._link.mark()

    def is_over(self) -> bool:
        """Whether all that was marked is."""
        return self._link is None or self._link.is_over()

    def wait(self) -> None:
        """Return when all that was marked is over."""
        if self._link is not None:
            self._link.wait()


class _Link:
    """The way between page-locked words and one GPU: the stream that is current at each call."""

    def __init__(self, words: Tensor, device: torch.device) -> None:
        self._calls: HeldCalls = held_calls()
        self._device = device
        self._address, self._num_words = words.data_ptr(), words.numel()
        # waiting for a blocking event gives the core away
        self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # torch ships no types for it
        self._event.record(torch.cuda.current_stream(device))  # torch makes an event when it is recorded first
        self._event_handle: int = self._event.cuda_event

    def upload(self, target: Tensor) -> None:
        assert target.is_contiguous() and target.dtype == torch.int32 and target.numel() <= self._num_words, (target.shape, target.dtype)
        self._calls.copy(target.data_ptr(), self._address, _WORD_BYTES * target.numel(), self._stream)

    def download(self, source: Tensor, at: int) -> None:
        assert source.is_contiguous() and source.dtype == torch.int32 and at + source.numel() <= self._num_words, (source.shape, at)
        self._calls.copy(self._address + _WORD_BYTES * at, source.data_ptr(), _WORD_BYTES * source.numel(), self._stream)

    def mark(self) -> None:
        self._calls.mark(self._event_handle, self._stream)

    def is_over(self) -> bool:
        return self._calls.is_over(self._event_handle)

    def wait(self) -> None:
        if not self.is_over():
            self._event.synchronize()

    @property
    def _stream(self) -> int:
        return int(torch.cuda.current_stream(self._device).cuda_stream)


class HostRing:
    """DEPTH buffers in turn."""

    def __init__(self, num_words: int, device: torch.device) -> None:
        self._buffers = [HostBuffer(num_words, device) for _ in range(DEPTH)]
        self._next = 0

    def take(self) -> HostBuffer:
        """The next one in turn, when its last copy is over."""
        buffer = self._buffers[self._next]
        self._next = (self._next + 1) % DEPTH
        buffer.wait()
        buffer.turn += 1
        return buffer
