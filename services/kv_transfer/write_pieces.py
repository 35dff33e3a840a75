"""Decides into how many descriptors a write is cut, so that several threads of NIXL's copy it together. PURE; knows no agent.

Through CMA a write is a copy by the processor, in the kernel: one thread of it reaches half of memcpy's rate, two three quarters
(bench/results/handoff_cpu_threads.json). Nothing else is cut: the device does the work there, and each descriptor costs.

NIXL gives a write of at least PIECES_A_THREAD descriptors (split_batch_size) to its threads, as many to each. A thread looks for the end of
its share without a pause. Of a copy by the processor that is all of its time anyway; of a write by TCP to a peer that has stopped it would
be for as long as that stands still. By CMA too where it stops before the thread has connected to it: the write is given up at its deadline,
and the thread looks on until the peer goes on or dies.
"""

from __future__ import annotations

from collections.abc import Sequence

from services.kv_transfer import ucx_routes

PIECES_A_THREAD = 2  # NIXL takes no less for more than one
MIN_SPLIT_BYTES = 16 * 1024 * 1024
_PAGE = 4096


def has_threads(num_threads: int, slot_bytes: int) -> bool:
    """Whether any message is long enough for several threads."""
    return num_threads > 1 and slot_bytes >= MIN_SPLIT_BYTES


def pieces_of(num_bytes: int, num_threads: int, lanes: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """(offset, length) of each descriptor, in order. lanes: by which UCX writes to this peer, such as cma/memory; () where nobody knows."""
    if num_threads < 2 or num_bytes < MIN_SPLIT_BYTES or not ucx_routes.is_met("cma", lanes):
        return ((0, num_bytes),)
    num_pieces = PIECES_A_THREAD * num_threads
    cut = num_bytes // num_pieces // _PAGE * _PAGE
    starts = [place * cut for place in range(num_pieces)]
    return tuple((start, end - start) for start, end in zip(starts, [*starts[1:], num_bytes], strict=True))
