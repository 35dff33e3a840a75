"""Owns the weighted sum of the experts' rows back in token order, on the GPU. Knows no gate and no expert.

    y[t] = sum over k of weight[t, k] * rows[place[t * K + k]]     + lost[t] * x[t] where the capacity rule keeps what it dropped

in float32, in the gate's order of k, rounded once. place == R, the number of places, marks an assignment that was dropped or belongs to a
padded row: it adds nothing, whatever its weight; a row of such places alone is zero. Every element's sum is the same chain of multiply-adds
whatever the tile, so a token's bits do not depend on T. Bytes: 2 R D + 2 T D in bf16 (2 T D more with x), and 8 R of places and weights.

Legend: T tokens, K experts a token, R = T * K routed places, D model.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from duomo_kernels._launch import check, num_sms, pdl_options, start_next, wait_for_previous

# 8 elements a thread are one 16-byte load of each of K rows, all in flight at once: K = 8 rows take 32 registers.
_PER_THREAD = 8
_WIDEST = 1024


def expert_combine_reference(
    rows_RD: Tensor, place_R: Tensor, weights_TK: Tensor, lost_T: Tensor | None = None, x_TD: Tensor | None = None
) -> Tensor:
    """Token by token, in float64, not rounded."""
    num_tokens, top_k = weights_TK.shape
    out_TD = torch.zeros(num_tokens, rows_RD.shape[1], dtype=torch.float64, device=rows_RD.device)
    for routed, place in enumerate(place_R.tolist()):
        if place < num_tokens * top_k:
            token, rank = divmod(routed, top_k)
            out_TD[token] += weights_TK[token, rank].double() * rows_RD[place].double()
    return out_TD if lost_T is None or x_TD is None else out_TD + lost_T.double()[:, None] * x_TD.double()


@triton.jit(do_not_specialize=["num_routed"])  # one binary for every T: the same bits, and nothing to compile later
def _combine(
    rows_ptr,
    place_ptr,
    weights_ptr,
    lost_ptr,
    x_ptr,
    out_ptr,
    num_routed,
    D: tl.constexpr,
    K: tl.constexpr,
    HAS_LOST: tl.constexpr,
    BLOCK_D: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    PARTS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D  # of one token side by side, so that pieces of a row are read close in time
    token = (tl.program_id(0) // PARTS).to(tl.int64)
    col = (tl.program_id(0) % PARTS) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_here = col < D
    wait_for_previous(USE_PDL)
    sums = tl.zeros([BLOCK_D], tl.float32)
    for k in tl.static_range(K):
        place = tl.load(place_ptr + token * K + k)
        is_there = place < num_routed
        weight = tl.where(is_there, tl.load(weights_ptr + token * K + k), 0.0)
        row = tl.load(rows_ptr + place.to(tl.int64) * D + col, mask=col < tl.where(is_there, D, 0), other=0.0)
        sums = tl.fma(row.to(tl.float32), weight, sums)
    if HAS_LOST:
        x = tl.load(x_ptr + token * D + col, mask=is_here, other=0.0)
        sums = tl.fma(x.to(tl.float32), tl.load(lost_ptr + token), sums)
    start_next(USE_PDL)
    tl.store(out_ptr + token * D + col, sums.to(out_ptr.dtype.element_ty), mask=is_here)


def expert_combine(
    rows_RD: Tensor,
    place_R: Tensor,
    weights_TK: Tensor,
    *,
    lost_T: Tensor | None = None,
    x_TD: Tensor | None = None,
    out_TD: Tensor | None = None,
) -> Tensor:
    """y [T, D] in the rows' dtype. rows_RD [R, D] (bf16; float16 and float32 too), place_R int32 (Routing.place_R), weights_TK float32.

    lost_T float32 [T] and x_TD [T, D] come together: the weight of what capacity dropped, and the layer's input.
    """
    num_tokens, top_k = weights_TK.shape
    num_routed, width = rows_RD.shape
    device, dtype = rows_RD.device, rows_RD.dtype
    check("rows_RD", rows_RD, dtype, num_tokens * top_k, width)
    check("place_R", place_R, torch.int32, num_routed, device=device)
    check("weights_TK", weights_TK, torch.float32, num_tokens, top_k, device=device)
    assert (lost_T is None) == (x_TD is None), "lost_T and x_TD come together"
    if lost_T is not None and x_TD is not None:
        check("lost_T", lost_T, torch.float32, num_tokens, device=device)
        check("x_TD", x_TD, dtype, num_tokens, width, device=device)
    out_TD = torch.empty(num_tokens, width, dtype=dtype, device=device) if out_TD is None else out_TD
    check("out_TD", out_TD, dtype, num_tokens, width, device=device)
    if num_tokens == 0:
        return out_TD
    block_d = _block_d(num_tokens, width, num_sms(device))
    _combine[(num_tokens * triton.cdiv(width, block_d),)](
        rows_RD,
        place_R,
        weights_TK,
        weights_TK if lost_T is None else lost_T,
        rows_RD if x_TD is None else x_TD,
        out_TD,
        num_routed,
        D=width,
        K=top_k,
        HAS_LOST=lost_T is not None,
        BLOCK_D=block_d,
        num_warps=max(1, block_d // (32 * _PER_THREAD)),
        **pdl_options(device),
    )
    return out_TD


def _block_d(num_tokens: int, width: int, sms: int) -> int:
    """Columns of a program: one warp's 256 while few tokens leave multiprocessors idle, then as wide as a row needs, 1,024 at most."""
    block_d: int = min(_WIDEST, triton.next_power_of_2(width))
    while block_d > 32 * _PER_THREAD and num_tokens * triton.cdiv(width, block_d) < sms:
        block_d //= 2
    return block_d
