"""What a first token means for its choice, and what gateway and D are told."""

from __future__ import annotations

import pytest

from duomo.wire.messages import StartPrefill
from duomo.wire.values import PeerAddress, Sampling, Timings
from services.prefill.first_tokens import ChosenToken, decide, finish_reason

EOS = (2, 7)


@pytest.mark.parametrize(
    ("token_id", "index", "changes", "expected"),
    [
        (2, 0, {}, "stop"),
        (2, 0, {"ignore_eos": True}, None),
        (9, 0, {"ignore_eos": True, "stop_token_ids": (9,)}, "stop"),
        (9, 0, {"stop_token_ids": (9,), "min_tokens": 1}, None),
        (9, 1, {"stop_token_ids": (9,), "min_tokens": 1}, "stop"),
        (5, 0, {"max_tokens": 1}, "length"),
        (2, 0, {"max_tokens": 1}, "stop"),
        (5, 6, {"max_tokens": 8}, None),
        (5, 7, {"max_tokens": 8}, "length"),
    ],
)
def test_a_choice_ends_by_eos_stop_id_or_length_counted_over_all_attempts(
    token_id: int, index: int, changes: dict[str, object], expected: str | None
) -> None:
    sampling = Sampling(**({"max_tokens": 8} | changes))  # type: ignore[arg-type]  # Sampling's own fields
    assert finish_reason(token_id, index, sampling, EOS) == expected


def test_choices_taken_back_are_not_emitted_and_the_first_emitted_token_carries_the_timings() -> None:
    request = StartPrefill(
        request_id="r",
        attempt=1,
        traceparent="",
        remaining_s=1.0,
        prompt_ids=(1,),
        sampling=Sampling(max_tokens=8),
        choices=(3, 4, 5),
        decode=PeerAddress(replica_id="d", boot_id="b", address="unix:/d"),
    )
    chosen = (
        ChosenToken(token_id=11, logprob=None),
        ChosenToken(token_id=2, logprob=-0.5, top=((2, -0.5),)),
        ChosenToken(token_id=13, logprob=None),
    )
    first = decide(request, chosen, {3}, EOS, Timings(total_s=0.25))
    assert [(token.choice, token.token_id, token.finish_reason, token.attempt, token.index) for token in first.emitted] == [
        (4, 2, "stop", 1, 0),
        (5, 13, None, 1, 0),
    ]
    assert [token.timings is not None for token in first.emitted] == [True, False]
    assert first.emitted[0].logprob is not None and first.emitted[0].logprob.top == ((2, -0.5),) and first.emitted[1].logprob is None
    assert (first.first_token_ids, first.ended_choices) == ((11, 2, 13), (3, 4))
