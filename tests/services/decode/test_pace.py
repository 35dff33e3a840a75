"""How long steps take: the median of the last, and no pause counts."""

from __future__ import annotations

from services.decode.pace import NUM_STEPS, StepPace


def test_the_median_of_the_last_steps_and_no_pause() -> None:
    pace = StepPace()
    assert pace.step_s == 0.0
    pace.stepped(1.0, goes_on=True)
    assert pace.step_s == 0.0, "nothing ran before it"
    for number in range(1, 4):
        pace.stepped(1.0 + 0.02 * number, goes_on=number < 3)
    assert round(pace.step_s, 6) == 0.02
    pace.stepped(100.0, goes_on=True)
    assert round(pace.step_s, 6) == 0.02, "nothing ran for 99 seconds"
    for number in range(1, NUM_STEPS + 1):
        pace.stepped(100.0 + 0.05 * number, goes_on=True)
    assert round(pace.step_s, 6) == 0.05
    pace.stepped(200.0, goes_on=True)
    assert round(pace.step_s, 6) == 0.05, "one that took long is no pace"
