"""Owns pinned memory through which the host and one GPU hand each other a step's numbers. Knows nothing of what they mean.

Buffers are used in turn. One comes back to its user when the copy queued on it last is over, which is long past unless more steps are under
way than there are buffers. Without a GPU (tests in Triton's interpreter) copies are over when they return.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DEPTH = 3  # a step that runs, one that waits for it, one that is planned


class HostBuffer:
    """int32 words on the host; `array` is the same memory for numpy. turn counts how often it was handed out."""

    def __init__(self, num_words: int, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self.words = torch.zeros(num_words, dtype=torch.int32, pin_memory=is_cuda)
        self.array: NDArray[np.int32] = self.words.numpy()
        self.turn = 0
        # waiting for a blocking event gives the core away
        self._event = torch.cuda.Event(blocking=True) if is_cuda else None  # type: ignore[no-untyped-call]  # torch ships no types for it

    def upload(self, target: Tensor) -> None:
        """Queue the copy of the first words into `target`, on the current stream."""
        target.copy_(self.words[: target.numel()], non_blocking=True)
        self.mark()

    def download(self, source: Tensor, at: int = 0) -> None:
        """Queue the copy of `source` to word `at`, on the current stream. mark() after the last."""
        self.words[at : at + source.numel()].copy_(source, non_blocking=True)

    def mark(self) -> None:
        """What was queued up to here is what wait() waits for."""
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Return when all that was marked is over."""
        if self._event is not None:
            self._event.synchronize()


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
