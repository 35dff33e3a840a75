"""Owns the dense product of few rows without tensor cores: weights in registers before their turn. Knows no plan.

A program owns a few rows of the weights, whole, and asks for all of them before it waits for the kernel before it: the product itself is
then one trip for x, a multiplication and a sum over the program's threads. Every row of x meets the same order of summation.

Legend: T rows of x, N weight rows (outputs), K summed; B weight rows of a program, W columns (K, up to a power of two).
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from duomo_kernels._launch import pdl_options, start_next, wait_for_previous
from duomo_kernels._weights import SCALE_BLOCK

MAX_DIRECT_COLUMNS = 16384


@dataclass(frozen=True, kw_only=True, slots=True)
class DirectTile:
    """block_n weight rows, a power of two up to 128, times block_m rows of x a program. block_n * K weights must fit the registers."""

    block_n: int
    num_warps: int = 4
    block_m: int = 4

    def __post_init__(self) -> None:
        assert 1 <= self.block_n <= SCALE_BLOCK and self.block_n & (self.block_n - 1) == 0, self


@triton.jit(do_not_specialize=["num_rows"])
def _direct_kernel(
    x_ptr, w_ptr, scale_ptr, out_ptr, num_rows, num_n, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, W: tl.constexpr,
    EVEN: tl.constexpr, SCALE: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    first, token = tl.program_id(0) * BN, tl.program_id(1) * BM
    row_B, col_W = first + tl.arange(0, BN), tl.arange(0, W)
    at_BW = w_ptr + row_B.to(tl.int64)[:, None] * K + col_W[None, :]
    if EVEN:
        w_BW = tl.load(at_BW, eviction_policy="evict_first")
    else:
        w_BW = tl.load(at_BW, mask=(row_B < num_n)[:, None] & (col_W < K)[None, :], other=0.0, eviction_policy="evict_first")
    if SCALE > 0:  # a program's rows lie in one block
        scale_W = tl.load(scale_ptr + first // SCALE * tl.cdiv(K, SCALE) + col_W // SCALE, mask=col_W < K, other=0.0)
    wait_for_previous(USE_PDL)
    start_next(USE_PDL)
    rows = ()
    for t in tl.static_range(BM):
        is_here_W = (col_W < K) & (token + t + 0 * col_W < num_rows)  # tensors: a number among masks is none to an interpreter
        x_ptrs = x_ptr + (token + t).to(tl.int64) * K + col_W
        rows = rows + (tl.load(x_ptrs, mask=is_here_W, other=0.0),)  # type: ignore[assignment]  # a growing tuple
    for t in tl.static_range(BM):
        x_W = rows[t].to(tl.float32)  # type: ignore[var-annotated]  # a growing tuple
        if SCALE > 0:
            x_W = x_W * scale_W
        y_B = tl.sum(w_BW.to(tl.float32) * x_W[None, :], axis=1)
        y_ptrs = out_ptr + (token + t).to(tl.int64) * num_n + row_B
        tl.store(y_ptrs, y_B.to(out_ptr.dtype.element_ty), mask=(row_B < num_n) & (token + t + 0 * row_B < num_rows))


def linear_direct(x_TK: Tensor, weight_NK: Tensor, scale_nk: Tensor | None, out_TN: Tensor, tile: DirectTile) -> None:
    """Checked by linear(). At most MAX_DIRECT_COLUMNS columns."""
    (num_rows, num_k), num_n = x_TK.shape, weight_NK.shape[0]
    assert num_k <= MAX_DIRECT_COLUMNS, num_k
    width, block_m = triton.next_power_of_2(num_k), min(tile.block_m, num_rows)
    _direct_kernel[(triton.cdiv(num_n, tile.block_n), triton.cdiv(num_rows, block_m))](
        x_TK, weight_NK, weight_NK if scale_nk is None else scale_nk, out_TN, num_rows, num_n, K=num_k, BM=block_m, BN=tile.block_n,
        W=width, EVEN=width == num_k and num_n % tile.block_n == 0, SCALE=0 if scale_nk is None else SCALE_BLOCK,
        num_warps=tile.num_warps, **pdl_options(x_TK.device),
    )  # fmt: skip
