"""Owns what a layer group costs by the number of rows, from what pieces were measured to take. PURE: knows no clock, policy or tensor.

Rows are all that it goes by: of two waves of as many rows the one with fewer, longer prompts attends to more, and both count in one bucket.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass

BUCKETS_PER_DOUBLING = 2  # waves within 1.42 times the rows count as one size
SAMPLES_PER_BUCKET = 7  # their median: three hiccups in a row change nothing, a lasting change counts after four


@dataclass(frozen=True, slots=True)
class CostCurve:
    """Seconds of one layer group by rows: points in order of rows, seconds never falling. Empty: nothing is known."""

    points: tuple[tuple[float, float], ...] = ()

    def rows_per_s(self, num_tokens: int, num_groups: int) -> float:
        """At which waves of so many rows go through num_groups layer groups; 0: nothing is known."""
        group_s = self.group_s(num_tokens)
        return num_tokens / (group_s * num_groups) if group_s else 0.0

    def least_s(self, num_groups: int) -> float:
        """What the smallest waves measured take through num_groups layer groups; 0: nothing is known."""
        return self.points[0][1] * num_groups if self.points else 0.0

    def at_most_s(self, num_tokens: int) -> float | None:
        """As group_s, but below the first point no less than there: weights are read for few rows too."""
        return self.group_s(max(num_tokens, self.points[0][0])) if self.points else None

    def group_s(self, num_tokens: float) -> float | None:
        """Between two points along the line; beyond the last in proportion; below the first as the square root of the rows.

        Below: between what operations would say (in proportion) and what weights would say (the same). None: nothing is known.
        """
        points = self.points
        if not points:
            return None
        place = bisect_left(points, (num_tokens,))
        if place == len(points):
            tokens, seconds = points[-1]
            return seconds * num_tokens / tokens
        tokens, seconds = points[place]
        if place == 0:
            return seconds * math.sqrt(num_tokens / tokens)
        below, below_s = points[place - 1]
        return below_s + (seconds - below_s) * (num_tokens - below) / (tokens - below)


class GroupCosts:
    """What was measured, in a table whose size is bounded. Belongs to one loop. most_rows: of the largest piece."""

    def __init__(self) -> None:
        self.curve = CostCurve()
        self.most_rows = 0
        self._buckets: dict[int, deque[tuple[float, int]]] = {}

    def observe(self, num_tokens: int, num_groups: int, seconds: float) -> None:
        """A piece of num_groups layer groups over num_tokens rows took so long."""
        assert num_tokens > 0 and num_groups > 0 and seconds >= 0, (num_tokens, num_groups, seconds)
        self.most_rows = max(self.most_rows, num_tokens)
        bucket = math.ceil(BUCKETS_PER_DOUBLING * math.log2(num_tokens))
        self._buckets.setdefault(bucket, deque(maxlen=SAMPLES_PER_BUCKET)).append((seconds / num_groups, num_tokens))
        medians = (sorted(samples)[len(samples) // 2] for samples in self._buckets.values())
        self.curve = CostCurve(_rising(sorted((tokens, seconds) for seconds, tokens in medians)))


def _rising(points: list[tuple[int, float]]) -> tuple[tuple[float, float], ...]:
    """The nearest curve that never falls: neighbours that fall become one point at their means, again and again."""
    pools: list[tuple[float, float, int]] = []  # (mean of rows, mean of seconds, how many)
    for num_tokens, seconds in points:
        pool = (float(num_tokens), seconds, 1)
        while pools and pools[-1][1] >= pool[1]:
            tokens, mean_s, count = pools.pop()
            total = count + pool[2]
            pool = ((tokens * count + pool[0] * pool[2]) / total, (mean_s * count + pool[1] * pool[2]) / total, total)
        pools.append(pool)
    return tuple((tokens, seconds) for tokens, seconds, _ in pools)
