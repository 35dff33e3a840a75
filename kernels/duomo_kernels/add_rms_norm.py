"""Owns residual addition and RMS normalisation in one pass on the GPU. Knows no layer and no quantisation.

    residual[t] <- residual[t] + x[t]                 summed in float32, stored in residual's dtype, in place
    y[t] = s / sqrt(mean(s^2) + eps) * weight         s: that sum before it is rounded (Zhang and Sennrich 2019)

Without a residual s = x (a model's first norm). Every row is reduced over the same tree whatever T is and whatever stands beside it.
Bytes: 4 T D of the dtype with a residual (two read, two written), 2 T D without.

Legend: T tokens, D model.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from duomo_kernels._launch import check, pdl_options, start_next, wait_for_previous

MAX_WIDTH = 8192  # a row stays in the registers of one program
# 16 elements a thread are two 16-byte loads of x and two of the residual in flight, and few enough warps to meet at the barrier.
_PER_THREAD = 16
# The least tile: 4 warps with 16 elements each. With no fewer elements than threads no thread holds another's copy of an element, so
# none can read the residual again after it was overwritten.
_LEAST_TILE = 4 * 32 * _PER_THREAD


def add_rms_norm_reference(x_TD: Tensor, weight_D: Tensor, eps: float, residual_TD: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The formula in float64 -> (y, new residual), neither rounded."""
    sum_TD = x_TD.double() if residual_TD is None else x_TD.double() + residual_TD.double()
    return sum_TD / torch.sqrt(sum_TD.square().mean(-1, keepdim=True) + eps) * weight_D.double(), sum_TD


@triton.jit(do_not_specialize=["num_tokens"])  # one binary for every T: the same bits, and nothing to compile later
def _add_rms_norm(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    num_tokens,
    eps,
    D: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK_D)[None, :]
    is_here = (row < num_tokens) & (col < D)
    at = row.to(tl.int64) * D + col
    weight = tl.load(weight_ptr + col, mask=col < D, other=0.0).to(tl.float32)  # constant: read while the kernel before still runs
    wait_for_previous(USE_PDL)
    wide = tl.load(x_ptr + at, mask=is_here, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        wide += tl.load(residual_ptr + at, mask=is_here, other=0.0).to(tl.float32)
    start_next(USE_PDL)
    if HAS_RESIDUAL:
        tl.store(residual_ptr + at, wide.to(residual_ptr.dtype.element_ty), mask=is_here)
    mean = tl.sum(wide * wide, axis=1, keep_dims=True) / D
    y = wide * tl.rsqrt(mean + eps) * weight
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=is_here)


def add_rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float, residual_TD: Tensor | None = None, *, out_TD: Tensor | None = None) -> Tensor:
    """y [T, D] in x's dtype (bf16; float16 and float32 too); residual_TD is overwritten with the sum. out_TD may be x_TD itself."""
    num_tokens, width = x_TD.shape
    assert 1 <= width <= MAX_WIDTH, width
    check("x_TD", x_TD, x_TD.dtype, num_tokens, width)
    check("weight_D", weight_D, weight_D.dtype, width, device=x_TD.device)
    out_TD = torch.empty_like(x_TD) if out_TD is None else out_TD
    check("out_TD", out_TD, x_TD.dtype, num_tokens, width, device=x_TD.device)
    if residual_TD is not None:
        check("residual_TD", residual_TD, x_TD.dtype, num_tokens, width, device=x_TD.device)
        assert residual_TD.data_ptr() != out_TD.data_ptr() or not num_tokens, "out_TD is the residual"
    if num_tokens == 0:
        return out_TD
    block_d = triton.next_power_of_2(width)
    rows = max(1, _LEAST_TILE // block_d)  # by D alone, never by T: a row's reduction tree must not change with the batch
    _add_rms_norm[(triton.cdiv(num_tokens, rows),)](
        x_TD,
        x_TD if residual_TD is None else residual_TD,
        weight_D,
        out_TD,
        num_tokens,
        eps,
        D=width,
        HAS_RESIDUAL=residual_TD is not None,
        ROWS=rows,
        BLOCK_D=block_d,
        num_warps=rows * block_d // (32 * _PER_THREAD),
        **pdl_options(x_TD.device),
    )
    return out_TD
