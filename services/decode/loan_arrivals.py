"""Owns the lending of granted blocks to the prefill service of the same process: nothing lands, nothing is scattered. Knows no batch."""

from __future__ import annotations

from collections.abc import Callable

from duomo.engine.blocks import PromptTable
from duomo.wire.connection import Connection
from duomo.wire.values import Handle
from services.decode.arrivals import HandoffTerms, LandedMessage, handle_of
from services.decode.leg import Leg
from services.kv_transfer.agent import SlotCounts
from services.kv_transfer.loans import BlockLoans


class LoanArrivals:
    """Prefill computes into the leg's own blocks; the leg is their reader throughout, prefill one more while its wave runs.

    on_room: called when prefill has given blocks back.
    """

    is_polled = False
    failure = None

    def __init__(self, loans: BlockLoans, terms: HandoffTerms, on_room: Callable[[], None]) -> None:
        loans.on_given_back = on_room
        self._loans = loans
        self._terms = terms

    @property
    def is_writing(self) -> bool:
        return False

    @property
    def way(self) -> str:
        return self._loans.transport_name

    def offer(self, leg: Leg) -> Handle:
        """A handle that says: decode has every block already."""
        table = PromptTable(blocks=tuple(leg.blocks), cached_tokens=leg.cached_tokens, hashes=leg.prefix_hashes)
        handle_id = self._loans.lend(table)
        return handle_of(leg, self._terms, handle_id, "", (), len(leg.blocks))

    def arrived(self, handle_id: int) -> None:
        self._loans.end(handle_id)

    def withdraw(self, handle_id: int) -> None:
        """Prefill may still compute into the blocks: as a reader of its own."""
        self._loans.end(handle_id)

    def missing(self, handle_id: int) -> tuple[int, ...]:
        return ()

    def pulled(self, handle_id: int, message_idx: int) -> None:
        """Nothing is missing, so nothing is pulled."""

    def fenced(self, handle_id: int) -> None:
        """Nobody fences what is not written from afar."""

    def land(self, *, waits: bool = False) -> tuple[LandedMessage, ...]:
        return ()

    def joined(self, producer: Connection) -> None:
        """It needs no ring."""

    def left(self, producer: Connection) -> None:
        """Its legs end by themselves; nothing of it is in flight."""

    def counts(self) -> SlotCounts:
        return self._loans.counts()

    async def close(self) -> None:
        """Nothing runs."""
