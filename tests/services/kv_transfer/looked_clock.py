"""Owns a clock for tests that stands still with the machine: a stall between two looks at it counts as one short step. Knows no agent."""

from __future__ import annotations

import threading
import time

LONGEST_STEP_S = 0.01  # of what polls it: the writer thread looks this often at writes that are late


class LookedClock:
    """Monotonic seconds, of which a pause counts LONGEST_STEP_S at most. From any thread. ahead_s: what a test adds."""

    def __init__(self) -> None:
        self.ahead_s = 0.0
        self._lock = threading.Lock()
        self._looked_s, self._last_s = 0.0, time.monotonic()

    def __call__(self) -> float:
        with self._lock:
            now_s = time.monotonic()
            self._looked_s += min(now_s - self._last_s, LONGEST_STEP_S)
            self._last_s = now_s
            return self._looked_s + self.ahead_s
