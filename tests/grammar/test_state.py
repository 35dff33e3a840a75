"""A choice's place in its grammar: what may come next, how it ends, and that it follows from the tokens alone."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from numpy.typing import NDArray

from duomo.grammar.library import tokens_of
from duomo.grammar.state import NOT_KEPT, Grammar, GrammarState, num_words
from duomo.wire.values import Constraint, Sampling

TOKENIZER = Path(__file__).resolve().parents[2] / "models" / "tiny-moe" / "tokenizer.json"
VOCAB, EOS, OTHER_EOS = 8192, 2, 0
TEXT = tokenizers.Tokenizer.from_file(str(TOKENIZER))


def grammar(regex: str) -> Grammar:
    tokens = tokens_of(TOKENIZER, VOCAB, (EOS, OTHER_EOS))
    return Grammar(tokens, tokens.matcher(Constraint(kind="regex", text=regex)))


def state(regex: str, **knobs: object) -> GrammarState:
    return grammar(regex).state(Sampling(max_tokens=99, **knobs))  # type: ignore[arg-type]  # fields by name


def mask(one: GrammarState, output_ids: list[int], following: int | None = None) -> NDArray[np.bool_]:
    mask_W = np.zeros(num_words(VOCAB), np.int32)
    one.fill(mask_W, output_ids, following)
    return np.unpackbits(mask_W.view(np.uint8), count=VOCAB, bitorder="little").astype(bool)


def allowed(one: GrammarState, output_ids: list[int], following: int | None = None) -> set[str]:
    """What may come: texts, and `end` for the two eos ids together."""
    ids = mask(one, output_ids, following).nonzero()[0].tolist()
    assert (EOS in ids) == (OTHER_EOS in ids)
    return {"end" if token_id in (EOS, OTHER_EOS) else TEXT.decode([token_id], skip_special_tokens=False) for token_id in ids}


def ids(text: str) -> list[int]:
    return [int(TEXT.token_to_id(one)) for one in text]  # type: ignore[arg-type]  # every letter is a token


def test_the_end_may_come_where_the_grammar_may_end() -> None:
    one = state("[ab]{1,2}")
    assert allowed(one, []) == {"a", "b", "ab", "ba", "bb"}
    assert allowed(one, ids("a")) == {"a", "b", "end"}
    assert allowed(one, ids("ab")) == {"end"}
    assert one.error is None


@pytest.mark.parametrize("knobs", [{"ignore_eos": True}, {"min_tokens": 9}])
def test_ignored_or_early_it_comes_only_where_nothing_else_may(knobs: dict[str, object]) -> None:
    one = state("[ab]{1,2}", **knobs)
    assert "end" not in allowed(one, ids("a"))
    assert allowed(one, ids("ab")) == {"end"}


def test_from_min_tokens_on_it_may_come() -> None:
    one = state("[ab]+", min_tokens=2)
    assert "end" not in allowed(one, ids("a")) and "end" in allowed(one, ids("ab"))


def test_stop_ids_that_are_no_text_come_with_the_end_and_others_as_text() -> None:
    im_start, letter = TEXT.token_to_id("<|im_start|>"), TEXT.token_to_id("a")
    one = state("[ab]{1,2}", stop_token_ids=(im_start, letter))
    assert not mask(one, [])[im_start] and mask(one, [])[letter]
    assert mask(one, ids("b"))[im_start]
    early = state("[ab]{1,2}", stop_token_ids=(letter,), min_tokens=5)
    assert not mask(early, [])[letter]
    assert allowed(state("ba?", stop_token_ids=(letter,), min_tokens=5), ids("b")) == {"end"}
    assert mask(state("a", stop_token_ids=(letter,), min_tokens=5), [])[letter], "nothing else may come"


def test_shown_all_tokens_or_one_by_one_it_is_at_the_same_place() -> None:
    rng, one, made = random.Random(7), state("([a-z]{2,9} ){3,5}[0-9]+"), list[int]()
    source = grammar("([a-z]{2,9} ){3,5}[0-9]+")
    for _ in range(30):
        here = mask(one, made)
        assert np.array_equal(here, mask(source.state(Sampling(max_tokens=99)), made)), made
        if made:
            ahead = source.state(Sampling(max_tokens=99))
            assert np.array_equal(here, mask(ahead, made[:-1], made[-1])) and np.array_equal(here, mask(ahead, made))
        choices = [token_id for token_id in here.nonzero()[0].tolist() if token_id not in (EOS, OTHER_EOS)]
        made.append(rng.choice(choices))
    assert one.error is None and len(made) == 30


def test_behind_a_token_that_ended_the_choice_nothing_is_masked() -> None:
    one = state("[ab]{1,2}")
    assert allowed(one, ids("a")) == {"a", "b", "end"}
    assert mask(one, ids("a"), EOS).all() and mask(one, ids("a"), -1).all()
    assert one.error is None


def test_a_token_that_it_does_not_allow_is_an_error_and_masks_nothing() -> None:
    one = state("[ab]+")
    assert mask(one, ids("ax")).all()
    assert one.error is not None and one.error.code == NOT_KEPT and not one.error.retryable
    assert mask(one, ids("axb")).all()


def test_choices_of_one_grammar_go_their_own_ways() -> None:
    shared = grammar("ab|ba")
    one, other = shared.state(Sampling(max_tokens=9)), shared.state(Sampling(max_tokens=9))
    assert allowed(one, ids("a")) == {"b"} and allowed(other, ids("b")) == {"a"}
    assert allowed(shared.state(Sampling(max_tokens=9)), []) >= {"a", "b"}


def test_a_grammar_that_costs_too_much_is_an_error_and_not_a_wait() -> None:
    one, made = state("(((a{1,100}){1,100}){1,100}){1,100}"), list[int]()
    while one.error is None and len(made) < 99:
        choices = [token_id for token_id in mask(one, made).nonzero()[0].tolist() if token_id not in (EOS, OTHER_EOS)]
        made.append(choices[0])
    assert one.error is not None and one.error.code == NOT_KEPT and "aaa" not in one.error.detail
