"""How long steps take: the median of the last, and no pause counts."""

from __future__ import annotations

from duomo.config import DecodeSection
from services.decode.pace import NUM_STEPS, StepPace


def test_the_median_of_the_last_steps_and_no_pause() -> None:
    pace = StepPace(DecodeSection())
    assert pace.step_s == 0.0
    pace.stepped(1.0, num_rows=2, goes_on=True)
    assert pace.step_s == 0.0, "nothing ran before it"
    for number in range(1, 4):
        pace.stepped(1.0 + 0.02 * number, num_rows=2, goes_on=number < 3)
    assert round(pace.step_s, 6) == 0.02
    pace.stepped(100.0, num_rows=2, goes_on=True)
    assert round(pace.step_s, 6) == 0.02, "nothing ran for 99 seconds"
    for number in range(1, NUM_STEPS + 1):
        pace.stepped(100.0 + 0.05 * number, num_rows=2, goes_on=True)
    assert round(pace.step_s, 6) == 0.05
    pace.stepped(200.0, num_rows=2, goes_on=True)
    assert round(pace.step_s, 6) == 0.05, "one that took long is no pace"


def test_the_batch_is_bounded_where_a_limit_is_set_and_by_steps_alone() -> None:
    assert StepPace(DecodeSection()).max_choices is None
    pace = StepPace(DecodeSection(max_itl_s=0.05, max_batch=8))
    assert pace.max_choices == 1
    for number in range(40):
        pace.stepped(0.02 * number, num_rows=1, goes_on=True)
    assert pace.max_choices == 2
    for number in range(40):
        pace.stepped(100.0 * number, num_rows=2, goes_on=False)
    assert pace.max_choices == 2, "pauses are no steps"
