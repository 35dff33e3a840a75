"""Owns the consumer's side of an agent: landing rings, what is expected in them, what has landed. Knows no wire, engine or writer.

Memory of a ring is allocated by open_ring() and freed when its writer is known dead (peer_dead) or, once the ring is retired, when no
slot waits for a writer any more. All methods may be called from any thread.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from duomo.errors import TransferError
from duomo.wire.messages import Handle, RingOffered
from services.kv_transfer import layout, lifetime, policy
from services.kv_transfer.hashing import message_hash
from services.kv_transfer.layout import MessageSpan
from services.kv_transfer.lifetime import SlotPhase
from services.kv_transfer.memory import Region
from services.kv_transfer.transport import Transport

_IDLE_DRAIN_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Landed:
    """A message that is there (error None: payload may be read until release()), or that lies there corrupt (payload empty).

    After an error the message is awaited again: a rewrite (PullKv) lands as if it were the first, an abort() ends it.
    """

    handle_id: int
    span: MessageSpan
    payload: memoryview
    error: TransferError | None


@dataclass(slots=True, eq=False)
class _Awaited:
    """A message that may land now; `start` is how its trailer begins."""

    handle_id: int
    span: MessageSpan
    start: bytes
    payload: memoryview
    trailer: memoryview
    announced_s: float | None = None
    look: policy.Look | None = None

    @property
    def key(self) -> tuple[int, int]:
        return self.handle_id, self.span.message_idx

    def has_trailer(self) -> bool:
        return self.trailer[: len(self.start)] == self.start

    def is_due(self, now_s: float) -> bool:
        """Whether something may lie there, and it is time to look (again)."""
        if self.look is not None and now_s < self.look.next_s:
            return False
        return self.announced_s is not None or self.has_trailer()

    def is_right(self) -> bool:
        """Whether the message lies there whole."""
        if not self.has_trailer():
            return False
        digest = message_hash(self.payload, self.handle_id, self.span.group, self.span.message_idx)
        return digest == layout.read_hash(self.trailer)


@dataclass(slots=True, eq=False)
class _RingMemory:
    """A ring's memory, its agent, its state."""

    producer_boot_id: str
    region: Region
    transport: Transport
    offer: RingOffered
    state: lifetime.Ring
    spans: dict[int, tuple[MessageSpan, ...]] = field(default_factory=dict)
    awaited: dict[tuple[int, int], _Awaited] = field(default_factory=dict)

    def apply(self, event: lifetime.RingEvent) -> tuple[lifetime.RingEffect, ...]:
        self.state, effects = lifetime.step(self.state, event)
        return effects

    def await_turns(self, handle_id: int) -> None:
        """Look for every message of the handle whose turn has come."""
        handle = self.state.handles[handle_id]
        for message_idx in handle.awaited():
            if (handle_id, message_idx) not in self.awaited:
                span = self.spans[handle_id][message_idx]
                base = layout.slot_of(handle.slots, message_idx) * layout.slot_stride(self.offer.slot_bytes)
                self.awaited[handle_id, message_idx] = _Awaited(
                    handle_id,
                    span,
                    layout.trailer_start(handle_id, span),
                    self.region.slice(base, span.num_bytes),
                    self.region.slice(base + layout.trailer_offset(span.num_bytes), layout.TRAILER_BYTES),
                )

    def drop(self, handle_id: int) -> None:
        """Forget what was expected of the handle."""
        self.spans.pop(handle_id, None)
        for key in [key for key in self.awaited if key[0] == handle_id]:
            del self.awaited[key]


class LandingRings:
    """The rings of one consumer process, for all its producers."""

    def __init__(self, transport: Transport, slot_bytes: int, now_s: Callable[[], float]) -> None:
        self._transport = transport
        self._slot_bytes = slot_bytes
        self._now_s = now_s
        self._lock = threading.RLock()
        self._current: dict[str, _RingMemory] = {}
        self._retired: list[_RingMemory] = []
        self._num_agents = 0
        self._drained_s = 0.0
        self.counters: Counter[str] = Counter()

    def open_ring(self, producer_boot_id: str, num_slots: int) -> RingOffered:
        """The ring for this producer process: a new one, or the one it has while nothing is under way in it."""
        with self._lock:
            ring = self._current.get(producer_boot_id)
            if ring is not None and ring.state.is_empty and not ring.state.handles and ring.offer.num_slots == num_slots:
                return ring.offer
            if ring is None and not self._retired_of(producer_boot_id):
                return self._new_ring(producer_boot_id, num_slots, self._transport).offer
            if ring is not None:
                self._give_up(ring)
            return self._new_ring(producer_boot_id, num_slots, self._fresh_agent()).offer

    def ring_name(self, producer_boot_id: str) -> str:
        """The name that a handle for this producer carries now."""
        with self._lock:
            return self._current[producer_boot_id].offer.ring_name

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
            stride = layout.slot_stride(self._slot_bytes)
            # A trailer of an earlier life of this handle's slots cannot be mistaken, but cannot help either: wipe where messages end.
            for span in spans[: len(handle.slots)]:
                end = layout.slot_of(handle.slots, span.message_idx) * stride + layout.trailer_offset(span.num_bytes)
                ring.region.slice(end, layout.TRAILER_BYTES)[:] = bytes(layout.TRAILER_BYTES)
            effects = ring.apply(lifetime.Expect(handle.handle_id, handle.slots, len(spans)))
            if not effects:
                ring.spans[handle.handle_id] = tuple(spans)
                ring.await_turns(handle.handle_id)

    def poll(self) -> list[Landed]:
        """What has landed since the last call. Cheap: called once a decode step, and every millisecond when idle. By one thread."""
        with self._lock:
            now_s = self._now_s()
            if not any(ring.awaited for ring in self._rings()):
                if now_s - self._drained_s >= _IDLE_DRAIN_S:
                    self._drain_notifications(now_s)
                return []
            self._drain_notifications(now_s)
            looks = [(ring, awaited) for ring in self._rings() for awaited in ring.awaited.values() if awaited.is_due(now_s)]
        # Hashing takes 0.3 ms a MiB: grants and aborts of other threads do not wait for it.
        verified = [awaited.is_right() for _, awaited in looks]
        landed: list[Landed] = []
        with self._lock:
            for (ring, awaited), is_right in zip(looks, verified, strict=True):
                if ring.awaited.get(awaited.key) is awaited:
                    self._apply_look(ring, awaited, is_right, now_s, landed)
        return landed

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

    def abort(self, handle_id: int) -> RingOffered | None:
        """Give a handle up: its slots wait for fence() or peer_dead(). Returns an offer for its producer where the ring was replaced."""
        with self._lock:
            ring = self._ring_of(handle_id)
            if ring is None:
                return None
            ring.apply(lifetime.Abort(handle_id))
            ring.drop(handle_id)
            num_slots = ring.offer.num_slots
            if ring.state.is_retired or not policy.must_replace_ring(ring.state.count(SlotPhase.QUARANTINED), num_slots):
                return None
            ring.apply(lifetime.Retire())
            self._retired.append(self._current.pop(ring.producer_boot_id))
            self.counters["rings_replaced"] += 1
            return self._new_ring(ring.producer_boot_id, num_slots, self._fresh_agent()).offer

    def fence(self, handle_id: int) -> None:
        """TransferFenced came: the handle's writer is done with it."""
        with self._lock:
            ring = self._ring_of(handle_id)
            if ring is not None:
                ring.apply(lifetime.Fence(handle_id))
                self._drop_if_empty(ring)

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

    def _apply_look(self, ring: _RingMemory, awaited: _Awaited, is_right: bool, now_s: float, landed: list[Landed]) -> None:
        handle_id, span = awaited.handle_id, awaited.span
        if is_right:
            del ring.awaited[awaited.key]
            ring.apply(lifetime.MessageSeen(handle_id, span.message_idx))
            self.counters["messages_landed"] += 1
            landed.append(Landed(handle_id=handle_id, span=span, payload=awaited.payload.toreadonly(), error=None))
            return
        awaited.look = policy.look_again(awaited.look, now_s)
        if policy.is_corrupt(awaited.look, awaited.announced_s, now_s):
            # Wiped, so that only a rewrite is looked at; awaited as new.
            awaited.trailer[:] = bytes(layout.TRAILER_BYTES)
            awaited.look = awaited.announced_s = None
            self.counters["messages_corrupt"] += 1
            error = TransferError(f"message {span.message_idx} of handle {handle_id} does not match its hash", code="kv_corrupt")
            landed.append(Landed(handle_id=handle_id, span=span, payload=memoryview(b""), error=error))

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

    def _new_ring(self, producer_boot_id: str, num_slots: int, transport: Transport) -> _RingMemory:
        region = Region(num_slots * layout.slot_stride(self._slot_bytes))
        transport.register(region)
        offer = RingOffered(
            ring_name=transport.name,
            agent_metadata=transport.metadata(),
            base_address=region.address,
            slot_bytes=self._slot_bytes,
            num_slots=num_slots,
        )
        ring = _RingMemory(producer_boot_id, region, transport, offer, lifetime.new_ring(num_slots))
        self._current[producer_boot_id] = ring
        return ring

    def _fresh_agent(self) -> Transport:
        self._num_agents += 1
        return self._transport.sibling(f"{self._transport.name}.{self._num_agents}")

    def _give_up(self, ring: _RingMemory) -> None:
        for handle_id in list(ring.state.handles):
            ring.apply(lifetime.Abort(handle_id))
            ring.drop(handle_id)
        ring.apply(lifetime.Unreserve(tuple(s for s, phase in enumerate(ring.state.slots) if phase is SlotPhase.RESERVED)))
        ring.apply(lifetime.Retire())
        self._retired.append(self._current.pop(ring.producer_boot_id))
        self._drop_if_empty(ring)

    def _drop_if_empty(self, ring: _RingMemory) -> None:
        if ring.state.is_retired and ring.state.is_empty and ring in self._retired:
            self._retired.remove(ring)
            self._free(ring)

    def _free(self, ring: _RingMemory) -> None:
        ring.awaited.clear()
        ring.spans.clear()
        ring.transport.deregister(ring.region)
        if ring.transport is not self._transport:
            ring.transport.close()

    def _retired_of(self, producer_boot_id: str) -> list[_RingMemory]:
        return [ring for ring in self._retired if ring.producer_boot_id == producer_boot_id]

    def _rings(self) -> Iterator[_RingMemory]:
        yield from self._current.values()
        yield from self._retired

    def _ring_of(self, handle_id: int) -> _RingMemory | None:
        return next((ring for ring in self._rings() if handle_id in ring.state.handles), None)

    def _find(self, handle: Handle) -> _RingMemory:
        for ring in self._rings():
            if ring.producer_boot_id == handle.producer_boot_id and ring.offer.ring_name == handle.ring_name:
                return ring
        raise TransferError(f"no ring {handle.ring_name} for producer {handle.producer_boot_id}", code="unknown_ring")
