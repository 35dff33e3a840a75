"""Owns QK norm, rope and the write of K and V into the paged pool, one launch on the GPU. Knows no projection and no attention.

    qkv[t] = H heads of q, N of k, N of v, each Dh wide
    norm     per head          x / sqrt(mean over the head of x^2 + eps) * weight[Dh]                (Qwen3)
             whole             x / sqrt(mean over all heads of x^2 + eps) * weight[heads * Dh]       (OLMoE; q and k each for itself)
             none              x                                                                     (Mixtral)
    rope     y[d] = x[d] cos - x[d + Dh/2] sin,  y[d + Dh/2] = x[d + Dh/2] cos + x[d] sin            (Su et al. 2021; halves as Hugging
             Face stores them), cos and sin of the token's position, tables as norm_rope.rope_tables makes them; v is left as it is
    q -> q_THD[t];  k, v -> pool[slot // block_tokens, 0 or 1, head, slot % block_tokens];  k -> k_out[t] too, where asked for

The norm is told by the weights' size. Everything is float32 from load to store, rounded once. slot < 0 marks a padded row: no key and no
value is written for it in the pool and its position does not matter; its q (and k_out) is written, turned by position 0. A head's result
does not depend on what stands beside it. Bytes: 4 T (H + 2N) Dh in bf16, each element read once and written once, 4 T Dh of tables, and
2 T N Dh of k_out.

Legend: T tokens, H query heads, N kv heads, Dh (here D) head dim, B blocks, S block tokens, P positions, C = (H + 2N) * Dh columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from duomo_kernels._launch import check, pdl_options, start_next, wait_for_previous

# 2,048 elements by 4 warps: two 16-byte loads a thread in flight, and no fewer elements than threads.
_TILE = 2048
MAX_WHOLE = 8192  # elements over which one program takes a norm: 64 heads of 128; twice as many would not stay in registers


@dataclass(frozen=True, kw_only=True, slots=True)
class QkNorm:
    """Weights [Dh] for a norm per head, [H * Dh] and [N * Dh] for one over the whole projection."""

    q_weight: Tensor
    k_weight: Tensor
    eps: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeTables:
    """cos [P, Dh] and sin [P, Dh] in float32, as rope_tables makes them: equal halves of cos, the first half of sin negated."""

    cos_PD: Tensor
    sin_PD: Tensor


def qk_rope_write_reference(
    qkv_TC: Tensor, num_heads: int, pool_B2NSD: Tensor, slot_T: Tensor, position_T: Tensor, tables: RopeTables, norm: QkNorm | None
) -> tuple[Tensor, Tensor]:
    """Token by token in float64 -> (q [T, H, Dh], pool with k and v written)."""
    num_kv_heads, block_tokens, dim = pool_B2NSD.shape[2:]
    half = dim // 2
    wide = qkv_TC.double().unflatten(1, (-1, dim))
    q_THD, k_TND, v_TND = wide.split((num_heads, num_kv_heads, num_kv_heads), 1)
    position_T = torch.where(slot_T < 0, 0, position_T)
    cos_T1D, sin_T1D = (table[position_T.long()].double().unsqueeze(1) for table in (tables.cos_PD, tables.sin_PD))

    def normed(x_THD: Tensor, weight: Tensor) -> Tensor:
        row = x_THD if weight.numel() == dim else x_THD.flatten(1)
        scaled = row / torch.sqrt(row.square().mean(-1, keepdim=True) + (norm.eps if norm else 0.0)) * weight.double()
        return scaled.reshape(x_THD.shape)

    def turned(x_THD: Tensor) -> Tensor:
        low, high = x_THD[..., :half], x_THD[..., half:]
        cos, sin = cos_T1D[..., :half], sin_T1D[..., half:]
        return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)

    if norm:
        q_THD, k_TND = normed(q_THD, norm.q_weight), normed(k_TND, norm.k_weight)
    q_THD, k_TND = turned(q_THD), turned(k_TND)
    pool = pool_B2NSD.double()
    for token, slot in enumerate(slot_T.tolist()):
        if slot >= 0:
            pool[slot // block_tokens, 0, :, slot % block_tokens] = k_TND[token]
            pool[slot // block_tokens, 1, :, slot % block_tokens] = v_TND[token]
    return q_THD, pool


@triton.jit
def _heads_of(WHOLE: tl.constexpr, H: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, num_tokens):
    """(token, head of qkv, is there) of this program's rows: a run of heads across tokens, or all of one token's q, k or v."""
    row = tl.arange(0, ROWS)[:, None]
    if WHOLE:
        part = tl.program_id(0) % 3
        token = tl.program_id(0) // 3 + row * 0
        head = row + tl.where(part == 0, 0, H + (part - 1) * N)
        is_row = row < tl.where(part == 0, H, N)
    else:
        index = tl.program_id(0) * ROWS + row
        token, head = index // (H + 2 * N), index % (H + 2 * N)
        is_row = token < num_tokens
    return token, head, is_row


@triton.jit(do_not_specialize=["num_tokens"])  # one binary for every T: the same bits, and nothing to compile later
def _qk_rope_write(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    slot_ptr,
    q_ptr,
    pool_ptr,
    k_out_ptr,
    num_tokens,
    eps,
    H: tl.constexpr,
    N: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    NORM: tl.constexpr,
    HAS_K_OUT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    HALF: tl.constexpr = D // 2
    WHOLE: tl.constexpr = NORM == "whole"
    token, head, is_row = _heads_of(WHOLE, H, N, ROWS, num_tokens)
    col = tl.arange(0, BLOCK_HALF)[None, :]
    is_here = is_row & (col < HALF)
    is_q = is_here & (head < H)
    is_v = head >= H + N
    is_turned = is_here & (head < H + N)
    if NORM != "none":  # constant: read while the kernel before still runs
        weight_ptrs = tl.where(head < H, q_weight_ptr, k_weight_ptr) + col
        if WHOLE:
            weight_ptrs += tl.where(head < H, head, head - H) * D
        low_weight = tl.load(weight_ptrs, mask=is_turned, other=0.0).to(tl.float32)
        high_weight = tl.load(weight_ptrs + HALF, mask=is_turned, other=0.0).to(tl.float32)
    wait_for_previous(USE_PDL)
    slot = tl.load(slot_ptr + token, mask=is_row, other=-1)
    position = tl.load(position_ptr + token, mask=is_row, other=0)
    position = tl.where(slot < 0, 0, position).to(tl.int64)  # a padded row's may be anything
    at = (token.to(tl.int64) * (H + 2 * N) + head) * D + col
    low = tl.load(qkv_ptr + at, mask=is_here, other=0.0).to(tl.float32)
    high = tl.load(qkv_ptr + at + HALF, mask=is_here, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + position * D + col, mask=is_turned, other=1.0)
    sin = tl.load(sin_ptr + position * D + HALF + col, mask=is_turned, other=0.0)
    start_next(USE_PDL)
    if NORM == "none":
        low_normed, high_normed = low, high
    else:
        square = tl.sum(low * low + high * high, axis=1, keep_dims=True)
        count = D + tl.zeros_like(head)
        if WHOLE:
            square = tl.sum(square, axis=0, keep_dims=True)
            count = tl.where(head < H, H * D, N * D)
        scale = tl.rsqrt(square / count + eps)
        low_normed, high_normed = low * scale * low_weight, high * scale * high_weight
    new_low = tl.where(is_v, low, low_normed * cos - high_normed * sin)
    new_high = tl.where(is_v, high, high_normed * cos + low_normed * sin)
    q_at = (token.to(tl.int64) * H + head) * D + col
    tl.store(q_ptr + q_at, new_low.to(q_ptr.dtype.element_ty), mask=is_q)
    tl.store(q_ptr + q_at + HALF, new_high.to(q_ptr.dtype.element_ty), mask=is_q)
    if HAS_K_OUT:
        k_at = (token.to(tl.int64) * N + head - H) * D + col
        is_k = is_turned & (head >= H)
        tl.store(k_out_ptr + k_at, new_low.to(k_out_ptr.dtype.element_ty), mask=is_k)
        tl.store(k_out_ptr + k_at + HALF, new_high.to(k_out_ptr.dtype.element_ty), mask=is_k)
    kv = head - H  # 0 .. N-1 keys, N .. 2N-1 values: the order of a block's planes
    pool_at = ((slot // S) * (2 * N) + kv) * (S * D) + (slot % S) * D + col
    is_kept = is_here & (kv >= 0) & (slot >= 0)
    tl.store(pool_ptr + pool_at, new_low.to(pool_ptr.dtype.element_ty), mask=is_kept)
    tl.store(pool_ptr + pool_at + HALF, new_high.to(pool_ptr.dtype.element_ty), mask=is_kept)


def qk_rope_write(
    qkv_TC: Tensor,
    num_heads: int,
    pool_B2NSD: Tensor,
    slot_T: Tensor,
    position_T: Tensor,
    tables: RopeTables,
    norm: QkNorm | None = None,
    *,
    out_THD: Tensor | None = None,
    k_out_TND: Tensor | None = None,
) -> Tensor:
    """q [T, H, Dh]; k and v go into the pool [B, 2, N, S, Dh] of one layer, k also into k_out_TND if given. bf16 (float16, float32 too).

    slot_T int64 (block * S + offset; all slots >= 0 differ), position_T int32, 0 <= position < P where slot >= 0. Not scaled for attention.
    """
    num_blocks, _, num_kv_heads, block_tokens, dim = pool_B2NSD.shape
    num_tokens = qkv_TC.shape[0]
    device, dtype = qkv_TC.device, qkv_TC.dtype
    heads = num_heads + 2 * num_kv_heads
    assert dim % 2 == 0 and num_tokens * heads < 2**31, (dim, num_tokens)
    check("qkv_TC", qkv_TC, dtype, num_tokens, heads * dim)
    check("pool_B2NSD", pool_B2NSD, dtype, num_blocks, 2, num_kv_heads, block_tokens, dim, device=device)
    check("slot_T", slot_T, torch.int64, num_tokens, device=device)
    check("position_T", position_T, torch.int32, num_tokens, device=device)
    check("cos_PD", tables.cos_PD, torch.float32, None, dim, device=device)
    check("sin_PD", tables.sin_PD, torch.float32, tables.cos_PD.shape[0], dim, device=device)
    kind = _kind(norm, num_heads, num_kv_heads, dim, device)
    out_THD = torch.empty(num_tokens, num_heads, dim, dtype=dtype, device=device) if out_THD is None else out_THD
    check("out_THD", out_THD, dtype, num_tokens, num_heads, dim, device=device)
    if k_out_TND is not None:
        check("k_out_TND", k_out_TND, dtype, num_tokens, num_kv_heads, dim, device=device)
    if num_tokens == 0:
        return out_THD
    block_half = triton.next_power_of_2(dim // 2)
    rows = max(1, _TILE // (2 * block_half))  # by the head's width alone: a head's bits must not change with the batch
    if kind == "whole":
        rows = max(rows, triton.next_power_of_2(max(num_heads, num_kv_heads)))
    grid = num_tokens * 3 if kind == "whole" else triton.cdiv(num_tokens * heads, rows)
    _qk_rope_write[(grid,)](
        qkv_TC, norm.q_weight if norm else qkv_TC, norm.k_weight if norm else qkv_TC, tables.cos_PD, tables.sin_PD, position_T, slot_T,
        out_THD, pool_B2NSD, out_THD if k_out_TND is None else k_out_TND, num_tokens, norm.eps if norm else 0.0,
        H=num_heads, N=num_kv_heads, S=block_tokens, D=dim, NORM=kind, HAS_K_OUT=k_out_TND is not None, ROWS=rows, BLOCK_HALF=block_half,
        num_warps=max(4, min(16, rows * 2 * block_half // 512)), **pdl_options(device),
    )  # fmt: skip
    return out_THD


def _kind(norm: QkNorm | None, num_heads: int, num_kv_heads: int, dim: int, device: torch.device) -> Literal["none", "head", "whole"]:
    if norm is None:
        return "none"
    is_per_head = norm.q_weight.numel() == dim and norm.k_weight.numel() == dim
    q_size, k_size = (dim, dim) if is_per_head else (num_heads * dim, num_kv_heads * dim)
    check("q_weight", norm.q_weight, norm.q_weight.dtype, q_size, device=device)
    check("k_weight", norm.k_weight, norm.q_weight.dtype, k_size, device=device)
    assert is_per_head or num_heads * dim <= MAX_WHOLE, q_size
    return "head" if is_per_head else "whole"
