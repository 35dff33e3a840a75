"""Owns how long this replica's steps take now: the median of the last ones. Knows no step's content."""

from __future__ import annotations

from collections import deque
from typing import Final

NUM_STEPS: Final = 15


class StepPace:
    """From one applied step to the next while sequences run, whatever lies between (prefill's pieces on one thread): what they wait."""

    def __init__(self) -> None:
        self._steps_s: deque[float] = deque(maxlen=NUM_STEPS)
        self._last_s: float | None = None

    @property
    def step_s(self) -> float:
        """0 while none is known."""
        return sorted(self._steps_s)[len(self._steps_s) // 2] if self._steps_s else 0.0

    def stepped(self, now_s: float, *, goes_on: bool) -> None:
        """A step was applied. goes_on: sequences are left, so that the next follows at once."""
        if self._last_s is not None:
            self._steps_s.append(now_s - self._last_s)
        self._last_s = now_s if goes_on else None
