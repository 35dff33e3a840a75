"""Owns the landing of KV from other processes: slots granted, tables open to their messages. Knows no leg's state, policy or batch.

land() runs in the step thread, the rest on the event loop. Blocks of a handle may be given to others once withdraw() has returned: no
message is being written into them then, and none follows (on a GPU: none is queued any more, landers.py).
"""

from __future__ import annotations

from duomo.errors import TransferError
from duomo.wire.connection import Connection
from duomo.wire.values import Handle
from services.decode.arrivals import HandoffTerms, LandedMessage, handle_of
from services.decode.landers import Lander, OpenTables
from services.decode.leg import Leg
from services.decode.producer_rings import ProducerRings
from services.kv_transfer.agent import SlotCounts, TransferAgent
from services.kv_transfer.layout import messages


class RingArrivals:
    """KV lands in the agent's rings, and the lander writes it into blocks. The agent is its creator's to close."""

    is_polled = True

    def __init__(self, agent: TransferAgent, lander: Lander, rings: ProducerRings, terms: HandoffTerms) -> None:
        self._agent = agent
        self._lander = lander
        self._rings = rings
        self._terms = terms
        self._tables = OpenTables()

    @property
    def is_writing(self) -> bool:
        return self._lander.is_writing

    @property
    def way(self) -> str:
        return self._agent.transport_name

    @property
    def failure(self) -> TransferError | None:
        return self._agent.failure

    def offer(self, leg: Leg) -> Handle | None:
        """None while the producer's ring is full, or being replaced. Blocks whose KV decode has are not sent: at least the last one is."""
        terms = self._terms
        if not self._rings.may_offer():
            return None
        if not leg.spans:
            assert leg.announced is not None
            missing = range(leg.num_cached_blocks, len(leg.blocks))
            leg.spans = messages(missing, leg.announced.group_bounds, terms.block_bytes, terms.slot_bytes)
        producer = leg.prefill.boot_id
        slots = self._agent.grant(producer, len(leg.spans))
        if slots is None:
            return None
        handle = handle_of(leg, terms, self._agent.next_handle_id(), self._agent.ring_name(producer), slots, leg.num_cached_blocks)
        self._tables.open(handle.handle_id, leg.blocks)
        self._agent.expect(handle, leg.spans)
        return handle

    def arrived(self, handle_id: int) -> None:
        self._tables.close(handle_id)

    def withdraw(self, handle_id: int) -> None:
        """Waits for a message that is being written."""
        self._tables.close(handle_id)
        self._agent.abort(handle_id)

    def missing(self, handle_id: int) -> tuple[int, ...]:
        return self._agent.missing(handle_id)

    def pulled(self, handle_id: int, message_idx: int) -> None:
        self._agent.pulled(handle_id, message_idx)

    def fenced(self, handle_id: int) -> None:
        self._agent.fence(handle_id)

    def land(self, *, waits: bool = False) -> tuple[LandedMessage, ...]:
        """Verify and write whatever has landed, and free its slots."""
        return self._lander.land(self._agent, self._tables, waits=waits)

    def joined(self, producer: Connection) -> None:
        self._rings.joined(producer)

    def left(self, producer: Connection) -> None:
        self._rings.left(producer)

    def counts(self) -> SlotCounts:
        return self._agent.counts()

    async def close(self) -> None:
        await self._rings.close()
