"""How many sequences run so that their steps keep a limit: found from below, held, found again when contexts or the machine change."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.decode.batch_bound import KNOWN_STEPS, RETRY_STEPS, BatchBound


def mixture(fixed_s: float, expert_s: float, experts: int = 128, active: int = 8) -> Callable[[int], float]:
    """A step that reads each expert once: what the floor of a mixture's decode step grows like."""
    return lambda rows: fixed_s + expert_s * experts * (1 - (1 - active / experts) ** rows)


def busy(bound: BatchBound, took: Callable[[int], float], num_steps: int, most: int = 64) -> list[int]:
    """As many run as may, and as come."""
    sizes = []
    for _ in range(num_steps):
        sizes.append(min(bound.max_rows, most))
        bound.stepped(sizes[-1], took(sizes[-1]))
    return sizes


def largest(took: Callable[[int], float], limit_s: float, max_batch: int) -> int:
    return max((rows for rows in range(1, max_batch + 1) if took(rows) <= limit_s), default=1)


def test_nothing_known_is_one() -> None:
    bound = BatchBound(0.01, 64)
    assert bound.max_rows == 1
    for _ in range(KNOWN_STEPS - 1):
        bound.stepped(1, 0.003)
    assert bound.max_rows == 1, "too few to tell"
    bound.stepped(1, 0.003)
    assert bound.max_rows == 2


def test_sizes_are_tried_from_below_and_none_that_would_take_too_long() -> None:
    took = mixture(0.0015, 0.00022)  # 3.3, 5.0, 6.5, 8.0 ms
    sizes = busy(BatchBound(0.0077, 64), took, 1000)
    assert sizes[-1] == 3 == largest(took, 0.0077, 64) and max(sizes) == 3 and sizes == sorted(sizes)


@given(st.floats(0.0005, 0.005), st.floats(0.00005, 0.0005), st.floats(0.001, 0.05), st.integers(1, 256))
def test_what_keeps_the_limit_is_found_and_hardly_any_step_is_above_it(
    fixed_s: float, expert_s: float, limit_s: float, max_batch: int
) -> None:
    took = mixture(fixed_s, expert_s)
    sizes = busy(BatchBound(limit_s, max_batch), took, RETRY_STEPS - 1, most=256)
    assert largest(took, 0.8 * limit_s, max_batch) <= sizes[-1] <= largest(took, limit_s, max_batch)
    over = [size for size in sizes if took(size) > limit_s]
    assert took(1) > limit_s or (set(over) <= {2} and len(over) <= KNOWN_STEPS), "nobody knows of one what two take; else none is"


def test_a_few_slow_steps_are_forgiven_and_many_are_not() -> None:
    for every, size in ((20, 4), (4, 1)):
        turns = itertools.count()

        def took(rows: int, every: int = every, turns: Iterator[int] = turns) -> float:
            return 0.002 * rows + (0.02 if next(turns) % every == 0 else 0.0)

        assert busy(BatchBound(0.010, 4), took, 1500)[-1] == size


def test_longer_contexts_take_it_back_and_shorter_ones_are_found() -> None:
    bound = BatchBound(0.010, 16)
    short, long = mixture(0.001, 0.0001), mixture(0.004, 0.0002)
    assert busy(bound, short, 1000)[-1] == 16
    kept = largest(long, 0.010, 16)
    assert busy(bound, long, 200)[-1] == kept < 16
    assert busy(bound, short, RETRY_STEPS + 1000)[-1] == 16


def test_a_burst_that_runs_above_the_bound_teaches_nothing_false() -> None:
    bound = BatchBound(0.010, 16)
    took = mixture(0.001, 0.0003)
    kept = largest(took, 0.010, 16)
    for rows in (1, 2, kept, kept + 1, kept + 4, kept + 2, 16, kept + 1):
        for _ in range(KNOWN_STEPS):
            bound.stepped(rows, took(rows))
        assert bound.max_rows <= max(kept, 2 if rows == 1 else kept)
    assert busy(bound, took, RETRY_STEPS + 500)[-1] == kept


@pytest.mark.parametrize("max_batch", [1, 3])
def test_a_limit_that_nothing_keeps_lets_one_run(max_batch: int) -> None:
    bound = BatchBound(0.001, max_batch)
    assert set(busy(bound, mixture(0.002, 0.0002), 500)) == {1}


def test_what_took_too_long_is_tried_again_ever_later() -> None:
    bound, took = BatchBound(0.010, 8), {1: 0.008, 2: 0.012}
    tried_at = [number for number, size in enumerate(busy(bound, lambda rows: took[rows], 20 * RETRY_STEPS)) if size == 2]
    begun = [at for at in tried_at if at - 1 not in tried_at]
    pauses = [(later - earlier) // RETRY_STEPS for earlier, later in itertools.pairwise(begun)]
    assert pauses == [1, 2, 4, 8] and len(tried_at) == len(begun) * KNOWN_STEPS
    took[2] = 0.009
    assert busy(bound, lambda rows: took.get(rows, 0.011), 17 * RETRY_STEPS)[-1] == 2
