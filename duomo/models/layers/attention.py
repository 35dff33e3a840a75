"""Owns one attention layer: projections, head norms, rope, the write of new KV, attention, output. Knows no sequences, only rows.

Legend: T rows (one token each), D model, H heads, N kv heads, P = H + 2N projected heads, C head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from duomo_kernels.norm_rope import RmsWeight, rms_norm, rope
from duomo_kernels.paged_attention import ChunkRows, DecodeRows, KvShape, paged_attention
from duomo_kernels.row_gemm import RowGemm


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows that attend in one call: a run [lo, hi) of the step's rows, or the rows listed in `index`."""

    lo: int
    hi: int
    index: Tensor | None
    rows: DecodeRows | ChunkRows


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What every layer of one step shares. cos and sin [T, 1, C]; write [T * 2N] pool rows (of C) of the new keys and values."""

    cos_T1C: Tensor
    sin_T1C: Tensor
    write: Tensor
    groups: tuple[RowGroup, ...]


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """qkv [D, P * C]; qk_norm [H + N, C], the query rows already times 1 / sqrt(C); out [H * C, D]."""

    qkv_DP: Tensor
    qk_norm_HC: RmsWeight
    out_HD: Tensor


def attention_layer(gemm: RowGemm, x_TD: Tensor, weights: AttentionWeights, pool: Tensor, plan: AttentionPlan, shape: KvShape) -> Tensor:
    """Normed input [T, D] -> output [T, D], before the residual. Writes the rows' KV into pool [blocks, 2, N, block tokens, C]."""
    num_rows, num_h, num_n, dim = x_TD.shape[0], shape.num_heads, shape.num_kv_heads, shape.head_dim
    qkv_TPC = gemm.mm(x_TD, weights.qkv_DP).view(num_rows, -1, dim)
    qk_TPC = rope(rms_norm(qkv_TPC[:, : num_h + num_n], weights.qk_norm_HC), plan.cos_T1C, plan.sin_T1C)
    qkv_TPC[:, num_h : num_h + num_n] = qk_TPC[:, num_h:]
    pool.view(-1, dim).index_copy_(0, plan.write, qkv_TPC[:, num_h:].reshape(-1, dim))
    return gemm.mm(_attend(gemm, qk_TPC[:, :num_h], pool, plan.groups, shape), weights.out_HD)


def _attend(gemm: RowGemm, q_THC: Tensor, pool: Tensor, groups: tuple[RowGroup, ...], shape: KvShape) -> Tensor:
    if len(groups) == 1:
        return paged_attention(gemm, q_THC, pool, groups[0].rows, shape)
    out_TH = q_THC.new_empty(q_THC.shape[0], shape.num_heads * shape.head_dim)
    for group in groups:
        if group.index is None:
            out_TH[group.lo : group.hi] = paged_attention(gemm, q_THC[group.lo : group.hi], pool, group.rows, shape)
        else:
            out_TH.index_copy_(0, group.index, paged_attention(gemm, q_THC.index_select(0, group.index), pool, group.rows, shape))
    return out_TH


def write_index(block_ids_T: Tensor, offsets_T: Tensor, num_kv_heads: int, block_tokens: int) -> Tensor:
    """Pool rows (of head dim) of each token's keys then values: block and offset [T] -> [T * 2N]."""
    side_head = torch.arange(2 * num_kv_heads)
    return ((block_ids_T[:, None] * (2 * num_kv_heads) + side_head) * block_tokens + offsets_T[:, None]).flatten()
