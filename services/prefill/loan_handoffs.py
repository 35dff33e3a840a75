"""Owns the handoffs of a prefill service that computes into blocks lent by decode: nothing is sent. Knows no wave and no socket."""

from __future__ import annotations

from collections.abc import Sequence

from duomo.errors import WireError
from duomo.wire.messages import GroupLanded, HandleOffered, PullKv
from duomo.wire.values import Handle
from services.kv_transfer.loans import BlockLoans
from services.prefill.leg import Handoff, Leg
from services.prefill.pending import Pending


class LoanHandoffs:
    """The KV is where it has to be as soon as it is computed: a handoff is terminal with its leg. The loan itself is the wave's to take."""

    sends = False

    def __init__(self, loans: BlockLoans) -> None:
        self._loans = loans
        self._open: set[int] = set()

    @property
    def num_open(self) -> int:
        return len(self._open)

    def reaches(self, consumer_boot_id: str) -> bool:
        return consumer_boot_id == self._loans.lender_boot_id

    def accept(self, leg: Leg, handle: Handle) -> bool:
        if not self._loans.is_open(handle.handle_id) or handle.first_block != handle.num_blocks:
            return False
        leg.handoff = Handoff(handle=handle, spans=(), unlanded=set())
        self._open.add(handle.handle_id)
        return True

    def refuse(self, offer: HandleOffered) -> None:
        """Nothing to do: decode holds the blocks, and ends the loan with its leg."""

    def groups_launched(self, legs: Sequence[Leg], groups: Sequence[tuple[int, Pending[float]]]) -> None:
        """Nothing to do."""

    def group_computed(self, leg: Leg, group: int) -> None:
        """Nothing to do: decode reads the same blocks."""

    def landed(self, message: GroupLanded) -> None:
        raise WireError("nothing lands in a process that lends its blocks", code="unexpected_message")

    def pull(self, message: PullKv) -> bool:
        return False

    def close(self, leg: Leg) -> None:
        handoff = leg.handoff
        if handoff is not None:
            handoff.is_abandoned = handoff.is_terminal = True
            self._open.discard(handoff.handle.handle_id)
