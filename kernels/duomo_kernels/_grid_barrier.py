"""Owns the one barrier among all programs of a kernel, and the counters it counts on. Knows no kernel.

Program 0 adds 2^31 - (P - 1), each other program 1: when all P have arrived, whatever P is, the counter has grown by 2^31, its low 31 bits
are what they were and its top bit has flipped. So nothing is reset between launches or replays of a graph, and launches of any size can
share it, one after the other.

A program waits only for the others of its grid, so it cannot deadlock if they all become resident. They do, because
(1) the launcher starts at most one program a multiprocessor, and programs so small that at least two whole grids fit beside each other
    (its plan says how many): that many such launches may run at once on a device, on whatever streams. More could each hold a part;
(2) whatever else holds a multiprocessor leaves it without waiting for us: earlier kernels and other streams' run to their ends, and the
    next kernel's programs are not scheduled by dependent launch before every program of this grid has run start_next() or left.

Counters: a launch owns its counter until it ends. Eager launches of one stream follow each other and share one; every captured launch
gets its own for good, because a graph may be replayed on any stream, beside any other. A graph never runs beside itself.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor

SLOTS = 1 << 17  # captured launches of a process: 48 layers of 2,700 graphs; 2 MiB
STRIDE = 4  # int32 words: 16 bytes, an alignment by which Triton compiles one kernel for all slots


@triton.jit
def grid_barrier(counter_ptr):
    """Wait until every program of the grid is here; what any wrote before is then visible to all."""
    tl.debug_barrier()  # all threads' writes come before the release, which one thread does for them
    step = tl.where(tl.program_id(0) == 0, 2147483647 - (tl.num_programs(0) - 2), 1)
    start = tl.atomic_add(counter_ptr, step, sem="acq_rel", scope="gpu")
    now = start + step
    while (start ^ now) >= 0:
        now = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@dataclass(kw_only=True, slots=True)
class Counters:
    """A device's counters, zeroed once. Slots are never given back: they are what a graph keeps."""

    slab: Tensor
    next_slot: itertools.count[int] = field(default_factory=itertools.count)
    slot_of_stream: dict[int, int] = field(default_factory=dict)

    def take(self, device: torch.device) -> Tensor:
        """The counter of a launch that is about to be made on the current stream."""
        if torch.cuda.is_current_stream_capturing():
            slot = next(self.next_slot)
        else:
            stream = torch.cuda.current_stream(device).cuda_stream
            slot = self.slot_of_stream.get(stream, -1)
            if slot < 0:
                slot = self.slot_of_stream.setdefault(stream, next(self.next_slot))
        if slot >= SLOTS:  # then the graph zeroes a counter of its own in each replay: right, but one more node
            return torch.zeros(1, dtype=torch.int32, device=device)
        return self.slab[slot * STRIDE : slot * STRIDE + 1]


@functools.cache
def counters(device: torch.device) -> Counters:
    """Made by the first eager launch, which a capture needs anyway (Triton loads its kernel then)."""
    assert not torch.cuda.is_current_stream_capturing(), "launch once before capturing: the counters are zeroed outside of graphs"
    slab = torch.zeros(SLOTS * STRIDE, dtype=torch.int32, device=device)
    torch.cuda.synchronize(device)  # once in a process: other streams may use it right away
    return Counters(slab=slab)
