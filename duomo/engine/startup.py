"""Owns the phases of an engine's start: their names, when they began and ended. Knows no engine; spans and logs are their reader's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

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
    """Phases one after another. told: called with each as it ends, also where it ends by an exception."""

    def __init__(self, told: Callable[[StartPhase], None] | None = None) -> None:
        self.phases: list[StartPhase] = []
        self._told = told

    @contextmanager
    def phase(self, name: PhaseName) -> Iterator[None]:
        """What runs inside is this phase."""
        started_s = time.monotonic()
        try:
            yield
        finally:
            done = StartPhase(name=name, started_s=started_s, ended_s=time.monotonic())
            self.phases.append(done)
            if self._told is not None:
                self._told(done)

    def line(self) -> str:
        """For people: every phase and its seconds."""
        return ", ".join(f"{phase.name} {phase.duration_s:.1f} s" for phase in self.phases)
