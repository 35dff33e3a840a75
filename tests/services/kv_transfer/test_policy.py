"""Grants, replacement, looking again and pacing, at their edges."""

from __future__ import annotations

import pytest

from services.kv_transfer import policy


@pytest.mark.parametrize(
    ("num_free", "want", "num_slots", "granted"),
    [(32, 4, 32, 4), (32, 63, 32, 16), (3, 63, 32, 3), (0, 1, 32, 0), (1, 5, 1, 1), (2, 2, 3, 1)],
)
def test_slots_to_grant(num_free: int, want: int, num_slots: int, granted: int) -> None:
    assert policy.slots_to_grant(num_free, want, num_slots) == granted


def test_a_ring_is_replaced_when_over_a_quarter_stays_in_quarantine() -> None:
    assert not policy.is_crowded(8, 32) and policy.is_crowded(9, 32)
    assert not policy.is_crowded(0, 1) and policy.is_crowded(1, 1)
    assert not policy.must_replace_ring(None, 99.0)
    assert not policy.must_replace_ring(10.0, 11.9) and policy.must_replace_ring(10.0, 12.0)
    assert policy.may_open_ring(policy.MAX_RETIRED_RINGS - 1) and not policy.may_open_ring(policy.MAX_RETIRED_RINGS)


def test_looks_come_at_doubling_intervals() -> None:
    look, now_s, waits = None, 10.0, []
    for _ in range(7):
        look = policy.look_again(look, now_s)
        waits.append(round(look.next_s - now_s, 4))
        now_s = look.next_s
    assert waits == [0.001, 0.002, 0.004, 0.008, 0.016, 0.016, 0.016] and look is not None and look.since_s == 10.0


def test_corrupt_only_after_time_for_bytes_under_way() -> None:
    look = policy.Look(failures=3, since_s=10.0, next_s=10.01)
    assert not policy.is_corrupt(look, announced_s=10.0, now_s=10.04)
    assert policy.is_corrupt(look, announced_s=10.0, now_s=10.051)
    assert not policy.is_corrupt(look, announced_s=10.4, now_s=10.44), "counts from the announcement"
    assert not policy.is_corrupt(look, announced_s=None, now_s=10.4) and policy.is_corrupt(look, announced_s=None, now_s=10.5)
    first = policy.Look(failures=1, since_s=10.0, next_s=10.0)
    assert not policy.is_corrupt(first, announced_s=0.0, now_s=99.0), "one look is not enough"


def test_pacing_keeps_the_rate_and_forgives_no_idle_time_in_advance() -> None:
    assert policy.paced_until_s(5.0, 7.0, 1000, 0.0) == 7.0
    assert policy.paced_until_s(5.0, 7.0, 1000, 500.0) == 9.0
    assert policy.paced_until_s(9.0, 7.0, 1000, 500.0) == 11.0


def test_poll_delay_grows_with_the_wait() -> None:
    assert [policy.poll_delay_s(waited_s, is_seen_there=False) for waited_s in (0.0, 0.001, 3.0)] == [0.00002, 0.000125, 0.0005]
    assert policy.poll_delay_s(0.0) == 0.0005 and policy.poll_delay_s(0.01) == 0.001 and policy.poll_delay_s(3.0) == 0.002
