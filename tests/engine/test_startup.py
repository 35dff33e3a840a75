"""Phases of a start."""

from __future__ import annotations

import pytest

from duomo.engine.startup import StartPhase, Startup


def test_phases_are_told_in_order_as_they_end() -> None:
    told: list[StartPhase] = []
    startup = Startup(told.append)
    with startup.phase("weights"):
        assert not told
    with startup.phase("capture"):
        pass
    assert [phase.name for phase in told] == ["weights", "capture"] and told == startup.phases
    assert all(phase.duration_s >= 0 for phase in told) and told[0].ended_s <= told[1].started_s
    assert startup.line().startswith("weights 0.0 s, capture")


def test_a_phase_that_fails_is_told_too() -> None:
    startup = Startup()
    with pytest.raises(ValueError, match="no such file"), startup.phase("weights"):
        raise ValueError("no such file")
    assert [phase.name for phase in startup.phases] == ["weights"]
