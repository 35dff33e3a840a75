"""Owns how long this replica's steps take now, the median of the last ones, and how many sequences keep decode.max_itl_s. Knows no step's
content."""

from __future__ import annotations

from collections import deque
from typing import Final

from duomo.config import DecodeSection
from services.decode.batch_bound import BatchBound

NUM_STEPS: Final = 15


class StepPace:
    """From one applied step to the next while sequences run, whatever lies between (prefill's pieces on one thread): what they wait."""

    def __init__(self, section: DecodeSection) -> None:
        self._steps_s: deque[float] = deque(maxlen=NUM_STEPS)
        self._last_s: float | None = None
        self._bound = None if section.max_itl_s is None else BatchBound(section.max_itl_s, section.max_batch)

    @property
    def step_s(self) -> float:
        """0 while none is known."""
        return sorted(self._steps_s)[len(self._steps_s) // 2] if self._steps_s else 0.0

    @property
    def max_choices(self) -> int | None:
        """How many should run here for decode.max_itl_s to be kept; None where none is set."""
        return None if self._bound is None else self._bound.max_rows

    def stepped(self, now_s: float, *, num_rows: int, goes_on: bool) -> None:
        """A step of so many sequences was applied. goes_on: some are left, so that the next follows at once."""
        if self._last_s is not None:
            self._steps_s.append(now_s - self._last_s)
            if self._bound is not None:
                self._bound.stepped(num_rows, now_s - self._last_s)
        self._last_s = now_s if goes_on else None
