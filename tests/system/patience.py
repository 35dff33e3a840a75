"""Owns how long a test looks for what must come. Knows no system."""

from __future__ import annotations

import time

LOOK_S = 0.03  # what a look takes at most on a machine that has time for it


class Patience:
    """A limit in seconds, spent by looking again and again: of the time between two looks LOOK_S counts at most.

    A machine that stands still, or is so busy that a look takes longer, uses none of it up: a promised second is not refused to a product
    that had no core for it. Where looks come in time the limit is the clock's.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self.spent_s = 0.0
        self._looked_s = time.monotonic()

    def is_over(self) -> bool:
        """Call once a look."""
        now_s = time.monotonic()
        self.spent_s += min(now_s - self._looked_s, LOOK_S)
        self._looked_s = now_s
        return self.spent_s >= self.limit_s
