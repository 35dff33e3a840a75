"""Random numbers: pinned, uniform, and different for every counter."""

from __future__ import annotations

import itertools

from duomo.engine.randomness import uniform

PINNED = [0.13870941014555427, 0.6935121390102292, 0.5803592313314876, 0.2582654469187293]


def test_pinned() -> None:
    # a resumed or replayed request must draw the same numbers after an upgrade
    assert [uniform(0, 0, 0), uniform(1, 0, 0), uniform(0, 1, 0), uniform(0, 0, 1)] == PINNED
    assert len({uniform(*counter) for counter in itertools.product(range(9), repeat=3)}) == 9**3  # no two counters are one
    assert uniform(-1, 0, 5) == uniform(2**64 - 1, 0, 5)


def test_uniform_over_positions_choices_and_seeds() -> None:
    for draws in (
        [uniform(7, 0, i) for i in range(20000)],
        [uniform(7, i, 3) for i in range(20000)],
        [uniform(i, 0, 3) for i in range(20000)],
    ):
        assert len(set(draws)) == 20000 and min(draws) >= 0 and max(draws) < 1
        for bin_idx in range(10):
            share = sum(bin_idx <= draw * 10 < bin_idx + 1 for draw in draws)
            assert abs(share - 2000) < 5 * (2000 * 0.9) ** 0.5  # five standard deviations of a binomial
