"""A prompt's own log-probabilities as answers show them: both forms, offsets, and parts that are not the next."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from duomo.errors import WireError
from duomo.wire.prompt_logprobs import PromptScores, packed
from services.router.logprobs import token_name
from services.router.scored_prompt import PromptForms, ScoredPrompt, _offsets
from tests.services.router.stub_system import loaded_text

IDS = loaded_text().encode("Once upon a naïve 🦊", add_special_tokens=False)


def scores(first: int, end: int, num_top: int = 2) -> PromptScores:
    """Token at position p: -p, ranked p; of the likeliest it is the second."""
    positions = np.arange(first, end)
    tops = np.stack([[-p / 2, -float(p)] for p in positions])[:, :num_top]
    ids = np.stack([[100 + p, IDS[p]] for p in positions]).astype(np.int32)[:, :num_top]
    return PromptScores(first=first, own_T=-positions.astype(float), rank_T=positions.astype(np.int32) + 1, top_TK=tops, top_ids_TK=ids)


def written(forms: PromptForms, *parts: tuple[int, int], echo: str = "", num_top: int = 2) -> ScoredPrompt:
    scored = ScoredPrompt(IDS, forms, loaded_text(), echo)
    for part in parts:
        assert not scored.is_whole
        scored.take(0, packed(scores(*part, num_top)))
    assert scored.is_whole
    scored.write()
    return scored


def token(token_id: int) -> str:
    return loaded_text().token_bytes(token_id).decode("utf-8", "replace")


@pytest.mark.parametrize("parts", [[(1, len(IDS))], [(1, 2), (2, 5), (5, len(IDS))]])
def test_the_listed_form_is_vllms(parts: list[tuple[int, int]]) -> None:
    """The token itself first, with its place where it is among the likeliest; none of the first."""
    found = json.loads(written(PromptForms(listed=2), *parts).listed)
    assert found[0] is None and len(found) == len(IDS)
    for position, entry in enumerate(found[1:], 1):
        assert list(entry)[0] == str(IDS[position])
        wanted = {str(IDS[position]): (-float(position), 2), str(100 + position): (-position / 2, 1)}
        assert entry == {key: {"logprob": value, "rank": place, "decoded_token": token(int(key))} for key, (value, place) in wanted.items()}


def test_without_likeliest_a_token_has_its_rank_in_the_vocabulary() -> None:
    found = json.loads(written(PromptForms(listed=0), (1, len(IDS)), num_top=0).listed)
    assert found[3] == {str(IDS[3]): {"logprob": -3.0, "rank": 4, "decoded_token": token(IDS[3])}}


def lists_of(scored: ScoredPrompt) -> dict[str, Any]:
    echoed = scored.echoed
    assert echoed is not None
    return {name: json.loads(b"[" + getattr(echoed, name) + b"]") for name in ("tokens", "values", "tops", "offsets")}


def test_the_echoed_form_is_openais_and_each_form_has_its_own_number() -> None:
    echo = "Once upon a naïve 🦊"
    scored = written(PromptForms(listed=0, echoed=2), (1, len(IDS)), echo=echo)
    assert json.loads(scored.listed)[1].keys() == {str(IDS[1])}
    lists = lists_of(scored)
    assert lists["values"] == [None, *(-float(at) for at in range(1, len(IDS)))] and lists["tops"][0] is None
    assert lists["tops"][1] == {token(IDS[1]): -1.0, token_name(loaded_text().token_bytes(101)): -0.5}
    assert scored.echoed is not None and scored.echoed.end == len(echo)
    shown = [echo[lo:hi] for lo, hi in zip(lists["offsets"], [*lists["offsets"][1:], len(echo)], strict=True)]
    whole = [(name, text) for name, text in zip(lists["tokens"], shown, strict=True) if not name.startswith("bytes:")]
    assert whole and all(name == text for name, text in whole), "a token begins where its offset says"
    assert [name for name in lists["tokens"] if name.startswith("bytes:")], "an emoji takes several tokens"


def test_offsets_leave_out_what_the_tokenizer_put_before_the_prompt() -> None:
    assert _offsets([b"<s>", b" Once", b" upon"], "Once upon") == [0, 0, 4]
    assert _offsets([b"On", b"ce"], "Once") == [0, 2]
    assert _offsets([b"\xf0\x9f", b"\xa6\x8a", b"x"], "🦊x") == [0, 0, 1]
    assert _offsets([b"ab", b"cd"], "a") == [0, 0], "what is shown was shortened before: within it"


def test_one_token_is_whole_at_once() -> None:
    scored = ScoredPrompt(IDS[:1], PromptForms(listed=3, echoed=1), loaded_text(), "Once")
    assert scored.is_whole and scored.listed == b"[null]"
    assert lists_of(scored)["values"] == [None] and lists_of(scored)["tops"] == [None]


@pytest.mark.parametrize(("first", "end", "num_top"), [(2, 4, 2), (1, len(IDS), 1)])
def test_parts_that_are_not_the_next_are_refused(first: int, end: int, num_top: int) -> None:
    scored = ScoredPrompt(IDS, PromptForms(listed=2), loaded_text())
    with pytest.raises(WireError, match="were to come") as refusal:
        scored.take(0, packed(scores(first, end, num_top)))
    assert refusal.value.code == "bad_prompt_scores" and not scored.is_whole


def test_more_tokens_than_the_prompt_has_are_refused() -> None:
    scored = ScoredPrompt(IDS[:3], PromptForms(listed=2), loaded_text())
    with pytest.raises(WireError, match="tokens 1 to 3 with 2"):
        scored.take(0, packed(scores(1, 4)))


def test_a_later_attempt_begins_anew_and_an_earlier_ones_are_void() -> None:
    scored = ScoredPrompt(IDS, PromptForms(listed=1), loaded_text())
    scored.take(0, packed(replace(scores(1, 3), own_T=np.array([-9.0, -9.0]))))
    scored.take(2, packed(scores(1, len(IDS))))
    scored.write()
    assert json.loads(scored.listed)[1][str(IDS[1])]["logprob"] == -1.0
