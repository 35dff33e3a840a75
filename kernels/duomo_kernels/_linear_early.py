"""Owns the dense product of few rows on the tensor cores with weights in registers before their turn. Knows no plan.

As _linear_direct.py, a program asks for its first pieces of weights, mostly all, before it waits for the kernel before. Of every piece
each warp multiplies its own columns, in a product of [warps, rows, columns / warps]: a few weight rows are enough for as many warps as it
takes to ask for them, and no operand is read twice. The warps' sums are added at the end, in one order.

Weights in e4m3 are widened in registers, exactly; a warp's sum over its columns, which lie in one block, is multiplied by its scale.

Legend: T rows of x, N weight rows (outputs), K summed; M rows of a tile; G warps.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from duomo_kernels._launch import pdl_options, start_next, wait_for_previous
from duomo_kernels._weights import SCALE_BLOCK


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlyTile:
    """Powers of two. block_k columns of block_n weight rows are a piece, `depth` pieces are on their way at a time, x_depth of x.

    A warp's part of a piece is at least 16 columns, for fp8 at most 128. depth * block_n * block_k weights must fit the registers.
    """

    block_m: int
    block_n: int
    block_k: int
    depth: int
    x_depth: int = 2
    num_warps: int = 8

    def __post_init__(self) -> None:
        assert self.block_n <= SCALE_BLOCK and self.block_k >= 16 * self.num_warps, self


@triton.jit
def _piece(ptr, row_B, is_row_B, k0, K: tl.constexpr, BK: tl.constexpr):
    """[B, BK] columns from k0 on of rows row_B; zeros where there is none."""
    k_K = k0 + tl.arange(0, BK)
    is_here_BK = is_row_B[:, None] if K % BK == 0 else is_row_B[:, None] & (k_K < K)[None, :]
    return tl.load(ptr + row_B.to(tl.int64)[:, None] * K + k_K[None, :], mask=is_here_BK, other=0.0)


@triton.jit
def _scales(scale, k0, K: tl.constexpr, BK: tl.constexpr, G: tl.constexpr, SCALE: tl.constexpr):
    """[G, 1, 1]: the scale of each warp's columns of a piece."""
    k_G = k0 + tl.arange(0, G) * (BK // G)
    return tl.load(scale + k_G // SCALE, mask=k_G < K, other=0.0)[:, None, None]


@triton.jit
def _by_warps(rows_BK, G: tl.constexpr):
    """[B, BK] as [G, B, BK / G]."""
    return rows_BK.reshape(rows_BK.shape[0], G, rows_BK.shape[1] // G).permute(1, 0, 2)


@triton.jit(do_not_specialize=["num_rows"])
def _early_kernel(
    x, w, scale, out, num_rows, num_n, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DEPTH: tl.constexpr,
    X_DEPTH: tl.constexpr, G: tl.constexpr, SCALE: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.cdiv(num_rows, BM)
    first = tl.program_id(0) // num_tiles * BN
    row_N, row_M = first + tl.arange(0, BN), tl.program_id(0) % num_tiles * BM + tl.arange(0, BM)
    is_row_N, is_row_M = row_N < num_n, row_M < num_rows
    NUM: tl.constexpr = (K + BK - 1) // BK
    if SCALE > 0:
        scale += first // SCALE * tl.cdiv(K, SCALE)
    weights, scales, rows = (), (), ()
    for u in tl.static_range(DEPTH if DEPTH < NUM else NUM):
        weights = weights + (_piece(w, row_N, is_row_N, u * BK, K, BK),)  # type: ignore[assignment]  # a growing tuple
        if SCALE > 0:
            scales = scales + (_scales(scale, u * BK, K, BK, G, SCALE),)  # type: ignore[assignment]  # a growing tuple
    wait_for_previous(USE_PDL)
    start_next(USE_PDL)
    for u in tl.static_range(X_DEPTH if X_DEPTH < NUM else NUM):
        rows = rows + (_piece(x, row_M, is_row_M, u * BK, K, BK),)  # type: ignore[assignment]  # a growing tuple
    sum_GMN = tl.zeros((G, BM, BN), tl.float32)
    for u in tl.static_range(NUM):
        x_GMK = _by_warps(rows[u], G)
        if SCALE > 0:
            w_GNK = _by_warps(weights[u].to(tl.float32).to(x.dtype.element_ty), G)
            sum_GMN += tl.dot(x_GMK, w_GNK.permute(0, 2, 1), input_precision="ieee") * scales[u]
        else:
            sum_GMN = tl.dot(x_GMK, _by_warps(weights[u], G).permute(0, 2, 1), sum_GMN, input_precision="ieee")
        if u + DEPTH < NUM:
            weights = weights + (_piece(w, row_N, is_row_N, (u + DEPTH) * BK, K, BK),)  # type: ignore[assignment]  # a growing tuple
            if SCALE > 0:
                scales = scales + (_scales(scale, (u + DEPTH) * BK, K, BK, G, SCALE),)  # type: ignore[assignment]  # a growing tuple
        if u + X_DEPTH < NUM:
            rows = rows + (_piece(x, row_M, is_row_M, (u + X_DEPTH) * BK, K, BK),)  # type: ignore[assignment]  # a growing tuple
    sum_MN = tl.sum(sum_GMN, axis=0)
    at_MN = out + row_M.to(tl.int64)[:, None] * num_n + row_N[None, :]
    tl.store(at_MN, sum_MN.to(out.dtype.element_ty), mask=is_row_M[:, None] & is_row_N[None, :])


def linear_early(x_TK: Tensor, weight_NK: Tensor, scale_nk: Tensor | None, out_TN: Tensor, tile: EarlyTile) -> None:
    """Checked by linear()."""
    (num_rows, num_k), num_n = x_TK.shape, weight_NK.shape[0]
    assert scale_nk is None or tile.block_k // tile.num_warps <= SCALE_BLOCK, f"{tile}: a warp's columns lie in one scale block"
    _early_kernel[(triton.cdiv(num_rows, tile.block_m) * triton.cdiv(num_n, tile.block_n),)](
        x_TK, weight_NK, weight_NK if scale_nk is None else scale_nk, out_TN, num_rows, num_n, K=num_k, BM=tile.block_m, BN=tile.block_n,
        BK=tile.block_k, DEPTH=tile.depth, X_DEPTH=tile.x_depth, G=tile.num_warps, SCALE=0 if scale_nk is None else SCALE_BLOCK,
        num_warps=tile.num_warps, num_stages=1, **pdl_options(x_TK.device),
    )  # fmt: skip
