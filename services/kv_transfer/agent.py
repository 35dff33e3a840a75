"""Owns the transfer agent: one in every rank, consumer and producer in one object. Knows no sockets, no engine, no asyncio.

The consumer lands messages in rings (landing.py), the producer pushes them (pushing.py); both halves share the transport. Every method
may be called from any thread and none blocks on a peer, except that attach_ring may take milliseconds.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from duomo.config import TransferSection
from duomo.errors import TransferError
from duomo.wire.messages import RingOffered
from duomo.wire.values import Handle
from services.kv_transfer.landing import Landed, LandingRings
from services.kv_transfer.layout import MessageSpan
from services.kv_transfer.lifetime import SlotPhase
from services.kv_transfer.memory import Allocate, Region
from services.kv_transfer.proving import Proof, prove
from services.kv_transfer.push_job import PushJob, PushResult
from services.kv_transfer.pushing import Pusher
from services.kv_transfer.ring import Awaited
from services.kv_transfer.transport import Transport

__all__ = ["Awaited", "Landed", "PushJob", "PushResult", "SlotCounts", "TransferAgent"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotCounts:
    """What an agent holds. counters: events since the start, by name (docs/metrics.md, duomo_kv_transfer_events)."""

    num_slots: int
    num_free_slots: int
    num_quarantined_slots: int
    num_open_handles: int
    num_retired_rings: int
    num_writes_in_flight: int
    counters: dict[str, int]


class TransferAgent:
    """Moves KV between this process and its peers. The creator calls close(); the transport is closed with it.

    allocate: makes the memory of rings and send slots. Futures end in the writer thread (or the caller's), so a callback on them may only
    hand over; they cannot be cancelled.
    """

    def __init__(
        self,
        boot_id: str,
        transport: Transport,
        section: TransferSection,
        *,
        num_send_slots: int = 16,
        now_s: Callable[[], float] = time.monotonic,
        allocate: Allocate = Region,
    ) -> None:
        self.boot_id = boot_id
        self._transport = transport
        self._section = section
        self._allocate = allocate
        self._landing = LandingRings(transport, section, now_s, allocate)
        self._pusher = Pusher(boot_id, transport, section, num_send_slots, now_s, allocate)
        self._handle_ids = secrets.randbits(31) << 32

    @property
    def transport_name(self) -> str:
        """Which transport moves the bytes, for logs, spans and assertions: "nixl/UCX" or "loopback"."""
        return self._transport.transport_name

    def prove(self) -> Proof:
        """Move one message through this transport and verify it, before the first peer. May take 0.3 s."""
        return prove(self._transport, self._section, self._allocate)

    # consumer

    def next_handle_id(self) -> int:
        """A handle id that this process has not used; starts at a random place, so that processes do not meet. Called by one thread."""
        self._handle_ids += 1
        return self._handle_ids

    def open_ring(self, producer_boot_id: str, num_slots: int) -> RingOffered:
        """Allocate the landing ring for a producer process; freed by peer_dead() or close()."""
        return self._landing.open_ring(producer_boot_id, num_slots)

    def ring_name(self, producer_boot_id: str) -> str:
        """The ring_name for a handle made of slots granted now (a ring can be replaced); "" where the producer has no ring."""
        return self._landing.ring_name(producer_boot_id)

    def grant(self, producer_boot_id: str, want_slots: int) -> tuple[int, ...] | None:
        """Reserve 1 to want_slots free slots, at most half the ring; None when none is free now. Then expect() or give_back()."""
        return self._landing.grant(producer_boot_id, want_slots)

    def give_back(self, producer_boot_id: str, slots: Sequence[int]) -> None:
        """Free granted slots for which no handle will be offered."""
        self._landing.give_back(producer_boot_id, slots)

    def expect(self, handle: Handle, spans: Sequence[MessageSpan]) -> None:
        """Called before the handle is offered. spans: layout.messages() of it."""
        self._landing.expect(handle, spans)

    def poll(self) -> list[Landed]:
        """Messages that landed, or lie corrupt, since the last call; verified here, by the processor."""
        return self._landing.poll()

    def due(self) -> list[Awaited]:
        """For a consumer that verifies elsewhere: messages that may lie in their slots. judged() is to be called for each."""
        return self._landing.due()

    def judged(self, awaited: Awaited, is_right: bool) -> Landed | None:
        """What poll() would return of this message; None: nothing yet, or its handle has ended."""
        return self._landing.judged(awaited, is_right)

    def pulled(self, handle_id: int, message_idx: int) -> None:
        """PullKv is about to be posted: the message may be written a second time."""
        self._landing.pulled(handle_id, message_idx)

    def copied(self, landed: Landed) -> Landed:
        """A processor has copied the payload out. With an error where a second write may have changed it after it was verified."""
        return self._landing.copied(landed)

    def release(self, handle_id: int, message_idx: int) -> None:
        """The payload is copied out; the slot is a credit again. A handle whose last message is released is over."""
        self._landing.release(handle_id, message_idx)

    def missing(self, handle_id: int) -> tuple[int, ...]:
        """Messages of a live handle that have not landed."""
        return self._landing.missing(handle_id)

    def abort(self, handle_id: int) -> None:
        """Quarantine the slots of a live handle, until its fence or its writer's death."""
        self._landing.abort(handle_id)

    def has_stuck_rings(self) -> bool:
        """Whether the quarantine of a ring does not end: then replace_stuck_rings(). Cheap."""
        return self._landing.has_stuck_rings()

    def replace_stuck_rings(self) -> list[tuple[str, RingOffered]]:
        """Offers to post, by producer boot id, for rings whose quarantine does not end; may take 0.3 s each.

        From its call until the offers are posted no handle may be granted: a producer learns of a ring before it learns of its slots.
        """
        return self._landing.replace_stuck_rings()

    def fence(self, handle_id: int) -> None:
        """TransferFenced came."""
        self._landing.fence(handle_id)

    def unfenced(self, producer_boot_id: str) -> tuple[Handle, ...]:
        """Handles that were given up and that this producer has not fenced: it, or its fence, may have been lost with a socket."""
        return self._landing.unfenced(producer_boot_id)

    def peer_lost(self, producer_boot_id: str) -> None:
        """The socket to a producer is gone, its process perhaps not: quarantine what is under way; open_ring() gives it a new ring."""
        self._landing.peer_lost(producer_boot_id)

    def peer_dead(self, producer_boot_id: str) -> tuple[int, ...]:
        """The producer's process is known dead: free its rings. Returns the handles that were open or in quarantine."""
        return self._landing.peer_dead(producer_boot_id)

    def peer_given_up(self, producer_boot_id: str) -> tuple[int, ...]:
        """A producer that fell silent is waited for no longer, though it may write yet. Returns the handles that were open."""
        return self._landing.peer_given_up(producer_boot_id)

    # producer

    def attach_ring(self, consumer_boot_id: str, offer: RingOffered) -> None:
        """RingOffered came: connect to the consumer's memory."""
        self._pusher.attach_ring(consumer_boot_id, offer)

    def detach(self, consumer_boot_id: str) -> None:
        """The consumer is gone."""
        self._pusher.detach(consumer_boot_id)

    def push(self, job: PushJob) -> Future[PushResult]:
        """Queue a message; jobs run in order, but one whose slot is not credited yet lets others pass."""
        return self._pusher.push(job)

    def credit(self, handle_id: int, message_idx: int) -> None:
        """GroupLanded came."""
        self._pusher.credit(handle_id, message_idx)

    def cancel(self, handle_id: int) -> Future[None]:
        """Stop a handle, or close a finished one. Resolves when no write of it is in flight: then send TransferFenced."""
        return self._pusher.cancel(handle_id)

    @property
    def failure(self) -> TransferError | None:
        """Why nothing is written any more: the writer thread met something unforeseen. The process has to be replaced."""
        return self._pusher.failure

    def num_waiting(self) -> int:
        """Messages to send whose turn, a credit, or a send slot, has not come."""
        return self._pusher.num_waiting()

    def counts(self) -> SlotCounts:
        """What is held now."""
        landing = self._landing
        return SlotCounts(
            num_slots=landing.num_slots(),
            num_free_slots=landing.count_slots(SlotPhase.FREE),
            num_quarantined_slots=landing.count_slots(SlotPhase.QUARANTINED),
            num_open_handles=landing.num_handles(),
            num_retired_rings=landing.num_retired(),
            num_writes_in_flight=self._pusher.num_in_flight(),
            counters=dict(landing.counters + self._pusher.counters),
        )

    def close(self) -> None:
        """End the writer thread, free the rings, close the transport."""
        self._pusher.close()
        self._landing.close()
        self._transport.close()
