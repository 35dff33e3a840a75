"""What a group costs by what was measured: between, beyond and below the points, medians, and a curve that never falls."""

from __future__ import annotations

import random

import pytest

from services.prefill.wave_costs import SAMPLES_PER_BUCKET, GroupCosts


def costs_of(*measured: tuple[int, int, float]) -> GroupCosts:
    costs = GroupCosts()
    for num_tokens, num_groups, seconds in measured:
        costs.observe(num_tokens, num_groups, seconds)
    return costs


def test_nothing_is_known_at_first() -> None:
    assert GroupCosts().curve.group_s(100) is None and GroupCosts().curve.at_most_s(100) is None


def test_between_points_beyond_and_below_them() -> None:
    curve = costs_of((100, 2, 0.004), (1000, 1, 0.011)).curve
    assert curve.group_s(100) == 0.002 and curve.group_s(1000) == 0.011
    assert curve.group_s(550) == pytest.approx(0.0065)
    assert curve.group_s(2000) == pytest.approx(0.022), "in proportion"
    assert curve.group_s(25) == pytest.approx(0.001), "the square root"
    assert curve.at_most_s(25) == 0.002 and curve.at_most_s(550) == curve.group_s(550)


def test_the_rate_and_the_smallest_wave() -> None:
    assert (costs_of().curve.rows_per_s(1000, 4), costs_of().curve.least_s(4)) == (0.0, 0.0)
    curve = costs_of((100, 1, 0.002), (1000, 2, 0.022)).curve
    assert curve.rows_per_s(1000, 4) == curve.rows_per_s(4000, 4) == pytest.approx(1000 / 0.044)
    assert curve.least_s(4) == pytest.approx(0.008)
    assert costs_of((16, 4, 0.0)).curve.rows_per_s(16, 4) == 0.0, "what takes no time tells no rate"


def test_a_hiccup_changes_nothing_and_a_lasting_change_counts() -> None:
    costs = costs_of(*((256, 1, 0.001) for _ in range(SAMPLES_PER_BUCKET)))
    for _ in range(SAMPLES_PER_BUCKET // 2):
        costs.observe(256, 1, 1.0)
    assert costs.curve.group_s(256) == 0.001
    costs.observe(256, 1, 1.0)
    assert costs.curve.group_s(256) == 1.0


def test_the_curve_never_falls_and_the_table_stays_small_whatever_is_measured() -> None:
    draw = random.Random(3)
    costs = GroupCosts()
    for _ in range(3000):
        costs.observe(draw.randint(1, 131072), draw.randint(1, 16), draw.uniform(0, 0.1))
    points = costs.curve.points
    assert len(points) <= 36
    assert all(low[0] < high[0] and low[1] < high[1] for low, high in zip(points, points[1:], strict=False))
    seconds = [costs.curve.group_s(num_tokens) or 0.0 for num_tokens in range(1, 200_000, 97)]
    assert seconds == sorted(seconds)


def test_what_takes_no_time_can_be_measured() -> None:
    assert costs_of((16, 4, 0.0)).curve.group_s(16) == 0.0
