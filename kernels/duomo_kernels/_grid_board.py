"""Owns the boards on which all programs of a kernel show each other their histograms. Knows no kernel.

A board is [P, C] bytes, program p writes row p. A byte is a count below 128 and, on top, a tag that flips from launch to launch: it is its
own message that it has come. So there is no fence, no counter and no second trip: who finds all bytes with the launch's tag has all counts.
Every launch on a board has the same P and C and writes all of it, so that all rows have the same tag between launches; nothing is reset.

A program waits only for the others of its grid, so it cannot deadlock if they all become resident. They do, because
(1) the launcher starts at most one program a multiprocessor, and programs so small that at least two whole grids fit beside each other
    (its plan says how many): that many such launches may run at once on a device, on whatever streams. More could each hold a part;
(2) whatever else holds a multiprocessor leaves it without waiting for us: earlier kernels and other streams' run to their ends, and the
    next kernel's programs are not scheduled by dependent launch before every program of this grid has run start_next() or left.

A launch owns its board until it ends. Eager launches of one stream and shape follow each other and share one; every captured launch gets
its own for good, because a graph may be replayed on any stream, beside any other. A graph never runs beside itself.
"""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass, field

import torch
from torch import Tensor

SLAB_BYTES = 64 << 20  # boards of a process: 2,048 captured launches of the largest, 32 KiB, and many more of small batches


@dataclass(kw_only=True, slots=True)
class Boards:
    """A device's boards, zeroed once. They are never given back: they are what a graph keeps."""

    slab: Tensor
    used: int = 0
    eager: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, programs: int, columns: int) -> Tensor:
        """The board of a launch that is about to be made on the current stream."""
        if self.slab.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return self._new(programs, columns)
        stream = torch.cuda.current_stream(self.slab.device).cuda_stream if self.slab.device.type == "cuda" else 0
        with self.lock:
            found = self.eager.get((stream, programs, columns))
        if found is None:
            found = self._new(programs, columns)
            with self.lock:
                found = self.eager.setdefault((stream, programs, columns), found)
        return found

    def _new(self, programs: int, columns: int) -> Tensor:
        with self.lock:
            first, end = self.used, self.used + programs * columns
            if end <= self.slab.numel():
                self.used = end
                return self.slab[first:end]
        # A graph zeroes a board of its own in each replay then: right, but one more node.
        return torch.zeros(programs * columns, dtype=torch.uint8, device=self.slab.device)


@functools.cache
def board(device: torch.device) -> Boards:
    """Made by the first eager launch, which a capture needs anyway (Triton loads its kernel then)."""
    if device.type != "cuda":
        return Boards(slab=torch.zeros(1 << 20, dtype=torch.uint8, device=device))
    assert not torch.cuda.is_current_stream_capturing(), "launch once before capturing: the boards are zeroed outside of graphs"
    slab = torch.zeros(SLAB_BYTES, dtype=torch.uint8, device=device)
    torch.cuda.synchronize(device)  # once in a process: other streams may use it right away
    return Boards(slab=slab)
