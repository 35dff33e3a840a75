"""Owns one replica's count of the tokens that it routed to each expert, and when its reports carry it. Knows no wave and no step.

Names of shapes: L layers, E experts.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from duomo.wire.histogram import packed
from duomo.wire.values import ExpertHistogram

REPORT_PERIOD_S: Final = 2.0  # 48 layers of 128 experts are 49 KB, which no gateway needs ten times a second


class ExpertTokens:
    """total_LE: since the replica's start. Belongs to its event loop."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.total_LE = np.zeros((num_layers, num_experts), np.int64)
        self._reported_s: float | None = None

    def add(self, counts_LE: NDArray[np.integer]) -> None:
        self.total_LE += counts_LE

    def report(self, now_s: float) -> ExpertHistogram | None:
        """The total where the next report is to carry it: at once, then every REPORT_PERIOD_S. now_s: monotonic."""
        if self._reported_s is not None and now_s - self._reported_s < REPORT_PERIOD_S:
            return None
        self._reported_s = now_s
        return packed(self.total_LE)
