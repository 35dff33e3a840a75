"""The sampler of decode steps against the CPU's, token for token, while rows join, move and leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

pytest.importorskip("triton", reason="the GPU's engine is made of Triton kernels")

from duomo.engine.decode_step import MAX_BIASES, MAX_ENDINGS, DecodeRow, Joining, StepLogprobs, check_sampling
from duomo.engine.gpu_host_ring import HostRing
from duomo.engine.gpu_sample_rows import SampleKind
from duomo.engine.gpu_sampler import ALL_KINDS, CAPTURED_KINDS, GpuSampler
from duomo.engine.sampler import RowSampling, Sampler
from duomo.errors import EngineError, RequestError
from duomo.grammar.state import Grammar
from duomo.wire.values import Constraint, Sampling
from duomo_kernels._sampling import MAX_BIASES as kernels_max_biases
from services.router import structured
from tests.grammar import letters

VOCAB = 61
ENDINGS = (2, 5)


@dataclass
class Choice:
    """A sequence and what it has been given."""

    sampling: Sampling
    prompt_ids: tuple[int, ...] = (1, 2, 3)
    output_ids: list[int] = field(default_factory=lambda: [4])
    row: int | None = None
    grammar: Grammar | None = None

    @property
    def asked(self) -> RowSampling:
        state = None if self.grammar is None else self.grammar.state(self.sampling)
        return RowSampling(
            sampling=self.sampling,
            choice=0,
            prompt_ids=self.prompt_ids,
            output_ids=tuple(self.output_ids),
            ending_ids=ENDINGS,
            grammar=state,
        )


class Rows:
    """Steps of the sampler alone: logits come from a generator, tokens are held against the CPU's sampler."""

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self.device = device
        self.sampler = GpuSampler(max_rows, VOCAB, 3, device)
        self._ring = HostRing(self.sampler.num_host_words, device)
        self._made = torch.Generator().manual_seed(1)
        self._last: list[Choice] = []
        self.kind = SampleKind()
        self.logprobs: StepLogprobs | None = None
        self.errors: dict[int, EngineError] = {}

    def step(self, choices: Sequence[Choice], *, poison: int | None = None) -> None:
        """One token for each choice, in this order; each is in `choices` of the step before at most once."""
        rows = tuple(self._row_of(choice) for choice in choices)
        self._last = list(choices)
        self.kind = self.sampler.rows.place(rows)
        self.sampler.rows.fill_masks(partial(fill, [choice for choice in choices if choice.grammar is not None]))
        logits_RV = torch.randn(len(rows), VOCAB, generator=self._made) * 4
        if poison is not None:
            logits_RV[poison, 7] = float("nan")
        position_R = torch.tensor([row.position + 1 for row in rows], dtype=torch.int32, device=self.device)
        num_valid = torch.tensor([len(rows)], dtype=torch.int32, device=self.device)
        self.sampler.run(logits_RV.to(self.device), position_R, num_valid, self.kind)
        buffer = self._ring.take()
        self.sampler.download(buffer, 3, self.kind)
        buffer.wait()
        self.errors = self.sampler.errors(buffer, len(rows))
        self.logprobs = self.sampler.logprobs(buffer, len(rows)) if self.kind.has_logprobs else None
        tokens = self.sampler.tokens(buffer, len(rows)).tolist()
        self._judge(logits_RV, choices, tokens)

    def _row_of(self, choice: Choice) -> DecodeRow:
        position = len(choice.prompt_ids) + len(choice.output_ids) - 1
        if any(choice is other for other in self._last):
            return DecodeRow(source=next(at for at, other in enumerate(self._last) if other is choice), position=position, table=())
        return DecodeRow(source=Joining(token_id=choice.output_ids[-1], sampling=choice.asked), position=position, table=())

    def _judge(self, logits_RV: Tensor, choices: Sequence[Choice], tokens: list[int]) -> None:
        sound = [at for at in range(len(choices)) if at not in self.errors]
        expected = Sampler().sample(logits_RV[sound], [choices[at].asked for at in sound])
        for at, theirs in zip(sound, expected, strict=True):
            assert tokens[at] == theirs.token_id, (at, choices[at].sampling)
            num_top = choices[at].sampling.logprobs
            if num_top is not None:
                assert self.logprobs is not None
                assert float(self.logprobs.logprob_R[at]) == pytest.approx(theirs.logprob, abs=1e-5)
                top = self.logprobs.top(at, num_top)
                assert [token for token, _ in top] == [token for token, _ in theirs.top]
                assert [value for _, value in top] == pytest.approx([value for _, value in theirs.top], abs=1e-5)
        for at, choice in enumerate(choices):
            choice.output_ids.append(tokens[at])


def fill(held: list[Choice], masks_MW: NDArray[np.int32]) -> None:
    assert len(masks_MW) == len(held)
    for mask_W, choice in zip(masks_MW, held, strict=True):
        asked = choice.asked
        assert asked.grammar is not None
        asked.grammar.fill(mask_W, asked.output_ids)


@pytest.fixture
def rows() -> Rows:
    return Rows(6, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def test_each_row_draws_as_it_asked_whatever_stands_beside_it(rows: Rows) -> None:
    greedy = Choice(Sampling(max_tokens=9, temperature=0.0))
    drawn = Choice(Sampling(max_tokens=9, temperature=0.8, seed=2**63 + 5))
    limited = Choice(Sampling(max_tokens=9, top_k=5, top_p=0.9, min_p=0.01, seed=11))
    rows.step([greedy])
    assert rows.kind == SampleKind(mode="greedy")
    rows.step([greedy, drawn])
    assert rows.kind == SampleKind(mode="plain")
    rows.step([drawn, limited, greedy])
    assert rows.kind == SampleKind(mode="limited")
    rows.step([greedy, drawn])
    assert rows.kind == SampleKind(mode="plain")


def test_a_top_k_that_no_word_holds_is_no_limit(rows: Rows) -> None:
    rows.step([Choice(Sampling(max_tokens=9, top_k=2**31, seed=5)), Choice(Sampling(max_tokens=9, top_k=3, seed=5))])
    rows.step([Choice(Sampling(max_tokens=9, top_k=2**31, seed=5))])
    assert rows.kind == SampleKind(mode="plain")


def test_tables_of_seen_tokens_follow_their_rows(rows: Rows) -> None:
    penalised = [
        Choice(Sampling(max_tokens=9, temperature=0.0, repetition_penalty=1.8), prompt_ids=tuple(range(20, 30))),
        Choice(Sampling(max_tokens=9, temperature=0.9, presence_penalty=1.5, frequency_penalty=0.7, seed=3)),
    ]
    plain = Choice(Sampling(max_tokens=9, temperature=0.0))
    rows.step([penalised[0], plain])
    assert rows.kind.is_penalised
    rows.step([plain, penalised[1], penalised[0]])
    rows.step([penalised[1], penalised[0]])
    rows.step([penalised[1]])
    rows.step([penalised[0], penalised[1]])  # it was away: its table is filled again
    rows.step([plain])
    assert not rows.kind.is_penalised


def test_biases_follow_their_rows_and_go_with_them(rows: Rows) -> None:
    biased = [
        Choice(Sampling(max_tokens=9, temperature=0.0, logit_bias=((7, 30.0), (60, -100.0)))),
        Choice(Sampling(max_tokens=9, temperature=0.9, seed=3, presence_penalty=1.5, logit_bias=((31, 3.0), (32, 3.0), (0, 2.0)))),
    ]
    plain = Choice(Sampling(max_tokens=9, temperature=0.0))
    rows.step([biased[0], plain])
    assert rows.kind.is_penalised and biased[0].output_ids[-1] == 7
    rows.step([plain, biased[1], biased[0]])
    rows.step([biased[1], biased[0]])
    rows.step([Choice(Sampling(max_tokens=9, temperature=0.0, presence_penalty=0.1)), biased[1]])  # in a slot that held biases
    rows.step([biased[0], biased[1], plain])
    rows.step([plain])
    assert not rows.kind.is_penalised and len(rows.sampler.rows._free_slots) == 6


def test_masks_follow_their_rows_whoever_stands_beside_them(rows: Rows, tmp_path: Path) -> None:
    def held(first: str, regex: str, **knobs: Any) -> Choice:
        sampling = Sampling(max_tokens=9, constraint=Constraint(kind="regex", text=regex), **knobs)
        return Choice(sampling, output_ids=[letters.token_id(first)], grammar=letters.grammar(tmp_path, VOCAB, regex))

    digits, caps = held("5", "[0-9]{3}", temperature=0.0), held("B", "[A-C]+", seed=4, repetition_penalty=1.4, logprobs=2)
    early = held("#", "[!-#]{1,6}", top_k=9, seed=8, min_tokens=3)
    plain = Choice(Sampling(max_tokens=9, temperature=0.0))
    rows.step([plain, digits])
    assert rows.kind.is_penalised and not rows.kind.has_logprobs
    rows.step([caps, plain, digits, early])
    rows.step([caps, plain, digits, early])
    rows.step([early, caps])
    assert letters.text(digits.output_ids).isdigit() and digits.output_ids[-1] == letters.EOS and len(digits.output_ids) == 4
    assert letters.EOS not in early.output_ids and set(letters.text(early.output_ids)) <= set('!"#')
    rows.step([plain, early])
    rows.step([plain])
    assert not rows.kind.is_penalised


def test_slots_come_back(rows: Rows) -> None:
    for _ in range(8):
        rows.step([Choice(Sampling(max_tokens=9, temperature=0.0, presence_penalty=0.5)) for _ in range(2)])
    assert len(rows.sampler.rows._free_slots) == 4


def test_endings_are_masked_until_enough_tokens_are_out(rows: Rows) -> None:
    choice = Choice(Sampling(max_tokens=9, temperature=0.0, min_tokens=3))
    kinds = []
    for _ in range(4):
        rows.step([choice])
        kinds.append(rows.kind.is_penalised)
    assert kinds == [True, True, False, False]  # the first of its tokens came from prefill


def test_logprobs_come_for_whoever_asks(rows: Rows) -> None:
    silent = Choice(Sampling(max_tokens=9, temperature=0.0))
    rows.step([Choice(Sampling(max_tokens=9, temperature=0.0, logprobs=3)), silent, Choice(Sampling(max_tokens=9, logprobs=0, seed=4))])
    assert rows.kind.has_logprobs and not rows.errors
    rows.step([silent])
    assert not rows.kind.has_logprobs


def test_a_row_of_nan_is_an_error_of_its_own(rows: Rows) -> None:
    choices = [Choice(Sampling(max_tokens=9, temperature=0.0)) for _ in range(3)]
    rows.step(choices, poison=1)
    assert list(rows.errors) == [1]
    assert "NaN" in rows.errors[1].detail and rows.errors[1].phase == "decode.stream"


def test_every_kind_is_warmed_and_those_without_extras_are_captured() -> None:
    assert len(set(ALL_KINDS)) == 12 and set(CAPTURED_KINDS) < set(ALL_KINDS)
    assert all(not kind.is_penalised and not kind.has_logprobs for kind in CAPTURED_KINDS)


def test_what_no_step_can_hold_is_refused_before_it_joins() -> None:
    assert MAX_BIASES == structured.MAX_BIASES == kernels_max_biases.value
    check_sampling(Sampling(max_tokens=9, logit_bias=tuple((token_id, 1.0) for token_id in range(MAX_BIASES))), 0)
    with pytest.raises(RequestError, match="at most 1024"):
        check_sampling(Sampling(max_tokens=9, logit_bias=tuple((token_id, 1.0) for token_id in range(MAX_BIASES + 1))), 0)
    check_sampling(Sampling(max_tokens=9, min_tokens=2, logprobs=20), MAX_ENDINGS)
    check_sampling(Sampling(max_tokens=9), MAX_ENDINGS + 1)
    with pytest.raises(RequestError, match="at most 32"):
        check_sampling(Sampling(max_tokens=9, min_tokens=2), MAX_ENDINGS + 1)
    with pytest.raises(RequestError, match="at most 20"):
        check_sampling(Sampling(max_tokens=9, logprobs=21), 0)


def test_no_two_rows_go_on_from_one(rows: Rows) -> None:
    rows.step([Choice(Sampling(max_tokens=9, temperature=0.0))])
    row = DecodeRow(source=0, position=5, table=())
    with pytest.raises(AssertionError):
        rows.sampler.rows.place([row, row])
