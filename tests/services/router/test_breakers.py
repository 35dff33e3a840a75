"""Circuit breakers against their rule, step by step and under random histories."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.router.breakers import BreakerLimits, Breakers

LIMITS = BreakerLimits(num_failures=3, open_s=5.0, max_open_s=18.0)
LEG, PAIR = ("p0",), ("p0", "d0")


def opened(breakers: Breakers, key: tuple[str, ...] = LEG, now_s: float = 0.0) -> None:
    assert [breakers.failed(key, now_s) for _ in range(3)] == [False, False, True]


def test_failures_in_a_row_open_it_for_its_time() -> None:
    breakers = Breakers(LIMITS)
    opened(breakers)
    assert breakers.open_keys(4.9) == {LEG} and not breakers.open_keys(5.0)


def test_a_success_between_begins_the_count_anew() -> None:
    breakers = Breakers(LIMITS)
    for _ in range(9):
        breakers.failed(LEG, 0.0)
        breakers.failed(LEG, 0.0)
        breakers.succeeded(LEG)
    assert not breakers.open_keys(0.0)


def test_one_trial_at_a_time_closes_it_or_opens_it_for_twice_as_long() -> None:
    breakers = Breakers(LIMITS)
    opened(breakers)
    now_s, lengths = 0.0, []
    for length_s in (10.0, 18.0, 18.0):
        now_s += 60.0
        assert not breakers.open_keys(now_s)
        breakers.tried(LEG, now_s)
        assert breakers.open_keys(now_s) == {LEG}
        assert breakers.failed(LEG, now_s + 1.0)
        assert breakers.open_keys(now_s + 0.99 + length_s) == {LEG} and not breakers.open_keys(now_s + 1.0 + length_s)
        lengths.append(length_s)
    breakers.tried(LEG, now_s + 60.0)
    breakers.succeeded(LEG)
    assert not breakers.open_keys(now_s + 60.0)
    opened(breakers, now_s=now_s + 60.0)
    assert not breakers.open_keys(now_s + 65.0)


def test_a_trial_that_never_ends_is_followed_by_another() -> None:
    breakers = Breakers(LIMITS)
    opened(breakers)
    breakers.tried(LEG, 6.0)
    assert breakers.open_keys(10.9) == {LEG} and not breakers.open_keys(11.0)


def test_what_was_on_its_way_when_it_opened_does_not_lengthen_it() -> None:
    breakers = Breakers(LIMITS)
    opened(breakers)
    assert not any(breakers.failed(LEG, 1.0) for _ in range(50))
    assert not breakers.open_keys(5.0)


def test_pairs_and_legs_are_apart_and_go_with_their_replica() -> None:
    breakers = Breakers(LIMITS)
    opened(breakers, PAIR)
    opened(breakers, LEG)
    opened(breakers, ("d1",))
    assert breakers.open_keys(0.0) == {PAIR, LEG, ("d1",)}
    breakers.forget("p0")
    assert breakers.open_keys(0.0) == {("d1",)}


@given(st.lists(st.tuples(st.sampled_from(["failed", "succeeded", "tried"]), st.floats(0, 30)), max_size=60))
def test_it_is_never_open_without_failures_nor_for_longer_than_its_limit(history: list[tuple[str, float]]) -> None:
    breakers, now_s, num_in_a_row = Breakers(LIMITS), 0.0, 0
    for kind, wait_s in history:
        now_s += wait_s
        getattr(breakers, kind)(*((LEG,) if kind == "succeeded" else (LEG, now_s)))
        num_in_a_row = num_in_a_row + 1 if kind == "failed" else 0 if kind == "succeeded" else num_in_a_row
        assert not breakers.open_keys(now_s) or num_in_a_row >= LIMITS.num_failures
        assert not breakers.open_keys(now_s + LIMITS.max_open_s)
