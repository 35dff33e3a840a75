"""Owns the choice of the next token from logits. Knows no model, batch order or request: each row is decided by its own RowSampling alone.

Order, as in vLLM: logprobs from the raw logits; the request's bias; its grammar, or min_tokens, masks ids; repetition, frequency, presence
penalties; temperature; min-p; top-k; top-p; one uniform number against the cumulative distribution in vocabulary order. temperature 0 takes
the first maximum after the penalties.

Legend: S rows, V vocabulary, W words of 32 ids.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from duomo.engine.randomness import uniform
from duomo.errors import EngineError
from duomo.grammar.state import GrammarState, num_words
from duomo.wire.values import Sampling

GREEDY_TEMPERATURE = 1e-5  # below, dividing by it overflows float32: treated as greedy (vLLM's _SAMPLING_EPS)
FEW = 256  # most limits of real requests lie within: top_k 50, top_p 0.95 of a trained model


@dataclass(frozen=True, kw_only=True, slots=True)
class RowSampling:
    """How one row's token is chosen.

    output_ids: the choice's tokens so far, in order; position of the new token is len(prompt_ids) + len(output_ids).
    ending_ids: eos (unless ignored) and stop ids, masked while fewer than min_tokens are out. grammar: the choice's own state where
    sampling has a constraint; it masks endings itself.
    """

    sampling: Sampling
    choice: int
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    ending_ids: Sequence[int] = ()
    grammar: GrammarState | None = None

    def __post_init__(self) -> None:
        assert (self.grammar is None) == (self.sampling.constraint is None), "a constraint that nobody keeps"

    @property
    def is_greedy(self) -> bool:
        return self.sampling.temperature < GREEDY_TEMPERATURE

    @property
    def has_penalty(self) -> bool:
        return self.sampling.presence_penalty != 0 or self.sampling.frequency_penalty != 0 or self.sampling.repetition_penalty != 1

    @property
    def masks_endings(self) -> bool:
        return self.grammar is None and len(self.output_ids) < self.sampling.min_tokens and len(self.ending_ids) > 0

    @property
    def is_adjusted(self) -> bool:
        """Whether its token is chosen from other logits than the model's."""
        return self.grammar is not None or bool(self.sampling.logit_bias) or self.has_penalty or self.masks_endings


def ending_ids(sampling: Sampling, eos_ids: Sequence[int]) -> tuple[int, ...]:
    """The ids that end a choice: eos unless ignored (under a constraint it comes only where the answer is over), and the request's own."""
    ignores_eos = sampling.ignore_eos and sampling.constraint is None
    return tuple(sampling.stop_token_ids) + (() if ignores_eos else tuple(eos_ids))


def ends_choice(token_id: int, num_output: int, sampling: Sampling, ends: Collection[int]) -> bool:
    """Whether the choice's last token, its num_output-th, ends it with "stop". ends: ending_ids(). Its limits are another matter.

    Under a constraint an ending id that is there had its reason.
    """
    return token_id in ends and (num_output > sampling.min_tokens or sampling.constraint is not None)


def broken_rows(rows: Sequence[RowSampling]) -> dict[int, EngineError]:
    """Rows whose grammar failed: what was sampled for them is not to be used."""
    return {at: row.grammar.error for at, row in enumerate(rows) if row.grammar is not None and row.grammar.error is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledToken:
    """The chosen token; logprob and top (id, logprob; best first) of the raw distribution where the row asked for them."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Stateless: the same logits and RowSampling give the same token in any batch. A row's grammar follows the row's own tokens."""

    @torch.inference_mode()
    def sample(self, logits_SV: Tensor, rows: Sequence[RowSampling]) -> list[SampledToken]:
        """logits float32 [S, V], not changed; one row each. Returns one token for each row; broken_rows() says whose are none."""
        assert logits_SV.shape[0] == len(rows), (logits_SV.shape, len(rows))
        if not rows:
            return []
        adjusted_SV = _adjust(logits_SV, rows)
        tokens = adjusted_SV.argmax(-1).tolist()
        for at, row in enumerate(rows):
            if not row.is_greedy:
                tokens[at] = _draw(adjusted_SV[at], row)
        if all(row.sampling.logprobs is None for row in rows):
            return [SampledToken(token_id=token) for token in tokens]
        return [_with_logprobs(logits_SV[at], row, tokens[at]) for at, row in enumerate(rows)]


def _adjust(logits_SV: Tensor, rows: Sequence[RowSampling]) -> Tensor:
    """Biased, masked and penalised logits; the same tensor where no row asks for any of it."""
    if not any(row.is_adjusted for row in rows):
        return logits_SV
    adjusted_SV = logits_SV.clone()
    for at, row in enumerate(rows):
        if row.sampling.logit_bias:
            ids, values = zip(*row.sampling.logit_bias, strict=True)
            adjusted_SV[at, torch.tensor(ids, dtype=torch.int64)] += torch.tensor(values, dtype=torch.float32)
        if row.grammar is not None:
            adjusted_SV[at].masked_fill_(~_allowed(row.grammar, row.output_ids, logits_SV.shape[1]), -torch.inf)
        if row.masks_endings:
            adjusted_SV[at, torch.tensor(row.ending_ids, dtype=torch.int64)] = -torch.inf
        if row.has_penalty:
            _penalise(adjusted_SV[at], row)
    return adjusted_SV


def _allowed(grammar: GrammarState, output_ids: Sequence[int], vocab: int) -> Tensor:
    """bool [V]: what may come next."""
    mask_W = np.empty(num_words(vocab), np.int32)
    grammar.fill(mask_W, output_ids)
    return torch.from_numpy(np.unpackbits(mask_W.view(np.uint8), count=vocab, bitorder="little").view(np.bool_))


def _penalise(logits_V: Tensor, row: RowSampling) -> None:
    """Repetition over prompt and output, frequency and presence over the output, in place."""
    sampling, vocab = row.sampling, logits_V.shape[0]
    output_counts_V = torch.bincount(torch.tensor(row.output_ids, dtype=torch.int64), minlength=vocab)
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted({*row.prompt_ids, *row.output_ids}), dtype=torch.int64)
        values = logits_V[seen]
        logits_V[seen] = torch.where(values > 0, values / sampling.repetition_penalty, values * sampling.repetition_penalty)
    # sums and products of a mask and a scalar, in this order: vLLM's apply_penalties
    logits_V -= sampling.frequency_penalty * output_counts_V
    logits_V -= sampling.presence_penalty * (output_counts_V > 0)


def _draw(logits_V: Tensor, row: RowSampling) -> int:
    """One token of softmax(logits / temperature) under the row's limits."""
    sampling, vocab = row.sampling, logits_V.shape[0]
    probs_V = torch.softmax(logits_V.double() / sampling.temperature, -1)
    if sampling.min_p > 0:
        probs_V = torch.where(probs_V >= sampling.min_p * probs_V.max(), probs_V, 0.0)
    top_k = sampling.top_k if 0 < sampling.top_k < vocab else vocab
    if top_k < vocab or sampling.top_p < 1:
        probs_V = _limit(probs_V, top_k, sampling.top_p)
    cumulative_V = probs_V.cumsum(-1)
    point = uniform(sampling.seed, row.choice, len(row.prompt_ids) + len(row.output_ids)) * float(cumulative_V[-1])
    # the first token whose cumulative weight exceeds the point; one without weight never does first
    token = int(torch.searchsorted(cumulative_V, point, right=True))
    return token if token < vocab else int(probs_V.nonzero()[-1])


def _limit(probs_V: Tensor, top_k: int, top_p: float) -> Tensor:
    """Zero outside the top_k most likely, then outside the smallest set of those whose share reaches top_p (never empty).

    Ties at the edge fall to the lower ids. The most likely FEW are looked at first: a full sort of the vocabulary takes five times as long.
    """
    kept = _kept_values(probs_V, top_k, top_p, min(FEW, probs_V.shape[0]))
    if kept is None:
        kept = _kept_values(probs_V, top_k, top_p, probs_V.shape[0])
        assert kept is not None, "the whole vocabulary holds every limit"
    edge = kept[-1]
    keep_V = probs_V > edge
    num_ties = kept.numel() - int(keep_V.sum())
    keep_V[(probs_V == edge).nonzero().flatten()[:num_ties]] = True
    return torch.where(keep_V, probs_V, 0.0)


def _kept_values(probs_V: Tensor, top_k: int, top_p: float, width: int) -> Tensor | None:
    """The kept probabilities, best first, found among the `width` best; None where they may reach further."""
    vocab = probs_V.shape[0]
    if width < top_k < vocab:
        return None
    best = torch.topk(probs_V, min(width, top_k)).values
    if top_p >= 1:
        return best if top_k <= width else None
    total = best.sum() if top_k < vocab else probs_V.sum()
    num_kept = max(1, int((best.cumsum(-1) - best < top_p * total).sum()))
    return None if num_kept == width < top_k else best[:num_kept]


def _with_logprobs(logits_V: Tensor, row: RowSampling, token: int) -> SampledToken:
    num_top = row.sampling.logprobs
    if num_top is None:
        return SampledToken(token_id=token)
    logprobs_V, values, ids = likeliest(logits_V, num_top)
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return SampledToken(token_id=token, logprob=float(logprobs_V[token]), top=top)


def likeliest(logits_V: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Raw log-probabilities, float64 [V]; those of the num_top likeliest tokens, best first, and their ids."""
    logprobs_V = torch.log_softmax(logits_V.double(), -1)
    values, ids = torch.topk(logprobs_V, min(num_top, logprobs_V.shape[0]))
    return logprobs_V, values, ids
