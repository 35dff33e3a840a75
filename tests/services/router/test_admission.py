"""The pure decisions: admit, queue or refuse a new request; place, keep or give up whoever leads the line."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.router.admission import (
    CAUTION,
    MAX_RETRY_S,
    MIN_RETRY_S,
    Admit,
    LineView,
    PoolsView,
    Queue,
    Refuse,
    Terms,
    decide,
    first_token_s,
    never_fits,
    place,
    retry_s,
)
from services.router.policy import DecodeView, Need, PrefillView, Route, has_decode_room
from services.router.prefix_index import PrefixIndex

P = PrefillView(key="p", queued_tokens=0, room_tokens=0, num_blocks=64, block_tokens=16, wave_tokens=512, max_queued_tokens=4096)
D = DecodeView(key="d", free_blocks=32, num_blocks=32, block_tokens=16, watermark_blocks=4, num_choices=0, max_choices=16)
FULL = replace(D, free_blocks=5, num_choices=3)
NEED = Need(num_tokens=60, new_tokens=60, num_choices=1, ahead_tokens=256)
TERMS = Terms(left_s=300.0)
LINE = LineView(max_waiting=3)


def _pools(prefills: tuple = (P,), decodes: tuple = (D,), answer_tokens: float = 0.0) -> PoolsView:
    return PoolsView(prefills=prefills, decodes=decodes, answer_tokens=answer_tokens)


def test_room_admits_and_a_line_or_no_room_queues() -> None:
    decision = decide(NEED, _pools(), LINE, TERMS)
    assert isinstance(decision, Admit) and (decision.route.decode, decision.route.num_blocks) == ("d", 8)
    assert isinstance(decide(NEED, _pools(), replace(LINE, num_waiting=1), TERMS), Queue), "those that wait go first"
    assert isinstance(decide(NEED, _pools(decodes=(FULL,)), LINE, TERMS), Queue)


def test_a_full_line_is_429_with_retry_after_unless_the_last_goes() -> None:
    full = replace(LINE, num_waiting=3)
    decision = decide(NEED, _pools(), full, TERMS)
    assert isinstance(decision, Refuse) and (decision.status, decision.code) == (429, "queue_full") and decision.retry_after_s > 0
    assert isinstance(decide(NEED, _pools(), replace(full, may_displace=True), TERMS), Queue)


def test_replicas_that_are_too_old_are_not_there_for_who_asks_more() -> None:
    need, old_p, old_d = replace(NEED, wire_version=9), replace(P, key="old p", wire_version=8), replace(D, key="old d", wire_version=8)
    new_p, new_d = replace(P, key="new p", wire_version=9), replace(D, key="new d", wire_version=10)
    admitted = decide(need, _pools((old_p, new_p), (old_d, new_d)), LINE, TERMS)
    assert isinstance(admitted, Admit) and (admitted.route.prefill, admitted.route.decode) == ("new p", "new d")
    placed = place(need, _pools((old_p, new_p), (old_d, new_d)), frozenset({"new p", "new d"}), None)
    assert isinstance(placed, Route) and (placed.prefill, placed.decode) == ("new p", "new d"), "failed ones are better than old ones"
    busy = replace(new_d, free_blocks=5, num_choices=3)
    assert isinstance(decide(need, _pools((old_p, new_p), (old_d, busy)), LINE, TERMS), Queue)
    assert place(need, _pools((old_p, new_p), (old_d, busy)), frozenset(), TERMS) is None
    small = replace(new_p, num_blocks=2)
    never = decide(need, _pools((old_p, small), (new_d,)), LINE, TERMS)
    assert isinstance(never, Refuse) and never.code == "never_fits", "where an older one is larger, too"
    for pools, name in ((_pools((old_p,), (new_d,)), "prefill"), (_pools((new_p,), (old_d, replace(new_d, is_open=False))), "decode")):
        for decision in (decide(need, pools, LINE, TERMS), place(need, pools, frozenset(), TERMS), place(need, pools, frozenset(), None)):
            assert isinstance(decision, Refuse) and (decision.status, decision.code) == (503, "peer_too_old")
            assert decision.detail == f"No {name} replica that takes requests is new enough to know all that was asked (wire version 9)."
    assert isinstance(decide(NEED, _pools((old_p,), (old_d,)), LINE, TERMS), Admit)


def test_a_missing_pool_is_503_and_says_which() -> None:
    assert decide(NEED, _pools(prefills=()), LINE, TERMS).code == "no_prefill_replica"
    assert decide(NEED, _pools(decodes=(replace(D, is_open=False),)), LINE, TERMS).code == "no_decode_replica"
    assert decide(NEED, _pools(decodes=()), LINE, TERMS).status == 503


@pytest.mark.parametrize(
    ("need", "fits"),
    [
        (Need(num_tokens=500, new_tokens=12, num_choices=1, ahead_tokens=256), True),
        (Need(num_tokens=500, new_tokens=13, num_choices=1, ahead_tokens=256), False),
        (Need(num_tokens=10, new_tokens=600, num_choices=1, ahead_tokens=16), False),
        (Need(num_tokens=16, new_tokens=16, num_choices=31, ahead_tokens=16), True),
        (Need(num_tokens=16, new_tokens=16, num_choices=32, ahead_tokens=16), False),
    ],
)
def test_what_never_fits_an_empty_pool_is_400_with_the_limit(need: Need, fits: bool) -> None:
    decision = decide(need, _pools(), LINE, TERMS)
    assert isinstance(decision, Admit) == fits
    if not fits:
        assert (decision.status, decision.code) == (400, "never_fits") and "512 tokens" in decision.detail
        assert (place(need, _pools(), frozenset(), None).status) == 503, "in line it fitted: the pool has changed"


def test_a_prompt_beyond_the_prefill_pool_never_fits() -> None:
    need = Need(num_tokens=1025, new_tokens=1, num_choices=1, ahead_tokens=1)
    assert "1024" in (never_fits(need, (P,), (replace(D, num_blocks=500),)) or "")


def test_what_prefill_could_not_compute_again_is_not_begun_and_not_given_up() -> None:
    need = Need(num_tokens=100, new_tokens=1000, num_choices=1, ahead_tokens=16)
    large = replace(D, num_blocks=500)
    refused = decide(need, _pools(decodes=(large,)), LINE, TERMS)
    assert isinstance(refused, Refuse) and refused.status == 400 and "at most 1024 tokens" in refused.detail
    assert isinstance(decide(replace(need, new_tokens=925), _pools(decodes=(large,)), LINE, TERMS), Admit), (
        "all but the last is computed again"
    )
    assert isinstance(place(need, _pools(decodes=(large,)), frozenset(), None), Route), "one that runs may end long before"


def test_the_first_token_is_predicted_from_what_prefill_has_to_do() -> None:
    idle = replace(P, tokens_per_s=1000.0)
    assert first_token_s(NEED, _pools(prefills=(idle,)), LINE) == pytest.approx(0.06)
    assert first_token_s(NEED, _pools(prefills=(replace(idle, wave_s=0.2),)), LINE) == pytest.approx(0.2), "no wave is quicker"
    index = PrefixIndex(64)
    index.told((2,))
    known = replace(NEED, digests=(1, 2, 3))
    assert first_token_s(known, _pools(prefills=(replace(idle, prefixes=index),)), LINE) == pytest.approx(0.028), "32 tokens are known"
    fast, slow = replace(idle, queued_tokens=500), replace(P, key="q", tokens_per_s=100.0, queued_tokens=20)
    assert first_token_s(NEED, _pools(prefills=(fast,)), LINE) == pytest.approx(0.5 + 0.512), "others come into its wave"
    assert first_token_s(NEED, _pools(prefills=(fast, slow)), LINE) == pytest.approx(0.2 + 0.8)
    line = replace(LINE, num_waiting=2, work_tokens=1680)
    assert first_token_s(NEED, _pools(prefills=(fast, slow)), line) == pytest.approx(2200 / 1100 + 0.512), "all of it, by all of them"
    assert first_token_s(NEED, _pools(), line) == 0.0, "nothing was measured: nothing is said"


def test_the_first_token_is_predicted_from_when_decode_has_room() -> None:
    running = replace(D, free_blocks=4, num_choices=4, step_s=0.01)
    pools = _pools(decodes=(running,), answer_tokens=100.0)
    assert first_token_s(NEED, pools, LINE) == pytest.approx(1 / 4), "8 blocks are one choice's; 4 choices end a second"
    line = replace(LINE, num_waiting=2, num_choices=2, num_blocks=16)
    assert first_token_s(NEED, pools, line) == pytest.approx(3 / 4)
    crowded = replace(running, free_blocks=32, num_choices=16)
    assert first_token_s(NEED, _pools(decodes=(crowded,), answer_tokens=100.0), LINE) == pytest.approx(1 / 16), "the batch is full"
    assert first_token_s(NEED, _pools(decodes=(D,), answer_tokens=100.0), LINE) == 0.0
    assert first_token_s(NEED, _pools(decodes=(running,)), LINE) == 0.0, "how long answers are is not known"


def test_what_would_come_too_late_is_refused_at_once_and_told_when_to_come_back() -> None:
    busy = replace(P, tokens_per_s=100.0, queued_tokens=1000)
    decision = decide(NEED, _pools(prefills=(busy,)), LINE, Terms(left_s=4.0, limit="the limit"))
    assert isinstance(decision, Refuse) and (decision.status, decision.code) == (429, "too_late")
    assert decision.retry_after_s == pytest.approx(15.12 * CAUTION - 4.0) and "15.1 s" in decision.detail and "the limit" in decision.detail
    assert isinstance(decide(NEED, _pools(prefills=(busy,)), LINE, Terms(left_s=18.0)), Admit)
    late = place(NEED, _pools(prefills=(busy,)), frozenset(), Terms(left_s=4.0))
    assert isinstance(late, Refuse) and late.status == 429
    assert isinstance(place(NEED, _pools(prefills=(busy,)), frozenset(), None), Route), "what was running goes on, late or not"
    assert place(NEED, _pools(decodes=(FULL,)), frozenset(), TERMS) is None


@given(
    queued=st.integers(0, 10**6),
    tokens_per_s=st.floats(0, 10**6, allow_nan=False),
    step_s=st.floats(0, 1, allow_nan=False),
    waiting=st.integers(0, 5),
    free=st.integers(0, 32),
    left_s=st.floats(-10, 1000, allow_nan=False),
    answer_tokens=st.floats(0, 1000, allow_nan=False),
)
def test_every_refusal_says_when_and_nothing_else_is_kept_waiting_past_its_time(
    queued: int, tokens_per_s: float, step_s: float, waiting: int, free: int, left_s: float, answer_tokens: float
) -> None:
    prefill = replace(P, queued_tokens=queued, tokens_per_s=tokens_per_s)
    decode = replace(D, free_blocks=free, num_choices=1, step_s=step_s)
    pools = _pools((prefill,), (decode,), answer_tokens)
    line = LineView(num_waiting=waiting, max_waiting=3, work_tokens=60 * waiting, num_blocks=8 * waiting, num_choices=waiting)
    decision = decide(NEED, pools, line, Terms(left_s=left_s))
    is_idle = waiting == 0 and queued == 0 and has_decode_room(decode, NEED)  # then it begins at once, whatever was measured
    expected_s = 0.0 if is_idle else first_token_s(NEED, pools, line)
    if isinstance(decision, Refuse):
        assert decision.status == 429 and MIN_RETRY_S <= decision.retry_after_s <= MAX_RETRY_S
        assert decision.code == ("too_late" if CAUTION * expected_s > left_s else "queue_full")
    else:
        assert CAUTION * expected_s <= left_s
        assert isinstance(decision, Queue) or waiting == 0


def test_an_idle_pool_turns_nothing_away_for_what_it_measured_on_other_prompts() -> None:
    slow = replace(P, tokens_per_s=0.001)
    assert isinstance(decide(NEED, _pools(prefills=(slow,)), LINE, Terms(left_s=4.0)), Admit)
    assert isinstance(place(NEED, _pools(prefills=(slow,)), frozenset(), Terms(left_s=4.0)), Route)
    assert isinstance(decide(NEED, _pools(prefills=(slow,)), LINE, Terms(left_s=-0.1)), Refuse), "its time is over"


def test_a_replica_that_has_just_begun_counts_as_fast_as_the_others() -> None:
    busy, new = replace(P, tokens_per_s=100.0, queued_tokens=1000), replace(P, key="q", queued_tokens=50)
    assert first_token_s(NEED, _pools(prefills=(busy, new)), LINE) < 2.0 < first_token_s(NEED, _pools(prefills=(busy,)), LINE)
    assert isinstance(decide(NEED, _pools(prefills=(busy, new)), LINE, Terms(left_s=4.0)), Admit)


def test_retry_after_is_bounded() -> None:
    assert (retry_s(-3.0), retry_s(5.0), retry_s(1e9)) == (MIN_RETRY_S, 5.0, MAX_RETRY_S)


def test_who_fits_only_a_replica_that_drains_is_told_to_come_back_and_holds_up_nobody() -> None:
    need = Need(num_tokens=100, new_tokens=900, num_choices=1, ahead_tokens=16)
    drains = replace(D, key="large", num_blocks=500, is_open=False)
    at_door = decide(need, _pools(decodes=(D, drains)), LINE, TERMS)
    assert isinstance(at_door, Refuse) and (at_door.status, at_door.code) == (503, "never_fits") and at_door.retry_after_s
    for terms in (TERMS, None):
        refused = place(need, _pools(decodes=(D, drains)), frozenset(), terms)
        assert isinstance(refused, Refuse) and refused.status == 503, "it is set aside or told, and the next in line is looked at"
    assert isinstance(place(need, _pools(decodes=(D, replace(drains, is_open=True))), frozenset(), None), Route)
    long = Need(num_tokens=900, new_tokens=1, num_choices=1, ahead_tokens=1)
    small = replace(P, key="small", num_blocks=8)
    refused = decide(long, _pools(prefills=(small, replace(P, is_open=False)), decodes=(replace(D, num_blocks=500),)), LINE, TERMS)
    assert isinstance(refused, Refuse) and refused.status == 503 and "prefill pool" in refused.detail
