"""The line of legs that wait for room, in order. Knows no pool: whoever has room asks for the head. Every step of a request costs O(1)."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from duomo.errors import PeerError
from services.router.flight import Choice, Flight


@dataclass(slots=True, eq=False, kw_only=True)
class PendingLeg:
    """Choices of a flight that need a pair. is_resume: one choice that has already emitted tokens. avoid: replicas that just failed it.

    cause: where it begins again, what ended it before.
    """

    flight: Flight
    choices: tuple[Choice, ...]
    is_resume: bool
    avoid: frozenset[str] = frozenset()
    since_s: float = field(default_factory=time.monotonic)
    cause: str = ""

    def without_replica(self, pool: Literal["prefill", "decode"]) -> PeerError:
        """What its client is told where a pool has had no replica for too long: whether it had been served, or never was."""
        if self.cause:
            detail = f"A replica that served this request is gone ({self.cause}), and no {pool} replica has come in its place."
            return PeerError(detail, code="replica_lost", phase="route")
        return PeerError(f"No {pool} replica is connected.", code=f"no_{pool}_replica", phase="route")


class WaitingLine:
    """New requests join at the end; those that were running before (retries, resumes) at the front."""

    def __init__(self) -> None:
        self._line: deque[PendingLeg] = deque()
        self._num_gone = 0

    def __len__(self) -> int:
        return len(self._line) - self._num_gone

    def __iter__(self) -> Iterator[PendingLeg]:
        """Those that still want to run, in order; the one step that is not O(1)."""
        return (pending for pending in self._line if not pending.flight.is_over)

    def append(self, pending: PendingLeg) -> None:
        pending.flight.num_pending += 1
        self._line.append(pending)

    def push_front(self, pending: PendingLeg) -> None:
        pending.flight.num_pending += 1
        self._line.appendleft(pending)

    def head(self) -> PendingLeg | None:
        """The first that still wants to run."""
        while self._line and self._line[0].flight.is_over:
            self._line.popleft()
            self._num_gone -= 1
        return self._line[0] if self._line else None

    def pop_head(self) -> None:
        """The head has its pair."""
        self._line.popleft().flight.num_pending -= 1

    def forget(self, flight: Flight) -> None:
        """The flight ended: its entries count no more, and leave when they reach the head."""
        self._num_gone += flight.num_pending
        flight.num_pending = 0
