"""PURE: how long answers are, from those that ended last: with a step's time it says how soon decode has room. Knows no request."""

from __future__ import annotations

from collections import deque
from typing import Final

NUM_ANSWERS: Final = 256
_FEWEST: Final = 8  # before so many have ended nothing is said


class AnswerLengths:
    """Of one gateway."""

    def __init__(self) -> None:
        self._lengths: deque[int] = deque(maxlen=NUM_ANSWERS)
        self._sum = 0

    @property
    def mean_tokens(self) -> float:
        """0 while too few are known."""
        return self._sum / len(self._lengths) if len(self._lengths) >= _FEWEST else 0.0

    def ended(self, num_tokens: int) -> None:
        """A choice has ended with so many."""
        if len(self._lengths) == NUM_ANSWERS:
            self._sum -= self._lengths[0]
        self._lengths.append(num_tokens)
        self._sum += num_tokens
