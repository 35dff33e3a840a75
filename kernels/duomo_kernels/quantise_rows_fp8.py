"""Owns the quantisation of activations to fp8 e4m3, once a token, one scale for 128 successive columns. Knows no weights and no routing.

    group g of row t:  m = max |x[t, 128 g : 128 g + 128]|,  scale[t, g] = max(m, TINY) / 448,  q[t, c] = e4m3(x[t, c] / scale[t, g])

448 is e4m3's largest number, so nothing saturates; TINY gives a group of zeros a scale that is neither 0 nor subnormal. The last group may
be shorter than 128. The format of DeepSeek-V3 (arXiv 2412.19437, 3.3.2), whose weights carry a scale for each 128 x 128 block beside it.

Legend: T tokens, D columns, G = ceil(D / 128) groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from duomo_kernels._launch import check, is_interpreted, pdl_options, start_next, wait_for_previous

GROUP = 128
E4M3_MAX = 448.0
TINY = 2.0**-100
GROUPS_A_PROGRAM = 16  # 2,048 columns, 16 elements a thread of four warps: two 16-byte loads, and one program a token of the usual D


def num_groups(columns: int) -> int:
    """Scales of a row of so many columns."""
    return -(-columns // GROUP)


def quantise_rows_fp8_reference(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """The formula, group by group: (float8_e4m3fn [T, D], float32 [T, G])."""
    num_tokens, columns = x_TD.shape
    q_TD = torch.empty(x_TD.shape, dtype=torch.float8_e4m3fn, device=x_TD.device)
    scale_TG = torch.empty(num_tokens, num_groups(columns), dtype=torch.float32, device=x_TD.device)
    for group in range(num_groups(columns)):
        part = slice(group * GROUP, (group + 1) * GROUP)
        x_TC = x_TD[:, part].double()
        scale_TG[:, group] = (x_TC.abs().amax(dim=1).clamp_min(TINY) / E4M3_MAX).float()
        q_TD[:, part] = (x_TC / scale_TG[:, group, None].double()).clamp(-E4M3_MAX, E4M3_MAX).float().to(torch.float8_e4m3fn)
    return q_TD, scale_TG


def dequantise_rows(q_TD: Tensor, scale_TG: Tensor) -> Tensor:
    """float64 [T, D] of the numbers that (q, scale) stand for."""
    return q_TD.double() * scale_TG.double().repeat_interleave(GROUP, 1)[:, : q_TD.shape[1]]


@triton.jit
def to_e4m3(x, IS_INTERPRETED: tl.constexpr):
    """float32 to e4m3, to nearest even. Triton's interpreter loses the carry when the significand rounds up to a power of two, so there
    numbers are rounded beforehand to what e4m3 holds: 3 bits of significand, or multiples of 2^-9 below its smallest normal, 2^-6."""
    if IS_INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        subnormal = (tl.abs(x) + 24576.0) - 24576.0  # 1.5 * 2^14: its last place is worth 2^-9
        subnormal = (subnormal.to(tl.int32, bitcast=True) | (bits & -0x80000000)).to(tl.float32, bitcast=True)  # -0 stays
        x = tl.where(tl.abs(x) < 0.015625, subnormal, normal)
    return x.to(tl.float8e4nv)


@triton.jit
def _quantise(x_ptr, q_ptr, scale_ptr, D: tl.constexpr, BG: tl.constexpr, IS_INTERPRETED: tl.constexpr, USE_PDL: tl.constexpr):
    """One program: BG groups of one token."""
    token = tl.program_id(0).to(tl.int64)
    g_B = tl.program_id(1) * BG + tl.arange(0, BG)
    c_BC = g_B[:, None] * 128 + tl.arange(0, 128)[None, :]
    wait_for_previous(USE_PDL)
    x_BC = tl.load(x_ptr + token * D + c_BC, mask=c_BC < D, other=0.0).to(tl.float32)
    start_next(USE_PDL)
    top_B = tl.maximum(tl.max(tl.abs(x_BC), axis=1), 2.0**-100)
    q_BC = to_e4m3(x_BC * (448.0 / top_B)[:, None], IS_INTERPRETED)
    tl.store(q_ptr + token * D + c_BC, q_BC, mask=c_BC < D)
    tl.store(scale_ptr + token * tl.cdiv(D, 128) + g_B, top_B * (1.0 / 448.0), mask=g_B < tl.cdiv(D, 128))


def quantise_rows_fp8(x_TD: Tensor, *, q_TD: Tensor | None = None, scale_TG: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantise x [T, D] (bf16, fp16 or float32): (q_TD float8_e4m3fn, scale_TG float32 [T, ceil(D / 128)]). Writes into what is given."""
    num_tokens, columns = x_TD.shape
    device = x_TD.device
    check("x_TD", x_TD, x_TD.dtype, None, None)
    assert x_TD.dtype in (torch.bfloat16, torch.float16, torch.float32), x_TD.dtype
    groups = num_groups(columns)
    q_TD = torch.empty(x_TD.shape, dtype=torch.float8_e4m3fn, device=device) if q_TD is None else q_TD
    scale_TG = torch.empty(num_tokens, groups, dtype=torch.float32, device=device) if scale_TG is None else scale_TG
    check("q_TD", q_TD, torch.float8_e4m3fn, num_tokens, columns, device=device)
    check("scale_TG", scale_TG, torch.float32, num_tokens, groups, device=device)
    if num_tokens and columns:
        block = min(GROUPS_A_PROGRAM, triton.next_power_of_2(groups))
        grid = (num_tokens, triton.cdiv(groups, block))
        _quantise[grid](x_TD, q_TD, scale_TG, D=columns, BG=block, IS_INTERPRETED=is_interpreted(), num_warps=4, **pdl_options(device))
    return q_TD, scale_TG
