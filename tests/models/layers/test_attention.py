"""One attention layer against a plain computation, and where its keys and values land."""

from __future__ import annotations

import torch

from duomo.models.layers.attention import AttentionPlan, AttentionWeights, RowGroup, attention_layer, write_index
from duomo_kernels.norm_rope import rms_norm_reference, rms_weight, rope_reference, rope_tables
from duomo_kernels.paged_attention import ChunkRows, KvShape, gather_index
from duomo_kernels.row_gemm import RowGemm

SHAPE = KvShape(4, 2, 32, 16)


def test_against_a_plain_computation() -> None:
    x, table, num_rows = torch.randn(37, 48), [5, 1, 3], 37
    qk_norm = torch.rand(6, 32)
    weights = AttentionWeights(torch.randn(48, 8 * 32) / 7, rms_weight(qk_norm, 1e-6), torch.randn(4 * 32, 48) / 11)
    cos, sin = rope_tables(num_rows, 32, 10000.0)
    positions = torch.arange(num_rows)
    plan = AttentionPlan(
        cos.unsqueeze(1),
        sin.unsqueeze(1),
        write_index(torch.tensor(table)[positions // 16], positions % 16, 2, 16),
        (RowGroup(0, num_rows, None, ChunkRows(gather_index(torch.tensor([table]), 2), 0, num_rows)),),
    )
    pool = torch.zeros(7, 2, 2, 16, 32)
    out = attention_layer(RowGemm(is_chain=False), x, weights, pool, plan, SHAPE)

    qkv = (x @ weights.qkv_DP).view(num_rows, 8, 32)
    qk = rope_reference(rms_norm_reference(qkv[:, :6], qk_norm, 1e-6), cos, sin)
    for position in (0, 15, 16, 36):
        landed = pool[table[position // 16], :, :, position % 16]
        assert torch.allclose(landed[0], qk[position, 4:], atol=1e-5) and torch.allclose(landed[1], qkv[position, 6:], atol=1e-5)
    assert not pool[[0, 2, 4, 6]].any() and not pool[3, :, :, 5:].any()
    keys, values = qk[:, 4:].repeat_interleave(2, 1), qkv[:, 6:].repeat_interleave(2, 1)
    scores = torch.einsum("thc,shc->hts", qk[:, :4], keys).masked_fill(torch.ones(37, 37, dtype=torch.bool).triu(1), -torch.inf)
    mixed = torch.einsum("hts,shc->thc", torch.softmax(scores, -1), values)
    assert torch.allclose(out, mixed.reshape(num_rows, -1) @ weights.out_HD, atol=1e-4)
