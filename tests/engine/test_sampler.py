"""The sampler: each knob against its definition, and each row free of the others."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from duomo.engine.sampler import RowSampling, Sampler, _limit, broken_rows, ending_ids, ends_choice
from duomo.grammar.library import tokens_of
from duomo.grammar.state import Grammar
from duomo.wire.values import Constraint, Sampling

VOCAB = 63


def row(
    *, choice: int = 0, prompt: tuple[int, ...] = (1, 2), output: tuple[int, ...] = (), ends: tuple[int, ...] = (), **knobs: Any
) -> RowSampling:
    sampling = Sampling(max_tokens=99, **knobs)
    return RowSampling(sampling=sampling, choice=choice, prompt_ids=prompt, output_ids=output, ending_ids=ends)


def draw(logits: torch.Tensor, one: RowSampling) -> int:
    return Sampler().sample(logits[None], [one])[0].token_id


def drawn(logits: torch.Tensor, num: int = 400, **knobs: Any) -> Counter[int]:
    rows = [row(seed=seed, **knobs) for seed in range(num)]
    return Counter(token.token_id for token in Sampler().sample(logits.expand(num, -1), rows))


def test_greedy_is_the_first_maximum() -> None:
    logits = torch.zeros(VOCAB)
    logits[[7, 40]] = 3.0
    assert draw(logits, row(temperature=0.0)) == 7


def test_nothing_to_sample() -> None:
    assert Sampler().sample(torch.empty(0, VOCAB), []) == []


def test_logits_are_left_as_they_are() -> None:
    logits = torch.randn(1, VOCAB)
    before = logits.clone()
    Sampler().sample(logits, [row(temperature=0.7, presence_penalty=1.0, min_tokens=3, ends=(5,), output=(1,), logprobs=2)])
    assert torch.equal(logits, before)


def test_frequencies_follow_the_distribution() -> None:
    logits = torch.full((VOCAB,), -torch.inf)
    logits[[3, 9, 20]] = torch.log(torch.tensor([0.5, 0.3, 0.2]))
    counts = drawn(logits, num=3000, temperature=1.0)
    for token, share in ((3, 0.5), (9, 0.3), (20, 0.2)):
        assert abs(counts[token] - 3000 * share) < 5 * (3000 * share * (1 - share)) ** 0.5
    sharp = drawn(logits, num=3000, temperature=0.5)
    assert abs(sharp[3] - 3000 * 0.25 / 0.38) < 5 * (3000 * 0.66 * 0.34) ** 0.5


def test_top_k_min_p_top_p_cut_the_tail() -> None:
    logits = torch.full((VOCAB,), -torch.inf)
    logits[[5, 6, 7, 8]] = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    assert set(drawn(logits, top_k=2)) == {5, 6}
    assert set(drawn(logits, top_k=VOCAB + 5)) == {5, 6, 7, 8}
    assert set(drawn(logits, min_p=0.45)) == {5, 6, 7}
    assert set(drawn(logits, top_p=0.6)) == {5, 6}
    assert set(drawn(logits, top_p=1e-9)) == {5}
    assert set(drawn(logits, top_k=3, top_p=0.75)) == {5, 6}  # of the renormalised 0.44, 0.33, 0.22


@pytest.mark.parametrize("few", [1, 4, 30])
@pytest.mark.parametrize("spread", [0.0, 0.3, 5.0])
def test_limits_do_not_depend_on_how_far_one_looks_first(monkeypatch: pytest.MonkeyPatch, few: int, spread: float) -> None:
    probs = torch.softmax((torch.randn(VOCAB) * spread).round(decimals=1).double(), -1)  # rounded: ties
    for top_k in (1, 3, 4, 5, 40, VOCAB):
        for top_p in (1e-9, 0.3, 0.9, 0.999, 1.0):
            values, order = probs.sort(descending=True, stable=True)
            keep = torch.arange(VOCAB) < top_k
            shares = values * keep
            if top_p < 1:
                keep &= (shares.cumsum(-1) - shares) < top_p * (shares.sum() if top_k < VOCAB else probs.sum())
                keep[0] = True
            monkeypatch.setattr("duomo.engine.sampler.FEW", few)
            limited = _limit(probs, top_k, top_p)
            edge = top_p < 1  # a sum in another order may move the edge by one
            assert abs(int((limited > 0).sum()) - int(keep.sum())) <= edge
            if int((limited > 0).sum()) == int(keep.sum()):
                assert set(limited.nonzero().flatten().tolist()) == set(order[keep].tolist())
            monkeypatch.setattr("duomo.engine.sampler.FEW", VOCAB)
            assert torch.equal(_limit(probs, top_k, top_p), limited)


def test_penalties_are_those_of_vllm() -> None:
    logits = torch.zeros(VOCAB)
    logits[[3, 4, 5]] = torch.tensor([2.0, 1.9, -1.0])
    assert draw(logits, row(temperature=0.0, output=(3,), presence_penalty=0.2)) == 4
    assert draw(logits, row(temperature=0.0, prompt=(3,), presence_penalty=0.2)) == 3  # presence counts the output alone
    assert draw(logits, row(temperature=0.0, output=(3,), frequency_penalty=0.06)) == 3
    assert draw(logits, row(temperature=0.0, output=(3, 3), frequency_penalty=0.06)) == 4
    assert draw(logits, row(temperature=0.0, prompt=(3,), repetition_penalty=1.2)) == 4  # repetition counts the prompt too
    negative = torch.full((VOCAB,), -2.0)
    negative[9] = -1.5
    assert draw(negative, row(temperature=0.0, prompt=(9,), repetition_penalty=1.5)) == 0  # -1.5 * 1.5 < -2


def test_min_tokens_masks_the_endings() -> None:
    logits = torch.zeros(VOCAB)
    logits[[2, 11]] = torch.tensor([9.0, 5.0])
    masked: dict[str, Any] = {"temperature": 0.0, "min_tokens": 2, "ends": (2,)}
    assert draw(logits, row(**masked)) == 11
    assert draw(logits, row(output=(11,), **masked)) == 11
    assert draw(logits, row(output=(11, 11), **masked)) == 2


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = torch.randn(2, VOCAB)
    penalised = row(temperature=0.3, top_k=1, logprobs=5, presence_penalty=1.5, output=(4,))
    plain, full = Sampler().sample(logits, [row(temperature=0.0), penalised])
    assert plain.logprob is None and plain.top == ()
    expected = torch.log_softmax(logits[1].double(), -1)
    assert full.logprob == pytest.approx(float(expected[full.token_id]), abs=1e-9)
    assert [token for token, _ in full.top] == expected.topk(5).indices.tolist()
    none = Sampler().sample(logits[:1], [row(temperature=0.0, logprobs=0)])[0]
    assert none.logprob is not None and none.top == ()


def test_a_row_is_decided_alone() -> None:
    logits = torch.randn(17, VOCAB)
    rows = [
        row(
            seed=at,
            choice=at % 3,
            temperature=0.0 if at % 4 == 0 else 1.3,
            top_p=0.9,
            top_k=at,
            presence_penalty=at % 2,
            output=(at,) * (at % 5),
        )
        for at in range(17)
    ]
    together = Sampler().sample(logits, rows)
    assert [Sampler().sample(logits[at : at + 1], [rows[at]])[0] for at in range(17)] == together
    assert Sampler().sample(logits.flip(0), rows[::-1]) == together[::-1]


def test_choice_and_position_change_the_draw() -> None:
    logits = torch.zeros(VOCAB)
    assert len({draw(logits, row(choice=choice)) for choice in range(20)}) > 10
    assert len({draw(logits, row(output=(1,) * position)) for position in range(20)}) > 10
    assert draw(logits, row(prompt=(1, 2, 3), output=())) == draw(logits, row(prompt=(1, 2), output=(3,)))  # a resume draws alike


def test_ending_ids() -> None:
    assert ending_ids(Sampling(max_tokens=1, stop_token_ids=(9,)), (2,)) == (9, 2)
    assert ending_ids(Sampling(max_tokens=1, stop_token_ids=(9,), ignore_eos=True), (2,)) == (9,)


def test_a_bias_is_added_before_everything_else() -> None:
    logits = torch.zeros(VOCAB)
    logits[7] = 3.0
    assert draw(logits, row(temperature=0.0, logit_bias=((9, 3.5),))) == 9
    assert draw(logits, row(temperature=0.0, logit_bias=((7, -100.0),))) == 0
    assert draw(logits, row(temperature=0.0, logit_bias=((9, 100.0),), ends=(9,), min_tokens=1)) == 7, "what min_tokens masks stays masked"
    # 2 + 4 = 6, halved by the repetition penalty to 3 as one logit
    penalised = row(temperature=0.0, logit_bias=((9, 4.0),), repetition_penalty=2.0, output=(9,))
    assert draw(torch.where(torch.arange(VOCAB) == 9, 2.0, logits - 0.5), penalised) == 9
    assert draw(torch.where(torch.arange(VOCAB) == 9, 2.0, logits + 0.5), penalised) == 7


def test_a_bias_changes_no_other_row_and_no_logprob() -> None:
    logits = torch.randn(2, VOCAB)
    plain = Sampler().sample(logits, [row(temperature=0.0, logprobs=3), row(temperature=0.0, logprobs=3)])
    biased = Sampler().sample(logits, [row(temperature=0.0, logprobs=3), row(temperature=0.0, logprobs=3, logit_bias=((5, 50.0),))])
    assert biased[0] == plain[0] and biased[1].token_id == 5 and biased[1].top == plain[1].top
    assert biased[1].logprob == pytest.approx(float(torch.log_softmax(logits[1].double(), -1)[5]))


TOKENIZER = Path(__file__).resolve().parents[2] / "models" / "tiny-moe" / "tokenizer.json"
TEXT = tokenizers.Tokenizer.from_file(str(TOKENIZER))


def held(regex: str, **knobs: Any) -> RowSampling:
    """A row of the embedded model's vocabulary under a constraint."""
    sampling = Sampling(max_tokens=99, constraint=Constraint(kind="regex", text=regex), **knobs)
    tokens = tokens_of(TOKENIZER, 8192, (2,))
    grammar = Grammar(tokens, tokens.matcher(sampling.constraint or pytest.fail("it has one")))
    return RowSampling(sampling=sampling, choice=0, prompt_ids=(1,), output_ids=[], ending_ids=(2,), grammar=grammar.state(sampling))


def test_a_row_under_a_grammar_takes_what_it_allows_whatever_the_logits_say() -> None:
    logits = torch.randn(3, 8192)
    rows = [held("[0-9]{3}", temperature=1.0, seed=5, logprobs=2, presence_penalty=1.0, top_p=0.9), row(temperature=0.0)]
    free = Sampler().sample(logits[:2], [row(temperature=0.0), rows[1]])
    text = ""
    output_ids = rows[0].output_ids
    assert isinstance(output_ids, list)
    while True:
        sampled = Sampler().sample(logits[:2], rows)
        assert sampled[1] == free[1]
        assert sampled[0].logprob == pytest.approx(float(torch.log_softmax(logits[0].double(), -1)[sampled[0].token_id]))
        output_ids.append(sampled[0].token_id)
        if sampled[0].token_id == 2:
            break
        text += TEXT.decode([sampled[0].token_id])
    assert re.fullmatch("[0-9]{3}", text) and not broken_rows(rows)


def test_a_row_whose_grammar_breaks_is_told_and_disturbs_no_other() -> None:
    broken = replace(held("[0-9]{3}"), output_ids=[5])
    rows = [broken, row(temperature=0.0)]
    logits = torch.randn(2, 8192)
    assert Sampler().sample(logits, rows)[1] == Sampler().sample(logits[1:], rows[1:])[0]
    assert list(broken_rows(rows)) == [0] and broken_rows(rows)[0].code == "constraint_not_kept"


def test_under_a_constraint_eos_ends_a_choice_always() -> None:
    plain, constrained = Sampling(max_tokens=9, ignore_eos=True, min_tokens=5), held("a", ignore_eos=True, min_tokens=5).sampling
    assert ending_ids(plain, (2,)) == () and ending_ids(constrained, (2,)) == (2,)
    assert not ends_choice(2, 3, plain, (2,)) and ends_choice(2, 3, constrained, (2,)) and not ends_choice(3, 9, constrained, (2,))


def test_a_constraint_that_nobody_keeps_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="nobody keeps"):
        row(constraint=Constraint(kind="regex", text="a"))
