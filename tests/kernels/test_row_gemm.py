"""Row-exact products: equal to the chain, and equal bit for bit whatever shares the call."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duomo_kernels.row_gemm import CHUNK_K, TILE_ROWS, RowGemm, prove_chain, row_gemm_for, row_gemm_reference

WAYS = [row_gemm_for(((256, 512), (384, 48)), 64), RowGemm(is_chain=False)]
BOTH = pytest.mark.parametrize("gemm", WAYS, ids=lambda gemm: gemm.name)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@BOTH
@pytest.mark.parametrize(("num_k", "num_n"), [(1, 3), (64, 16), (257, 63), (600, 5)])
def test_close_to_the_reference(gemm: RowGemm, num_k: int, num_n: int) -> None:
    x, w = randn(17, num_k), randn(num_k, num_n, seed=1)
    # a sum of K products in any order errs by at most K ulp of the sum of magnitudes
    bound = num_k * 2.0**-24 * (x.abs() @ w.abs()) + 1e-30
    assert ((gemm.mm(x, w) - row_gemm_reference(x, w)).abs() <= bound).all()


def test_a_proven_chain_is_the_reference_bit_for_bit() -> None:
    if not prove_chain(256, 64):
        pytest.skip("torch's products are no chain on this machine: the tiles stand in")
    x, w = randn(17, 600), randn(600, 64, seed=1)
    assert torch.equal(RowGemm(is_chain=True).mm(x, w), row_gemm_reference(x, w))


@BOTH
@settings(max_examples=40, deadline=None)
@given(rows=st.sampled_from([1, 2, 3, 15, 16, 17, 63, 257]), start=st.integers(0, 40), num_k=st.sampled_from([64, 256, 384]))
def test_a_row_does_not_depend_on_its_neighbours(gemm: RowGemm, rows: int, start: int, num_k: int) -> None:
    x, w = randn(300, num_k), randn(num_k, 48, seed=1)
    assert torch.equal(gemm.mm(x[start : start + rows], w), gemm.mm(x, w)[start : start + rows])


@BOTH
def test_segments_are_the_products_of_their_rows(gemm: RowGemm) -> None:
    counts = [1, 0, 5, 16, 1, 33, 0, 1]
    weights = [randn(320, 24, seed=expert) for expert in range(len(counts))]
    x = torch.zeros(sum(counts) + TILE_ROWS, 320)
    x[: sum(counts)] = randn(sum(counts), 320, seed=9)
    out = torch.full((x.shape[0], 24), torch.nan)
    gemm.mm_segments(x, counts, weights, out)
    row = 0
    for count, weight in zip(counts, weights, strict=True):
        assert torch.equal(out[row : row + count], gemm.mm(x[row : row + count], weight) if count else out[:0])
        row += count


@BOTH
@settings(max_examples=30, deadline=None)
@given(rows=st.sampled_from([1, 2, 4, 7, 16, 33]), keys=st.sampled_from([16, 48, 272, 528]), tail=st.sampled_from([0, 16, 256]))
def test_attention_products_ignore_other_rows_and_a_zero_tail(gemm: RowGemm, rows: int, keys: int, tail: int) -> None:
    q, k, v = randn(3, 40, 64), randn(3, keys + tail, 64, seed=1), randn(3, keys + tail, 64, seed=2)
    whole = gemm.scores(q, k)
    part = gemm.scores(q[1:2, :rows], k[1:2, :keys])
    assert torch.equal(part, whole[1:2, :rows, :keys])
    weights = torch.zeros(3, 40, keys + tail)
    weights[..., :keys] = torch.softmax(whole[..., :keys], -1)
    assert torch.equal(gemm.mix(weights[1:2, :rows, :keys].contiguous(), v[1:2, :keys]), gemm.mix(weights, v)[1:2, :rows])


def test_a_broken_chain_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: real(a, b) + (1e-6 if a.shape[0] == 7 else 0.0))
    assert not prove_chain.__wrapped__(64, 16)


def test_chunks_are_whole_blocks() -> None:
    assert CHUNK_K % 256 == 0  # the largest KV block: a chunk of keys never ends inside one
