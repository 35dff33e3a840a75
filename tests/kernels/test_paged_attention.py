"""Paged attention against its formula; decode, prefill, chunks and company give the same bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duomo_kernels.paged_attention import (
    ChunkRows,
    DecodeRows,
    KvShape,
    gather_index,
    length_mask,
    paged_attention,
    paged_attention_reference,
    prove_tail,
)
from duomo_kernels.row_gemm import RowGemm, row_gemm_for

SHAPES = [KvShape(4, 2, 64, 16), KvShape(3, 3, 24, 32)]
WAYS = [row_gemm_for((), 64), RowGemm(is_chain=False)]
BOTH = pytest.mark.parametrize("gemm", WAYS, ids=lambda gemm: gemm.name)
NUM_BLOCKS = 41


def pool_of(shape: KvShape) -> torch.Tensor:
    return torch.randn(NUM_BLOCKS, 2, shape.num_kv_heads, shape.block_tokens, shape.head_dim, generator=torch.Generator().manual_seed(3))


def chunk(gemm: RowGemm, q: torch.Tensor, table: list[int], start: int, shape: KvShape) -> torch.Tensor:
    used = table[: -(-(start + q.shape[0]) // shape.block_tokens)]
    return paged_attention(
        gemm, q, pool_of(shape), ChunkRows(gather_index(torch.tensor([used]), shape.num_kv_heads), start, q.shape[0]), shape
    )


def decode(gemm: RowGemm, q: torch.Tensor, tables: list[list[int]], lengths: list[int], shape: KvShape) -> torch.Tensor:
    width = max(-(-length // shape.block_tokens) for length in lengths)
    gather = gather_index(torch.tensor([table[:width] for table in tables]), shape.num_kv_heads)
    return paged_attention(
        gemm, q, pool_of(shape), DecodeRows(gather, length_mask(lengths, width * shape.block_tokens), len(lengths)), shape
    )


@BOTH
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("start", "rows"), [(0, 1), (0, 17), (5, 63), (250, 3)])
def test_close_to_the_reference(gemm: RowGemm, shape: KvShape, start: int, rows: int) -> None:
    q, table = torch.randn(rows, shape.num_heads, shape.head_dim), torch.randperm(NUM_BLOCKS).tolist()
    out = chunk(gemm, q, table, start, shape).view_as(q)
    expected = paged_attention_reference(q, pool_of(shape), table, start, 1.0)
    # scores err by head_dim ulp of |q||k| (up to some 30 here), which an exp passes on: 64 * 30 * 2^-24 of values of order one
    assert (out - expected).abs().max() <= 64 * 30 * 2.0**-24


@BOTH
@settings(max_examples=25, deadline=None)
@given(
    length=st.sampled_from([1, 15, 16, 17, 63, 257, 500]),
    others=st.lists(st.integers(1, 600), max_size=3),
    data=st.data(),
)
def test_the_last_row_is_the_same_by_prefill_chunk_and_decode(gemm: RowGemm, length: int, others: list[int], data: st.DataObject) -> None:
    shape = SHAPES[0]
    tables = [torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(seed)).tolist() for seed in range(len(others) + 1)]
    q = torch.randn(length, shape.num_heads, shape.head_dim, generator=torch.Generator().manual_seed(length))
    whole = chunk(gemm, q, tables[0], 0, shape)
    cut = data.draw(st.integers(0, length - 1))
    assert torch.equal(chunk(gemm, q[cut:], tables[0], cut, shape), whole[cut:])
    place = data.draw(st.integers(0, len(others)))
    queries = torch.randn(len(others) + 1, shape.num_heads, shape.head_dim)
    queries[place] = q[-1]
    lengths = [*others[:place], length, *others[place:]]
    tables.insert(place, tables.pop(0))
    assert torch.equal(decode(gemm, queries, tables, lengths, shape)[place], whole[-1])


def test_softmax_ignores_its_tail() -> None:
    assert prove_tail()
