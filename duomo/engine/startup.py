"""Owns the phases of an engine's start: their names, when they began and ended. Knows no engine; spans and logs are their reader's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Literal

NOTE_PERIOD_S: Final = 2.0

PhaseName = Literal["import", "weights", "profile", "capture"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StartPhase:
    """One phase that is over; monotonic."""

    name: PhaseName
    started_s: float
    ended_s: float

    @property
    def duration_s(self) -> float:
        return self.ended_s - self.started_s


class Startup:
    """Phases one after another. told: called with each as it ends, also where it ends by an exception.

    noted: called with one line for people where a phase begins, comes to another part, or has counted on, which is told every NOTE_PERIOD_S
    at most. Both are called by the thread that starts.
    """

    def __init__(self, told: Callable[[StartPhase], None] | None = None, noted: Callable[[str], None] | None = None) -> None:
        self.phases: list[StartPhase] = []
        self._told = told
        self._noted = noted
        self._running: PhaseName | None = None
        self._counted_s = 0.0

    @contextmanager
    def phase(self, name: PhaseName) -> Iterator[None]:
        """What runs inside is this phase."""
        started_s = self._counted_s = time.monotonic()
        self._running = name
        self._note(name)
        try:
            yield
        finally:
            self._running = None
            done = StartPhase(name=name, started_s=started_s, ended_s=time.monotonic())
            self.phases.append(done)
            if self._told is not None:
                self._told(done)

    def part(self, what: str) -> None:
        """The phase has come to this part of it."""
        assert self._running is not None, "a part of no phase"
        self._note(f"{self._running}: {what}")

    def count(self, num_done: int, num_all: int) -> None:
        """The phase has done so many of so many. Cheap: may be called for each."""
        now_s = time.monotonic()
        if self._running is None or now_s - self._counted_s < NOTE_PERIOD_S:
            return
        self._counted_s = now_s
        self._note(f"{self._running}: {100 * num_done // max(num_all, 1)}% ({num_done:,} of {num_all:,})")

    def _note(self, line: str) -> None:
        if self._noted is not None:
            self._noted(line)

    def line(self) -> str:
        """For people: every phase and its seconds."""
        return ", ".join(f"{phase.name} {phase.duration_s:.1f} s" for phase in self.phases)
