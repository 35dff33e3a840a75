"""Owns the consumer's side of an agent: landing rings, what is expected in them, what has landed. Knows no wire, engine or writer.

Memory of a ring is allocated by open_ring() and freed when its writer is known dead (peer_dead) or, once the ring is retired, when no
slot waits for a writer any more; the rings of a writer that was given up are kept for a while, out of use. All methods may be called
from any thread.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from duomo.config import TransferSection
from duomo.errors import TransferError
from duomo.wire.messages import RingOffered
from duomo.wire.values import Handle
from services.kv_transfer import layout, lifetime, policy
from services.kv_transfer.layout import MessageSpan
from services.kv_transfer.lifetime import SlotPhase
from services.kv_transfer.memory import Allocate
from services.kv_transfer.ring import Awaited, RingMemory
from services.kv_transfer.transport import Transport

_IDLE_DRAIN_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Landed:
    """A message that is there (error None: payload may be read until release()), or that lies there corrupt (payload empty).

    payload: where the ring lies in the host's memory; of a device's ring empty, its lander has `awaited.message`.

    After an error the message is awaited again: a rewrite (PullKv) lands as if it were the first, an abort() ends it.
    """

    handle_id: int
    span: MessageSpan
    payload: memoryview
    error: TransferError | None
    awaited: Awaited


class LandingRings:
    """The rings of one consumer process, for all its producers."""

    def __init__(self, transport: Transport, section: TransferSection, now_s: Callable[[], float], allocate: Allocate) -> None:
        self._transport = transport
        self._allocate = allocate
        self._slot_bytes = section.slot_bytes
        self._kv_dtype = section.kv_dtype
        self._now_s = now_s
        self._lock = threading.RLock()
        self._current: dict[str, RingMemory] = {}
        self._retired: list[RingMemory] = []
        self._kept: deque[RingMemory] = deque()
        self._num_agents = 0
        self._drained_s = 0.0
        self.counters: Counter[str] = Counter()

    def open_ring(self, producer_boot_id: str, num_slots: int) -> RingOffered:
        """The ring for this producer process: a new one, or the one it has while nothing is under way in it."""
        with self._lock:
            ring = self._current.get(producer_boot_id)
            if ring is not None and ring.state.is_empty and not ring.state.handles and ring.offer.num_slots == num_slots:
                return ring.offer
            is_first = ring is None and all(old.producer_boot_id != producer_boot_id for old in (*self._retired, *self._kept))
        return self._replace(producer_boot_id, num_slots, None if is_first else self._next_agent_name())

    def ring_name(self, producer_boot_id: str) -> str:
        """The name that a handle for this producer carries now; "" where it has no ring."""
        with self._lock:
            ring = self._current.get(producer_boot_id)
            return ring.offer.ring_name if ring is not None else ""

    def grant(self, producer_boot_id: str, want_slots: int) -> tuple[int, ...] | None:
        """Reserve slots for a handle; None when the ring has none free now, or the peer has none."""
        with self._lock:
            ring = self._current.get(producer_boot_id)
            if ring is None or not policy.may_open_ring(len(self._retired_of(producer_boot_id))):
                return None
            num_slots = policy.slots_to_grant(ring.state.count(SlotPhase.FREE), want_slots, ring.offer.num_slots)
            (reserved,) = ring.apply(lifetime.Reserve(num_slots))
            assert isinstance(reserved, lifetime.SlotsReserved)
            return reserved.slots or None

    def give_back(self, producer_boot_id: str, slots: Sequence[int]) -> None:
        """Free granted slots for which no handle was offered."""
        with self._lock:
            ring = self._current.get(producer_boot_id)
            if ring is not None:
                ring.apply(lifetime.Unreserve(tuple(slots)))

    def expect(self, handle: Handle, spans: Sequence[MessageSpan]) -> None:
        """The handle is about to be offered: look for its messages from now on. A handle without messages is complete at once."""
        with self._lock:
            ring = self._find(handle)
            ring.wipe_trailers(handle, spans)
            effects = ring.apply(lifetime.Expect(handle.handle_id, handle.slots, len(spans)))
            if not effects:
                ring.offered[handle.handle_id] = handle
                ring.spans[handle.handle_id] = tuple(spans)
                ring.await_turns(handle.handle_id)

    def poll(self) -> list[Landed]:
        """What has landed since the last call, verified here. Hashing takes 0.3 ms a MiB: it holds no lock. By one thread."""
        judged = [self.judged(awaited, awaited.is_right()) for awaited in self.due()]
        return [landed for landed in judged if landed is not None]

    def due(self) -> list[Awaited]:
        """What may lie there now, for whoever verifies it: judged() is called for each. Until then no other call returns it.

        Cheap: called once a decode step, and every millisecond when idle. By one thread.
        """
        with self._lock:
            now_s = self._now_s()
            if not any(ring.awaited for ring in self._rings()):
                if now_s - self._drained_s >= _IDLE_DRAIN_S:
                    self._drain_notifications(now_s)
                return []
            self._drain_notifications(now_s)
            found = [awaited for ring in self._rings() for awaited in ring.awaited.values() if awaited.is_due(now_s)]
            for awaited in found:
                awaited.is_examined = True
            return found

    def judged(self, awaited: Awaited, is_right: bool) -> Landed | None:
        """Whether the message lay there whole. None: look again later, or its handle has ended meanwhile."""
        with self._lock:
            awaited.is_examined = False
            ring = self._ring_of(awaited.handle_id)
            if ring is None or ring.awaited.get(awaited.key) is not awaited:
                return None
            return self._apply_look(ring, awaited, is_right, self._now_s())

    def pulled(self, handle_id: int, message_idx: int) -> None:
        """This message will be asked for again: it may be written a second time. Called before PullKv is posted."""
        with self._lock:
            ring = self._ring_of(handle_id)
            if ring is not None:
                ring.pulled.add((handle_id, message_idx))

    def copied(self, landed: Landed) -> Landed:
        """The payload was copied out by the processor: the message, with an error where other bytes may have been copied than verified.

        Only a message that was pulled is written again (its first write came late, and was taken for lost): it is verified once more.
        """
        with self._lock:
            ring = self._ring_of(landed.handle_id)
            may_differ = ring is not None and landed.awaited.key in ring.pulled
        if not may_differ or landed.awaited.is_right():
            return landed
        with self._lock:
            self.counters["messages_corrupt"] += 1
        return _wrong(landed.awaited, "was written again, and wrong, while it was copied")

    def release(self, handle_id: int, message_idx: int) -> None:
        """The payload has been copied out: the slot may be written again. Post GroupLanded after this."""
        with self._lock:
            ring = self._ring_of(handle_id)
            if ring is None:
                self.counters["release_stale"] += 1
                return
            effects = ring.apply(lifetime.Release(handle_id, message_idx))
            if any(isinstance(effect, lifetime.HandleEnded) for effect in effects):
                ring.drop(handle_id)
                self._drop_if_empty(ring)
            elif not effects:
                ring.await_turns(handle_id)

    def missing(self, handle_id: int) -> tuple[int, ...]:
        """Messages of a live handle that have not landed, in order: what to pull when the writer says that it wrote all."""
        with self._lock:
            ring = self._ring_of(handle_id)
            if ring is None:
                return ()
            handle = ring.state.handles[handle_id]
            return tuple(m for m in range(handle.num_messages) if m not in handle.landed)

    def abort(self, handle_id: int) -> None:
        """Give a handle up: its slots wait for fence() or peer_dead()."""
        with self._lock:
            ring = self._ring_of(handle_id)
            if ring is not None:
                ring.apply(lifetime.Abort(handle_id))
                ring.drop(handle_id)
                ring.note_crowding(self._now_s())
                self._drop_if_empty(ring)

    def has_stuck_rings(self) -> bool:
        """Whether replace_stuck_rings() has something to do."""
        with self._lock:
            return bool(self._stuck())

    def replace_stuck_rings(self) -> list[tuple[str, RingOffered]]:
        """Replace every ring that has been crowded with quarantined slots too long; (producer boot id, offer to post) of each."""
        with self._lock:
            chosen = self._stuck()
            for ring in chosen:
                ring.apply(lifetime.Retire())
                self._retired.append(self._current.pop(ring.producer_boot_id))
                self.counters["rings_replaced"] += 1
        return [
            (ring.producer_boot_id, self._replace(ring.producer_boot_id, ring.offer.num_slots, self._next_agent_name())) for ring in chosen
        ]

    def fence(self, handle_id: int) -> None:
        """TransferFenced came: the handle's writer is done with it."""
        with self._lock:
            ring = self._ring_of(handle_id)
            if ring is not None:
                ring.apply(lifetime.Fence(handle_id))
                ring.note_crowding(self._now_s())
                self._drop_if_empty(ring)

    def unfenced(self, producer_boot_id: str) -> tuple[Handle, ...]:
        """Handles that were given up and that this producer has not fenced."""
        with self._lock:
            rings = [ring for ring in self._rings() if ring.producer_boot_id == producer_boot_id]
            return tuple(handle for ring in rings for handle in ring.quarantined())

    def peer_lost(self, producer_boot_id: str) -> None:
        """The socket to a producer is gone, but its process may live: everything under way is quarantined, the ring retired."""
        with self._lock:
            ring = self._current.get(producer_boot_id)
            if ring is not None:
                self._give_up(ring)

    def peer_dead(self, producer_boot_id: str) -> tuple[int, ...]:
        """A producer process is known dead: all its rings go. Returns the handles that were open."""
        with self._lock:
            rings = self._retired_of(producer_boot_id)
            current = self._current.pop(producer_boot_id, None)
            ended: list[int] = []
            for ring in [*rings, *([current] if current is not None else [])]:
                ended += [effect.handle_id for effect in ring.apply(lifetime.WriterDied()) if isinstance(effect, lifetime.HandleEnded)]
                if ring in self._retired:
                    self._retired.remove(ring)
                self._free(ring)
            return tuple(ended)

    def peer_given_up(self, producer_boot_id: str) -> tuple[int, ...]:
        """A producer has been silent for so long that nobody waits for it, but it may be stopped rather than dead.

        Its slots and handles are over at once. A write of it may still come: the newest policy.MAX_KEPT_RINGS rings of such producers
        keep their memory, where nobody reads.
        """
        with self._lock:
            self.peer_lost(producer_boot_id)
            ended: list[int] = []
            for ring in self._retired_of(producer_boot_id):
                ended += ring.state.handles
                ring.apply(lifetime.WriterDied())
                self._retired.remove(ring)
                self._kept.append(ring)
            while len(self._kept) > policy.MAX_KEPT_RINGS:
                self._free(self._kept.popleft())
            return tuple(ended)

    def count_slots(self, phase: SlotPhase) -> int:
        """Slots in `phase`, over current and retired rings (free slots of retired rings do not count)."""
        with self._lock:
            return sum(r.state.count(phase) for r in self._rings() if not (r.state.is_retired and phase is SlotPhase.FREE))

    def num_slots(self) -> int:
        """Slots of the rings that take handles."""
        with self._lock:
            return sum(ring.offer.num_slots for ring in self._current.values())

    def num_handles(self) -> int:
        """Handles that hold or quarantine slots."""
        with self._lock:
            return sum(len(ring.state.handles) for ring in self._rings())

    def num_retired(self) -> int:
        """Rings that wait for a writer to end."""
        with self._lock:
            return len(self._retired)

    def close(self) -> None:
        """Free every ring; the process ends, or nobody writes any more."""
        with self._lock:
            for producer_boot_id in {ring.producer_boot_id for ring in self._rings()}:
                self.peer_dead(producer_boot_id)
            while self._kept:
                self._free(self._kept.popleft())

    def _apply_look(self, ring: RingMemory, awaited: Awaited, is_right: bool, now_s: float) -> Landed | None:
        handle_id, span = awaited.handle_id, awaited.span
        if is_right:
            del ring.awaited[awaited.key]
            ring.apply(lifetime.MessageSeen(handle_id, span.message_idx))
            self.counters["messages_landed"] += 1
            payload = awaited.message.toreadonly()[: span.num_bytes] if isinstance(awaited.message, memoryview) else memoryview(b"")
            return Landed(handle_id=handle_id, span=span, payload=payload, error=None, awaited=awaited)
        awaited.look = policy.look_again(awaited.look, now_s)
        if policy.is_corrupt(awaited.look, awaited.announced_s, now_s):
            awaited.expect_anew()
            self.counters["messages_corrupt"] += 1
            return _wrong(awaited, "does not match its hash")
        return None

    def _drain_notifications(self, now_s: float) -> None:
        self._drained_s = now_s
        transports = {id(ring.transport): ring.transport for ring in self._rings()} | {id(self._transport): self._transport}
        for transport in transports.values():
            for data in transport.notifications():
                self._announce(data, now_s)

    def _announce(self, data: bytes, now_s: float) -> None:
        key = layout.read_notification(data)
        ring = self._ring_of(key[0]) if key is not None else None
        if key is None or ring is None:
            self.counters["notifications_stale"] += 1
            return
        awaited = ring.awaited.get(key)
        if awaited is None:
            # The trailer was seen first, or the message came twice, or its handle is given up: nothing to look at.
            self.counters["notifications_unneeded"] += 1
        elif awaited.announced_s is None:
            awaited.announced_s, awaited.look = now_s, None

    def _replace(self, producer_boot_id: str, num_slots: int, agent_name: str | None) -> RingOffered:
        """A new ring, in the memory of our own agent or of a new one. Making it takes up to 0.3 s with NIXL, so it holds no lock."""
        transport = self._transport if agent_name is None else self._transport.sibling(agent_name)
        region = self._allocate(num_slots * layout.slot_stride(self._slot_bytes))
        transport.register(region)
        offer = RingOffered(
            ring_name=transport.name,
            agent_metadata=transport.metadata(),
            base_address=region.address,
            slot_bytes=self._slot_bytes,
            num_slots=num_slots,
            memory=region.place.kind,
            device_idx=region.place.device_idx,
            kv_dtype=self._kv_dtype,
        )
        with self._lock:
            was = self._current.get(producer_boot_id)
            if was is not None:
                self._give_up(was)
            self._current[producer_boot_id] = RingMemory(producer_boot_id, region, transport, offer, lifetime.new_ring(num_slots))
        return offer

    def _next_agent_name(self) -> str:
        with self._lock:
            self._num_agents += 1
            return f"{self._transport.name}.{self._num_agents}"

    def _give_up(self, ring: RingMemory) -> None:
        for handle_id in list(ring.state.handles):
            ring.apply(lifetime.Abort(handle_id))
            ring.drop(handle_id)
        ring.apply(lifetime.Unreserve(tuple(s for s, phase in enumerate(ring.state.slots) if phase is SlotPhase.RESERVED)))
        ring.apply(lifetime.Retire())
        self._retired.append(self._current.pop(ring.producer_boot_id))
        self._drop_if_empty(ring)

    def _drop_if_empty(self, ring: RingMemory) -> None:
        if ring.state.is_retired and ring.state.is_empty and ring in self._retired:
            self._retired.remove(ring)
            self._free(ring)

    def _free(self, ring: RingMemory) -> None:
        ring.awaited.clear()
        ring.spans.clear()
        ring.transport.deregister(ring.region)
        if ring.transport is not self._transport:
            ring.transport.close()

    def _stuck(self) -> list[RingMemory]:
        now_s = self._now_s()
        stuck = [ring for ring in self._current.values() if policy.must_replace_ring(ring.crowded_since_s, now_s)]
        return [ring for ring in stuck if policy.may_open_ring(len(self._retired_of(ring.producer_boot_id)))]

    def _retired_of(self, producer_boot_id: str) -> list[RingMemory]:
        return [ring for ring in self._retired if ring.producer_boot_id == producer_boot_id]

    def _rings(self) -> Iterator[RingMemory]:
        yield from self._current.values()
        yield from self._retired

    def _ring_of(self, handle_id: int) -> RingMemory | None:
        return next((ring for ring in self._rings() if handle_id in ring.state.handles), None)

    def _find(self, handle: Handle) -> RingMemory:
        for ring in self._rings():
            if ring.producer_boot_id == handle.producer_boot_id and ring.offer.ring_name == handle.ring_name:
                return ring
        raise TransferError(f"no ring {handle.ring_name} for producer {handle.producer_boot_id}", code="unknown_ring")


def _wrong(awaited: Awaited, what: str) -> Landed:
    error = TransferError(f"message {awaited.span.message_idx} of handle {awaited.handle_id} {what}", code="kv_corrupt")
    return Landed(handle_id=awaited.handle_id, span=awaited.span, payload=memoryview(b""), error=error, awaited=awaited)
