"""Owns what this GPU was seen to reach in the same run: copy and read bandwidth, a large product. Knows no operation of ours.

Floors count with fixed rates (bench/gpu_stopwatch.py); these say how far the card of this run was from them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.gpu_stopwatch import cold_graph_us

GIB = 1 << 30
SIDE = 8192  # of the square product: 1.1 TFLOP, long enough for the clocks to settle


@triton.jit  # type: ignore[untyped-decorator]  # Triton ships no types
def _sum_kernel(x, out, steps, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton reads the body itself
    at = x + tl.program_id(0).to(tl.int64) * steps * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for step in tl.range(0, steps, num_stages=4):
        total += tl.load(at + step * BLOCK)
    tl.store(out + tl.program_id(0), tl.sum(total, 0))


def read_all(x: Tensor, out: Tensor, programs: int) -> None:
    """Sums of `programs` equal runs of a float32 tensor: every byte read once, next to nothing written."""
    block = 4096
    assert x.numel() % (programs * block) == 0, "a run is a whole number of steps"
    _sum_kernel[(programs,)](x, out, x.numel() // programs // block, BLOCK=block, num_warps=8)


def ceilings(repeats: int = 50) -> dict[str, float]:
    """TB/s of a copy (read and write counted) and of a read, TFLOP/s of a bf16 product."""
    source = torch.empty(GIB // 4, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    partial = torch.empty(1024, dtype=torch.float32, device="cuda")
    copy_us = cold_graph_us([lambda: target.copy_(source)], repeats=repeats).median_us
    read_us = cold_graph_us([lambda: read_all(source, partial, 1024)], repeats=repeats).median_us
    a = torch.empty(SIDE, SIDE, dtype=torch.bfloat16, device="cuda").normal_()
    b = torch.empty(SIDE, SIDE, dtype=torch.bfloat16, device="cuda").normal_()
    out = torch.empty_like(a)
    product_us = cold_graph_us([lambda: torch.mm(a, b, out=out)], repeats=repeats).median_us
    return {
        "copy_tb_per_s": round(2 * GIB / copy_us / 1e6, 3),
        "read_tb_per_s": round(GIB / read_us / 1e6, 3),
        "bf16_tflop_per_s": round(2 * SIDE**3 / product_us / 1e6, 1),
    }
