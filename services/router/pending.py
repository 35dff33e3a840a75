"""A leg that has no pair: choices of a flight that wait for one, and what their client is told where none comes. Knows no line, no pool."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Literal

from duomo.errors import PeerError
from services.router.flight import Choice, Flight
from services.router.policy import Need
from services.router.waiting import Rank, Weight, rank


@dataclass(slots=True, eq=False, kw_only=True)
class PendingLeg:
    """Choices of a flight that need a pair. is_resume: one choice that has already emitted tokens. avoid: replicas that just failed it.

    cause: where it begins again, what ended it before. was_running: it goes before those that never ran. need, weight: once it waits.
    timer: when it has waited long enough. stranded_since_s: since when no replica that is there could serve it, however empty.
    leads_since_s: since when it has been next in line.
    """

    flight: Flight
    choices: tuple[Choice, ...]
    is_resume: bool
    avoid: frozenset[str] = frozenset()
    cause: str = ""
    was_running: bool = False
    need: Need | None = None
    weight: Weight = Weight(work_tokens=0, num_blocks=0, num_choices=0)
    timer: asyncio.TimerHandle | None = None
    stranded_since_s: float | None = None
    leads_since_s: float | None = None

    @property
    def owner(self) -> Flight:
        return self.flight

    @property
    def rank(self) -> Rank:
        request = self.flight.request
        return rank(received_s=request.received_s, priority=request.priority, was_running=self.was_running)

    def without_room(self, why: str) -> PeerError:
        """What its client is told where none of those that are left could serve it, for too long."""
        detail = f"What served this request has ended ({self.cause}), and none that could go on with it has come to take its place: {why}"
        return PeerError(detail, code="replica_lost", phase="route")

    def without_replica(self, pool: Literal["prefill", "decode"]) -> PeerError:
        """What its client is told where a pool has had no replica for too long: whether it had been served, or never was."""
        if self.cause:
            detail = f"What served this request has ended ({self.cause}), and no {pool} replica has come to take its place."
            return PeerError(detail, code="replica_lost", phase="route")
        return PeerError(f"No {pool} replica is connected.", code=f"no_{pool}_replica", phase="route")
