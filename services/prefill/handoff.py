"""Owns what prefill asks of a handoff, whichever way KV gets to decode. Knows neither rings nor loans: ring_handoffs.py, loan_handoffs.py.

A leg's blocks are held until its handoff is **terminal**, so that no write of its handle is or will be in flight, and nothing is being
packed out of them any more (Handoff.num_in_flight).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from duomo.wire.messages import GroupLanded, HandleOffered, PullKv
from duomo.wire.values import Handle
from services.prefill.leg import Leg
from services.prefill.pending import Pending


class Handoffs(Protocol):
    """The producer side of all handles of this replica. All on the event loop. sends: whether KV goes anywhere, a group at a time."""

    sends: bool

    @property
    def num_open(self) -> int: ...

    def reaches(self, consumer_boot_id: str) -> bool:
        """Whether this replica can hand anything to that decode replica."""

    def accept(self, leg: Leg, handle: Handle) -> bool:
        """D granted `handle` to `leg`: from now on leg.handoff. False where it is not for this process' means of sending."""

    def refuse(self, offer: HandleOffered) -> None:
        """A grant that nobody wants any more: nothing was or will be written."""

    def groups_launched(self, legs: Sequence[Leg], groups: Sequence[tuple[int, Pending[float]]]) -> None:
        """A device computes these groups of the legs' prompts, each up to what stands beside it; group_computed() follows."""

    def group_computed(self, leg: Leg, group: int) -> None:
        """The KV of a layer group is in the leg's blocks."""

    def landed(self, message: GroupLanded) -> None:
        """D released a message."""

    def pull(self, message: PullKv) -> bool:
        """D wants a message again; whether it can have it."""

    def close(self, leg: Leg) -> None:
        """The leg is over: send no more. leg.handoff becomes terminal, at once or later."""
