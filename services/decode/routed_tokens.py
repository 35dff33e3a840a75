"""Owns the count of what one leg's decoded tokens were routed to, in bursts that no step notices. Knows no step and no choice.

A step gives a row of expert ids for each token. Counted all at once when a stream ends, those of a thousand tokens would hold the event
loop for milliseconds, and with it the next step of every other stream; counted one by one they would cost each step. So they are counted
by the dozen.

Legend: L layers, E experts, K experts a token, N tokens not counted yet.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

COUNTED_TOGETHER = 32


@dataclass(slots=True)
class RoutedTokens:
    """counts_LE: of the tokens counted so far; None before the first."""

    counts_LE: NDArray[np.int64] | None = None
    uncounted: list[NDArray[np.int16]] = field(default_factory=list)

    def add(self, ids_X: NDArray[np.int16]) -> None:
        """The ids [L * K] of one token."""
        self.uncounted.append(ids_X)

    def count_when_due(self, num_layers: int, num_experts: int) -> None:
        """After each step."""
        if len(self.uncounted) >= COUNTED_TOGETHER:
            self.count(num_layers, num_experts)

    def count(self, num_layers: int, num_experts: int) -> NDArray[np.int64]:
        """All tokens so far [L, E], this object's own."""
        if self.counts_LE is None:
            self.counts_LE = np.zeros((num_layers, num_experts), np.int64)
        if self.uncounted:
            ids_NLK = np.array(self.uncounted).reshape(len(self.uncounted), num_layers, -1)
            flat = ids_NLK + (np.arange(num_layers) * num_experts)[None, :, None]
            self.counts_LE += np.bincount(flat.ravel(), minlength=self.counts_LE.size).reshape(self.counts_LE.shape)
            self.uncounted.clear()
        return self.counts_LE
