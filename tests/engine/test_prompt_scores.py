"""Scores of prompt tokens from logits: the definition, ties, few ids, and the bits that the sampler gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from duomo.engine.prompt_scores import RowsToScore, prompt_scores
from duomo.engine.sampler import RowSampling, Sampler
from duomo.wire.values import Sampling


def asked(next_ids: list[int], num_top: int) -> RowsToScore:
    return RowsToScore(row_lo=5, next_ids=next_ids, first=3, num_top=num_top)


@pytest.mark.parametrize(("num_rows", "vocab", "num_top"), [(1, 2, 1), (3, 63, 0), (65, 257, 5), (2, 3, 20)])
def test_scores_are_log_softmax_ranks_and_the_likeliest(num_rows: int, vocab: int, num_top: int) -> None:
    """Against numpy in float64; a vocabulary of fewer ids than were asked for lists them all."""
    rng = np.random.default_rng(vocab)
    logits_TV = rng.normal(scale=4, size=(num_rows, vocab)).astype(np.float32)
    next_ids = rng.integers(0, vocab, num_rows).tolist()
    found = prompt_scores(torch.from_numpy(logits_TV), asked(next_ids, num_top))
    exact = logits_TV.astype(np.float64)
    exact -= exact.max(1, keepdims=True)
    exact -= np.log(np.exp(exact).sum(1, keepdims=True))
    width = min(num_top, vocab)
    order = np.argsort(-exact, axis=1)[:, :width]
    assert found.first == 3 and found.top_TK.shape == found.top_ids_TK.shape == (num_rows, width)
    assert found.own_T.dtype == np.float64 and found.rank_T.dtype == found.top_ids_TK.dtype == np.int32
    assert np.array_equal(found.top_ids_TK, order)
    np.testing.assert_allclose(found.own_T, exact[np.arange(num_rows), next_ids], rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.top_TK, np.take_along_axis(exact, order, 1), rtol=0, atol=1e-12)
    places = (-exact).argsort(1).argsort(1)[np.arange(num_rows), next_ids] + 1
    assert np.array_equal(found.rank_T, places)


def test_a_rank_counts_all_that_are_as_likely() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0]]).repeat(4, 1)
    assert prompt_scores(logits, asked([0, 1, 2, 3], 0)).rank_T.tolist() == [3, 2, 2, 4]


def test_a_token_has_the_bits_that_the_sampler_gives_it() -> None:
    """In float64, whatever rows stand beside it."""
    logits_TV = torch.randn(63, 8192, generator=torch.Generator().manual_seed(1)) * 6
    sampling = Sampling(max_tokens=4, seed=7, logprobs=5)
    rows = [RowSampling(sampling=sampling, choice=at, prompt_ids=(1,), output_ids=()) for at in range(63)]
    sampled = Sampler().sample(logits_TV, rows)
    found = prompt_scores(logits_TV, asked([one.token_id for one in sampled], 5))
    assert found.own_T.tolist() == [one.logprob for one in sampled]
    pairs = [tuple(zip(ids, values, strict=True)) for ids, values in zip(found.top_ids_TK.tolist(), found.top_TK.tolist(), strict=True)]
    assert pairs == [one.top for one in sampled]


def test_logits_that_are_no_numbers_are_seen() -> None:
    logits = torch.zeros(3, 9)
    assert not prompt_scores(logits, asked([0, 0, 0], 2)).has_nan
    logits[1, 4] = torch.nan
    assert prompt_scores(logits, asked([0, 0, 0], 0)).has_nan
