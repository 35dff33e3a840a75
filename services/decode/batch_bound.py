"""PURE: owns how many sequences run in a step that keeps decode.max_itl_s, by what steps of each size took. Knows no clock and no
request.

What a size takes is the 80th percentile of its last steps. Sizes are tried from below, one more or a quarter more. Between two that are
known the time lies on a line; beyond the largest the line of the last two's medians goes on from there: what disturbs steps comes and goes,
and medians stay. A step of a mixture of experts grows ever less with each further sequence, so that line lies above what comes, and a size
that would take too long is hardly ever tried. Of one size alone nothing follows: the next is tried. What took too long is tried again after
RETRY_STEPS, and each time in vain twice as late.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

KNOWN_STEPS: Final = 32
KEPT_STEPS: Final = 128
SHARE: Final = 0.8
RETRY_STEPS: Final = 2000
MAX_RETRY_STEPS: Final = 16 * RETRY_STEPS


@dataclass(frozen=True, slots=True)
class _TooLong:
    """The least size that is known to take too long. seen_at: the last step of it; wait_steps: until it is tried again."""

    size: int
    seen_at: int
    wait_steps: int


@dataclass(frozen=True, slots=True)
class _Took:
    """half_s: the median of its last steps, seconds; most_s: what 4 of 5 of them stay within."""

    half_s: float
    most_s: float


class BatchBound:
    """max_itl_s: what 4 of 5 steps may take, seconds. max_batch: never more than that."""

    def __init__(self, max_itl_s: float, max_batch: int) -> None:
        self._max_itl_s, self._max_batch = max_itl_s, max_batch
        self._last_s: dict[int, deque[float]] = {}  # of each size
        self._took_s: dict[int, _Took] = {}  # of each size that is known
        self._too_long: _TooLong | None = None
        self._tried_again: _TooLong | None = None
        self._num_steps = 0

    def stepped(self, num_rows: int, step_s: float) -> None:
        """A step of so many sequences came so long after the one before, seconds."""
        self._num_steps += 1
        last_s = self._last_s.setdefault(num_rows, deque(maxlen=KEPT_STEPS))
        last_s.append(step_s)
        if len(last_s) >= KNOWN_STEPS:
            in_order = sorted(last_s)
            self._took_s[num_rows] = _Took(in_order[len(last_s) // 2], in_order[int(len(last_s) * SHARE)])
            self._judge(num_rows)
        if self._too_long is not None and self._num_steps - self._too_long.seen_at >= self._too_long.wait_steps:
            self._forget_from(self._too_long.size)
            self._too_long, self._tried_again = None, self._too_long

    def _judge(self, num_rows: int) -> None:
        """What larger sizes than one that takes too long once took says nothing any more."""
        known = self._too_long
        if known is not None and num_rows > known.size:
            return
        tried = self._tried_again
        if self._took_s[num_rows].most_s > self._max_itl_s:
            wait_steps = RETRY_STEPS
            if known is not None and num_rows == known.size:
                wait_steps = known.wait_steps
            elif tried is not None:
                wait_steps = min(2 * tried.wait_steps, MAX_RETRY_STEPS)
            self._forget_from(num_rows + 1)
            self._too_long, self._tried_again = _TooLong(num_rows, self._num_steps, wait_steps), None
        elif known is not None and num_rows == known.size:
            self._forget_from(num_rows + 1)
            self._too_long = None
        elif tried is not None and num_rows >= tried.size:
            self._tried_again = None

    def _forget_from(self, num_rows: int) -> None:
        self._last_s = {size: last_s for size, last_s in self._last_s.items() if size < num_rows}
        self._took_s = {size: took_s for size, took_s in self._took_s.items() if size < num_rows}

    @property
    def max_rows(self) -> int:
        """1 to max_batch. 1 while nothing is known."""
        limit = self._max_batch + 1 if self._too_long is None else self._too_long.size
        kept = sorted(size for size in self._took_s if size < limit)
        last = kept[-1] if kept else 0
        took = self._took_s.get(last, _Took(0.0, 0.0))
        if self._too_long is not None:
            slope_s = (self._took_s[limit].most_s - took.most_s) / (limit - last)
            return max(min(last + int((self._max_itl_s - took.most_s) / slope_s), limit - 1), 1)
        further = max(last // 4, 1)
        if len(kept) > 1:
            slope_s = (took.half_s - self._took_s[kept[-2]].half_s) / (last - kept[-2])
            if slope_s > 0.0:
                further = min(further, int((self._max_itl_s - took.most_s) / slope_s))
        return min(last + further, self._max_batch)
