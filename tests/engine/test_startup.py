"""Phases of a start."""

from __future__ import annotations

import itertools

import pytest

from duomo.engine.startup import NOTE_PERIOD_S, StartPhase, Startup


def test_phases_are_told_in_order_as_they_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = itertools.count(100.0, 0.5)
    monkeypatch.setattr("duomo.engine.startup.time.monotonic", lambda: next(now_s))
    told: list[StartPhase] = []
    startup = Startup(told.append)
    with startup.phase("weights"):
        assert not told
    with startup.phase("capture"):
        pass
    assert [phase.name for phase in told] == ["weights", "capture"] and told == startup.phases
    assert all(phase.duration_s >= 0 for phase in told) and told[0].ended_s <= told[1].started_s
    assert startup.line().startswith("weights 0.5 s, capture 0.5 s")


def test_a_phase_that_fails_is_told_too() -> None:
    startup = Startup()
    with pytest.raises(ValueError, match="no such file"), startup.phase("weights"):
        raise ValueError("no such file")
    assert [phase.name for phase in startup.phases] == ["weights"]


def test_lines_for_people_come_where_something_begins_and_at_a_bounded_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr("duomo.engine.startup.time.monotonic", lambda: now_s)
    lines: list[str] = []
    startup = Startup(noted=lines.append)
    startup.count(1, 2)  # in no phase: a loader that is used by itself
    with startup.phase("weights"):
        for done in range(1, 1025):
            now_s += NOTE_PERIOD_S / 512
            startup.count(done, 1024)
    with startup.phase("capture"):
        startup.part("waves")
    assert lines[0] == "weights" and lines[-2:] == ["capture", "capture: waves"]
    assert lines[1:-2] == ["weights: 50% (512 of 1,024)", "weights: 100% (1,024 of 1,024)"]
