"""Attention over blocks against torch's scaled_dot_product_attention over contiguous keys and values."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from bench.stopwatch import Measured, refuse_unless, report, side_by_side
from duomo_kernels.paged_attention import (
    ChunkRows,
    DecodeRows,
    KvShape,
    gather_index,
    length_mask,
    paged_attention,
    paged_attention_reference,
)
from duomo_kernels.row_gemm import row_gemm_for

SHAPE = KvShape(4, 2, 64, 16)


def decode_case(sequences: int, length: int, repeats: int) -> Measured:
    gemm, width = row_gemm_for((), 64), -(-length // 16)
    pool = torch.randn(sequences * width, 2, 2, 16, 64)
    tables = torch.randperm(sequences * width).view(sequences, width)
    rows = DecodeRows(gather_index(tables, 2), length_mask([length] * sequences, width * 16), sequences)
    q = torch.randn(sequences, 4, 64)
    expected = paged_attention_reference(q[:1], pool, tables[0].tolist(), length - 1, 1.0)
    refuse_unless(torch.allclose(paged_attention(gemm, q, pool, rows, SHAPE)[0], expected.flatten(), atol=1e-3), "paged_attention")
    k, v = torch.randn(2, sequences, 2, length, 64)
    peer = lambda: scaled_dot_product_attention(q.unsqueeze(2), k, v, scale=1.0, enable_gqa=True)  # noqa: E731 - a case, not a function
    case = f"decode {sequences} x {length} keys"
    return side_by_side(case, lambda: paged_attention(gemm, q, pool, rows, SHAPE), "sdpa", peer, repeats=repeats)


def prefill_case(length: int, repeats: int) -> Measured:
    gemm, width = row_gemm_for((), 64), -(-length // 16)
    pool, table = torch.randn(width, 2, 2, 16, 64), torch.randperm(width)
    rows, q = ChunkRows(gather_index(table[None], 2), 0, length), torch.randn(length, 4, 64)
    expected = paged_attention_reference(q[:5], pool, table.tolist(), 0, 1.0)
    refuse_unless(torch.allclose(paged_attention(gemm, q, pool, rows, SHAPE)[:5], expected.flatten(1), atol=1e-3), "paged_attention")
    k, v = torch.randn(2, 1, 2, length, 64)
    heads = q.transpose(0, 1).unsqueeze(0)
    peer = lambda: scaled_dot_product_attention(heads, k, v, scale=1.0, is_causal=True, enable_gqa=True)  # noqa: E731 - a case, not a function
    return side_by_side(f"prefill {length}", lambda: paged_attention(gemm, q, pool, rows, SHAPE), "sdpa", peer, repeats=repeats)


def measure(repeats: int) -> list[Measured]:
    return [*(decode_case(sequences, 160, repeats) for sequences in (1, 4, 16)), *(prefill_case(length, repeats) for length in (128, 1500))]


if __name__ == "__main__":
    report("paged_attention", measure)
