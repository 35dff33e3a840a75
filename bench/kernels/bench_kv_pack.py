"""Gather and scatter of KV blocks against one contiguous copy of the same bytes, the floor."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.stopwatch import Measured, refuse_unless, report, side_by_side
from duomo_kernels.kv_pack import kv_pack, kv_pack_reference, kv_unpack


def measure(repeats: int) -> list[Measured]:
    blocks = torch.randn(2048, 4096)
    results = []
    for num_blocks in (8, 94, 512):
        ids = torch.randperm(2048)[:num_blocks]
        results += _sides(f"{num_blocks} blocks of 16 KiB", blocks, ids, repeats)
        halves = blocks.view(4096, 2048)[:, 512:1024]  # the second of four heads: 2 KiB of each k and of each v
        results += _sides(f"a quarter of {num_blocks} blocks", halves, (2 * ids[:, None] + torch.arange(2)).flatten(), repeats)
    return results


def _sides(name: str, pool: Tensor, ids: Tensor, repeats: int) -> list[Measured]:
    num_words = ids.numel() * pool.shape[1]
    out, expected, source = torch.empty(num_words), torch.empty(num_words), torch.randn(num_words)
    kv_pack(pool, ids, out)
    kv_pack_reference(pool, ids.tolist(), expected)
    refuse_unless(torch.equal(out, expected), "kv_pack")
    copy = lambda: out.copy_(source)  # noqa: E731 - a case, not a function
    pack = lambda: kv_pack(pool, ids, out)  # noqa: E731 - a case, not a function
    unpack = lambda: kv_unpack(pool, ids, out)  # noqa: E731 - a case, not a function
    return [side_by_side(f"{side} {name}", call, "copy_", copy, repeats=repeats) for side, call in (("pack", pack), ("unpack", unpack))]


if __name__ == "__main__":
    report("kv_pack", measure)
