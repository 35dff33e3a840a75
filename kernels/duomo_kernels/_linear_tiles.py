"""Owns the dense product by tiles on the tensor cores, and fp8 weights made wide. Knows no plan.

A program computes block_m rows of x times block_n rows of the weights, whole K: nothing is split, so nothing is summed afterwards.

Weights in e4m3 are widened in registers, exactly, and the partial sum over 128 columns is multiplied by their block's scale. Swapped, the
product is w @ x.T: the tensor core's 64 rows (16 in the smaller instruction) are filled by weights, and widened weights may stay in
registers there.

Legend: T rows of x, N weight rows (outputs), K summed; M rows of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from duomo_kernels._launch import pdl_options, start_next, wait_for_previous
from duomo_kernels._linear_blocks import row_block, store_sums, weight_block
from duomo_kernels._tile_walk import TMA_BYTES
from duomo_kernels._weights import SCALE_BLOCK

BAND = tl.constexpr(16)


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearTile:
    """The tile of a dense product; powers of two. block_k: columns a step; for fp8 weights a multiple of 128.

    is_swapped: computed as w @ x.T. Where rows do not start at multiples of 16 bytes, TMA cannot address them: plain loads take its place.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 3
    use_tma: bool = False
    is_swapped: bool = False

    def __post_init__(self) -> None:
        assert self.block_n <= SCALE_BLOCK, f"{self}: a tile's weights lie in one row of scale blocks"


@triton.jit
def _place(pid, num_tiles, num_columns):
    """Which tile of rows and which of columns: columns outer, so that weights cross HBM once; of many rows, BAND tiles at a time."""
    first_tile = pid // (num_columns * BAND) * BAND
    band_tiles = tl.minimum(num_tiles - first_tile, BAND)
    local = pid - first_tile * num_columns
    return first_tile + local % band_tiles, local // band_tiles


@triton.jit
def _product(x_MK, w_NK, sum_, IS_SWAPPED: tl.constexpr):
    """sum_ + x @ w.T, [M, N], or its transpose. float32 operands are not cut short."""
    if IS_SWAPPED:
        return tl.dot(w_NK, x_MK.T, sum_, input_precision="ieee")
    else:
        return tl.dot(x_MK, w_NK.T, sum_, input_precision="ieee")


@triton.jit(do_not_specialize=["num_rows"])
def _tiles_kernel(
    x, w, w_desc, scale, out, num_rows, num_n, num_k,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, EVEN_K: tl.constexpr,
    SCALE: tl.constexpr, IS_SWAPPED: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row, column = _place(pid, tl.cdiv(num_rows, BM), tl.cdiv(num_n, BN))
    row_M, column = row * BM + tl.arange(0, BM), column * BN
    wait_for_previous(USE_PDL)
    start_next(USE_PDL)
    is_row_M = row_M < num_rows
    x_M = x + row_M.to(tl.int64) * num_k
    if IS_SWAPPED:
        sum_ = tl.zeros((BN, BM), tl.float32)
    else:
        sum_ = tl.zeros((BM, BN), tl.float32)
    if SCALE > 0:
        scale += column // SCALE * tl.cdiv(num_k, SCALE)
        for k0 in tl.range(0, num_k, BK, num_stages=STAGES):
            for part in tl.static_range(BK // SCALE):
                at = k0 + part * SCALE
                x_MK = row_block(x_M, is_row_M, at, num_k, SCALE, EVEN_K)
                w_NK = weight_block(w, w_desc, column, at, num_n, num_k, BN, SCALE, EVEN_K)
                w_NK = w_NK.to(tl.float32).to(x.dtype.element_ty)  # straight to bf16 is an instruction of a quarter of the rate
                block_scale = tl.load(scale + at // SCALE) if EVEN_K else tl.load(scale + at // SCALE, mask=at < num_k, other=0.0)
                sum_ += _product(x_MK, w_NK, tl.zeros_like(sum_), IS_SWAPPED) * block_scale
    else:
        for k0 in tl.range(0, num_k, BK, num_stages=STAGES):
            x_MK = row_block(x_M, is_row_M, k0, num_k, BK, EVEN_K)
            w_NK = weight_block(w, w_desc, column, k0, num_n, num_k, BN, BK, EVEN_K)
            sum_ = _product(x_MK, w_NK, sum_, IS_SWAPPED)
    col_N = column + tl.arange(0, BN)
    store_sums(out, sum_, row_M, num_rows, col_N, num_n, IS_SWAPPED)


@triton.jit
def _widen_kernel(w, scale, wide, num_n, num_k, BN: tl.constexpr, BK: tl.constexpr, SCALE: tl.constexpr):
    """A block of weights times its scale. Weights are constant: there is nothing to wait for but who reads `wide`."""
    row_N = tl.program_id(0) * BN + tl.arange(0, BN)
    k_K = tl.program_id(1) * BK + tl.arange(0, BK)
    at_NK = row_N.to(tl.int64)[:, None] * num_k + k_K[None, :]
    is_here_NK = (row_N < num_n)[:, None] & (k_K < num_k)[None, :]
    factor = tl.load(scale + tl.program_id(0) * BN // SCALE * tl.cdiv(num_k, SCALE) + tl.program_id(1) * BK // SCALE)
    wide_NK = tl.load(w + at_NK, mask=is_here_NK, other=0.0).to(tl.float32) * factor
    tl.store(wide + at_NK, wide_NK.to(wide.dtype.element_ty), mask=is_here_NK)


def linear_tiles(x_TK: Tensor, weight_NK: Tensor, scale_nk: Tensor | None, out_TN: Tensor, tile: LinearTile) -> None:
    """Checked by linear()."""
    (num_rows, num_k), num_n, device = x_TK.shape, weight_NK.shape[0], x_TK.device
    scale = 0 if scale_nk is None else SCALE_BLOCK
    assert not scale or tile.block_k % scale == 0, f"{tile}: fp8 steps are whole scale blocks"
    num_tiles, num_columns = triton.cdiv(num_rows, tile.block_m), triton.cdiv(num_n, tile.block_n)
    _tiles_kernel[(num_tiles * num_columns,)](
        x_TK, weight_NK, _descriptor(weight_NK, tile, scale), weight_NK if scale_nk is None else scale_nk, out_TN,
        num_rows, num_n, num_k,
        BM=tile.block_m, BN=tile.block_n, BK=tile.block_k, STAGES=tile.num_stages, EVEN_K=num_k % tile.block_k == 0,
        SCALE=scale, IS_SWAPPED=tile.is_swapped,
        num_warps=tile.num_warps, **pdl_options(device),
    )  # fmt: skip


def widen(weight_NK: Tensor, scale_nk: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, K] in `dtype`, rounded once."""
    num_n, num_k = weight_NK.shape
    wide_NK = torch.empty(num_n, num_k, dtype=dtype, device=weight_NK.device)
    _widen_kernel[(triton.cdiv(num_n, 32), triton.cdiv(num_k, SCALE_BLOCK))](
        weight_NK, scale_nk, wide_NK, num_n, num_k, BN=32, BK=SCALE_BLOCK, SCALE=SCALE_BLOCK, num_warps=4
    )
    return wide_NK


def _descriptor(weight_NK: Tensor, tile: LinearTile, scale: int) -> TensorDescriptor | None:
    is_addressable = weight_NK.stride(0) * weight_NK.element_size() % TMA_BYTES == 0
    return TensorDescriptor.from_tensor(weight_NK, [tile.block_n, scale or tile.block_k]) if tile.use_tma and is_addressable else None
