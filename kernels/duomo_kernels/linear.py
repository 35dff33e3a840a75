"""Owns dense products on a GPU, and which way each takes. Knows no layer and no expert.

    y[t, n] = sum over k of x[t, k] * w[n, k]        x [T, K] bf16, w [N, K] bf16, or e4m3 with a float32 scale for a block of 128 x 128

Summed in float32, rounded once to the output's dtype: x's, or float32 (router and output head). A row of y depends on its row of x alone.

    a handful of rows    the time is that of reading the weights. They are constants, so every program asks for its own, into registers,
                         before it waits for the kernel before (_linear_direct.py)
    few rows             tiles on the tensor cores (_linear_tiles.py); of fp8 weights, their sums cut across programs (_linear_split.py)
    many rows            torch.mm: its library is at the limit there. fp8 weights are first widened into a scratch, once a call
    is_deterministic     tiles that all sum in the same steps: a row has the same bits alone and among any others

Touching the weights' lines early for the tiles, so that they wait in L2, was tried and cost more than it
gave: the loads, whose values nobody needs, still take registers, and those wait.

Bytes: N K (of 2 or 1) + T K 2 + T N (of 2 or 4). Legend: T tokens, N outputs, K inputs; n, k blocks of 128.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
import triton
from torch import Tensor

from duomo_kernels._launch import check, is_interpreted, num_sms
from duomo_kernels._linear_direct import MAX_DIRECT_COLUMNS, DirectTile, linear_direct
from duomo_kernels._linear_split import SplitTile, linear_split
from duomo_kernels._linear_tiles import LinearTile, linear_tiles, widen
from duomo_kernels._weights import SCALE_BLOCK

LinearPlan: TypeAlias = DirectTile | LinearTile | SplitTile | Literal["library"]

SLICE_K = 512  # columns that a program sums where sums are cut
MAX_SLICES = 16  # of a sum: one program adds them all
MAX_STREAMED_ROWS = 64  # beyond, the library's tiles are as fast
MAX_ROUTED_ROWS = 128  # beyond, a router's x is worth the tensor cores
NARROW = 256  # outputs of a router at most
COLUMNS_MULTIPLE = 8  # 16 bytes of bf16: rows that vector loads can read


def linear_reference(x_TK: Tensor, weight_NK: Tensor, scale_nk: Tensor | None = None) -> Tensor:
    """The formula in float64."""
    wide_NK = weight_NK.double()
    if scale_nk is not None:
        rows_Nk = scale_nk.double().repeat_interleave(SCALE_BLOCK, 0)[: weight_NK.shape[0]]
        wide_NK = wide_NK * rows_Nk.repeat_interleave(SCALE_BLOCK, 1)[:, : weight_NK.shape[1]]
    return x_TK.double() @ wide_NK.T


def linear_plan(num_rows: int, weight_NK: Tensor, *, is_deterministic: bool = False) -> LinearPlan:
    """By shape alone, never by what a tensor holds."""
    (num_n, num_k), is_fp8, sms = weight_NK.shape, weight_NK.dtype == torch.float8_e4m3fn, num_sms(weight_NK.device)
    if weight_NK.dtype == torch.float32:  # tests alone: no tensor core multiplies it whole
        return LinearTile(block_m=32, block_n=32, block_k=64, num_stages=2) if is_deterministic else "library"
    if is_deterministic:
        return deterministic_tile(num_rows if weight_NK.is_cuda else MAX_STREAMED_ROWS, is_fp8)
    if num_n <= NARROW and num_k <= MAX_DIRECT_COLUMNS and num_rows <= MAX_ROUTED_ROWS:
        return DirectTile(block_n=_few_rows(2 if num_rows <= 32 else 4))  # a router: the time of one trip, however many programs share it
    if num_rows > MAX_STREAMED_ROWS:
        return "library"
    if num_rows <= 2 and num_k <= MAX_DIRECT_COLUMNS:
        return DirectTile(block_n=_few_rows(4 if is_fp8 else 2))
    is_slim = num_n <= 32 * sms  # tiles of 32 columns would be fewer than multiprocessors
    if is_fp8 and num_k % SLICE_K == 0 and num_k <= MAX_SLICES * SLICE_K:
        return split_plan(num_rows, is_slim=is_slim)
    return streaming_plan(num_rows, num_k, is_slim=is_slim, is_fp8=is_fp8)


def _few_rows(block_n: int) -> int:
    """Triton's interpreter runs programs one after another: there a few of many rows."""
    return SCALE_BLOCK if is_interpreted() else block_n


def deterministic_tile(num_rows: int, is_fp8: bool) -> LinearTile:
    """All of these give the same bits on a GPU, as its tests hold: every element is summed in the same steps of 16 columns in ascending
    order, whatever the tile (and in blocks of 128 in fp8). Not so in Triton's interpreter, which multiplies by numpy: one tile there."""
    if is_fp8:
        block_m = 64 if num_rows <= 64 else 128
        return LinearTile(block_m=block_m, block_n=64, block_k=128, num_warps=block_m // 16, num_stages=4, is_swapped=True, use_tma=True)
    if num_rows <= 16:
        return LinearTile(block_m=16, block_n=32, block_k=256)
    if num_rows <= 64:
        return LinearTile(block_m=64, block_n=64, block_k=128, num_stages=4, use_tma=True)
    return LinearTile(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=4, use_tma=True)


def streaming_plan(num_rows: int, num_k: int, *, is_slim: bool, is_fp8: bool) -> LinearPlan:
    """As tall as the rows, so that weights are multiplied once; swapped, weights fill the tensor cores' rows. What was fastest on an H100
    after a norm, as in a decode step (bench/results/linear_ways_h100.json). The library splits long sums of slim weights; tiles do not."""
    if num_rows <= 16:
        return LinearTile(block_m=16, block_n=64, block_k=128 if is_fp8 else 256, num_stages=4, is_swapped=True)
    if num_rows <= 32:
        if is_slim and not is_fp8:
            return LinearTile(block_m=32, block_n=16, block_k=256, num_stages=4) if num_k <= 2048 else "library"
        return LinearTile(block_m=32, block_n=64, block_k=256 if is_fp8 else 128, num_stages=3 if is_fp8 else 4, is_swapped=True)
    if is_slim:
        return "library"
    return LinearTile(block_m=64, block_n=64, block_k=256 if is_fp8 else 128, num_stages=3, is_swapped=is_fp8, use_tma=not is_fp8)


def split_plan(num_rows: int, *, is_slim: bool) -> SplitTile:
    """Of fp8 weights. Slices of 512 columns were fastest at every size (bench/results/linear_ways_h100.json), with stages for all four of
    their blocks but where 64 rows leave no room; there slim weights are asked for ahead of the wait, with a stage more."""
    if num_rows <= 16:
        return SplitTile(block_m=16, block_n=64, slice_k=SLICE_K, num_stages=5, use_tma=True)
    if num_rows <= 32:
        return SplitTile(block_m=32, block_n=64, slice_k=SLICE_K, num_stages=4, use_tma=True)
    return SplitTile(block_m=64, block_n=64, slice_k=SLICE_K, num_stages=4 if is_slim else 3, use_tma=True, prefetches=is_slim)


def linear(
    x_TK: Tensor,
    weight_NK: Tensor,
    scale_nk: Tensor | None = None,
    *,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    is_deterministic: bool = False,
    plan: LinearPlan | None = None,
) -> Tensor:
    """y [T, N] in out's dtype: x's or float32. x bf16 (float16, and float32 in tests), K a multiple of 8.

    weight_NK of x's dtype, or float8_e4m3fn with scale_nk float32 [ceil(N / 128), ceil(K / 128)]. `out` is not x. Captured by CUDA graphs
    after one call of the same shapes. Weights are read before the kernel before has ended: they must be older than it.
    """
    (num_rows, num_k), num_n, device = x_TK.shape, weight_NK.shape[0], x_TK.device
    check("x_TK", x_TK, x_TK.dtype, num_rows, num_k)
    check("weight_NK", weight_NK, x_TK.dtype if scale_nk is None else torch.float8_e4m3fn, num_n, num_k, device=device)
    if scale_nk is not None:
        check("scale_nk", scale_nk, torch.float32, triton.cdiv(num_n, SCALE_BLOCK), triton.cdiv(num_k, SCALE_BLOCK), device=device)
    assert num_k % COLUMNS_MULTIPLE == 0 and num_k > 0 and num_n > 0, f"weights {num_n} x {num_k}: columns come in {COLUMNS_MULTIPLE}s"
    if out is None:
        out = torch.empty(num_rows, num_n, dtype=out_dtype or x_TK.dtype, device=device)
    assert out.dtype == out_dtype or out_dtype is None, f"out is {out.dtype}, out_dtype {out_dtype}"
    assert out.dtype in (x_TK.dtype, torch.float32), f"{out.dtype} from {x_TK.dtype}"
    check("out", out, out.dtype, num_rows, num_n, device=device)
    assert out.data_ptr() != x_TK.data_ptr() or not num_rows, "out is x: programs that end first would change what others still read"
    if num_rows == 0:
        return out
    plan = linear_plan(num_rows, weight_NK, is_deterministic=is_deterministic) if plan is None else plan
    if isinstance(plan, DirectTile):
        linear_direct(x_TK, weight_NK, scale_nk, out, plan)
    elif isinstance(plan, LinearTile):
        linear_tiles(x_TK, weight_NK, scale_nk, out, plan)
    elif isinstance(plan, SplitTile):
        linear_split(x_TK, weight_NK, scale_nk, out, plan)
    else:
        _by_library(x_TK, weight_NK if scale_nk is None else widen(weight_NK, scale_nk, x_TK.dtype), out)
    return out


def _by_library(x_TK: Tensor, weight_NK: Tensor, out: Tensor) -> None:
    if out.dtype == x_TK.dtype:
        torch.mm(x_TK, weight_NK.t(), out=out)
    elif x_TK.is_cuda:
        torch.mm(x_TK, weight_NK.t(), out_dtype=out.dtype, out=out)
    else:  # torch knows no wider output on a CPU
        torch.mm(x_TK.to(out.dtype), weight_NK.t().to(out.dtype), out=out)
