"""Gather and scatter of KV blocks against one contiguous copy of the same bytes, the floor."""

from __future__ import annotations

import torch

from bench.stopwatch import Measured, refuse_unless, report, side_by_side
from duomo_kernels.kv_pack import kv_pack, kv_pack_reference, kv_unpack


def measure(repeats: int) -> list[Measured]:
    pool = torch.randn(2048, 4096)
    results = []
    for num_blocks in (8, 94, 512):
        ids = torch.randperm(2048)[:num_blocks]
        out, expected = torch.empty(num_blocks * 4096), torch.empty(num_blocks * 4096)
        kv_pack(pool, ids, out)
        kv_pack_reference(pool, ids.tolist(), expected)
        refuse_unless(torch.equal(out, expected), "kv_pack")
        source = torch.randn(num_blocks * 4096)
        copy = lambda out=out, source=source: out.copy_(source)  # noqa: E731 - a case, not a function
        pack = lambda i=ids, out=out: kv_pack(pool, i, out)  # noqa: E731 - a case, not a function
        unpack = lambda i=ids, out=out: kv_unpack(pool, i, out)  # noqa: E731 - a case, not a function
        results.append(side_by_side(f"pack {num_blocks} blocks of 16 KiB", pack, "copy_", copy, repeats=repeats))
        results.append(side_by_side(f"unpack {num_blocks} blocks of 16 KiB", unpack, "copy_", copy, repeats=repeats))
    return results


if __name__ == "__main__":
    report("kv_pack", measure)
