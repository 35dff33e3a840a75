"""Owns the lifetime of landing slots and of handles, on both sides, as two pure state machines. PURE; knows no memory, wire or clock.

Consumer, a handle:   OFFERED -> LANDING -> COMPLETE          every message landed, verified and released: all slots free
                          \\          \\
                           `----------`--> QUARANTINED -> CLOSED     aborted; its slots wait for the writer's fence or death
          a slot:     FREE -> RESERVED -> HELD -> FREE | QUARANTINED -> FREE
          (a request that joins the batch has a COMPLETE handle; joining is the decode service's own state)

Producer, a handle:   may_write() says GO, WAIT or DROP for each message; cancelled and nothing in flight: Fence.

Why a late write can touch nothing that matters:
  1. Writes reach slots only, never blocks.
  2. A ring has one writer process. It has at most one write in flight for each slot, and starts message m of a handle only after
     m - len(slots) was credited; a message credited or cancelled is never started again.
  3. The consumer frees a slot only (a) by releasing the last message that the handle has for it, which the writer learns
     before it learns of the slot's next handle (same ordered socket), or (b) after a fence, or (c) after the writer's death.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum


class SlotPhase(Enum):
    """Who may write a landing slot: nobody, nobody yet, a live handle's writer, an aborted handle's writer."""

    FREE = "free"
    RESERVED = "reserved"
    HELD = "held"
    QUARANTINED = "quarantined"


class HandlePhase(Enum):
    """Where a consumer's handle is; COMPLETE and CLOSED handles are forgotten."""

    OFFERED = "offered"
    LANDING = "landing"
    COMPLETE = "complete"
    QUARANTINED = "quarantined"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsumerHandle:
    """A grant seen from the consumer: messages 0..num_messages-1 land in slots[m % len(slots)]."""

    slots: tuple[int, ...]
    num_messages: int
    landed: frozenset[int] = frozenset()
    released: frozenset[int] = frozenset()
    is_fenced: bool = False
    phase: HandlePhase = HandlePhase.OFFERED

    def awaits(self, message_idx: int) -> bool:
        """Whether message_idx may land now: its turn has come, and it has not landed."""
        if self.phase not in (HandlePhase.OFFERED, HandlePhase.LANDING) or not 0 <= message_idx < self.num_messages:
            return False
        before = message_idx - len(self.slots)
        return message_idx not in self.landed and (before < 0 or before in self.released)

    def awaited(self) -> tuple[int, ...]:
        """The messages that may land now, at most one for each slot."""
        turns = set(range(min(len(self.slots), self.num_messages))) | {m + len(self.slots) for m in self.released}
        return tuple(sorted(m for m in turns if self.awaits(m)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Ring:
    """A landing ring and its handles. A retired ring takes no new handle and lives until its last slot is free."""

    slots: tuple[SlotPhase, ...]
    handles: Mapping[int, ConsumerHandle] = field(default_factory=dict)
    is_retired: bool = False

    def count(self, phase: SlotPhase) -> int:
        """Slots in `phase`."""
        return sum(slot is phase for slot in self.slots)

    @property
    def is_empty(self) -> bool:
        """Whether no writer may touch any slot."""
        return all(slot is SlotPhase.FREE for slot in self.slots)


@dataclass(frozen=True, slots=True)
class Reserve:
    """Take num_slots free slots for a handle that is about to be offered (all or nothing)."""

    num_slots: int


@dataclass(frozen=True, slots=True)
class Unreserve:
    """Give reserved slots back: no handle was offered for them."""

    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Expect:
    """A handle is being offered on reserved slots."""

    handle_id: int
    slots: tuple[int, ...]
    num_messages: int


@dataclass(frozen=True, slots=True)
class MessageSeen:
    """A message lies in its slot and its hash is right."""

    handle_id: int
    message_idx: int


@dataclass(frozen=True, slots=True)
class Release:
    """The payload of a landed message has been copied out."""

    handle_id: int
    message_idx: int


@dataclass(frozen=True, slots=True)
class Abort:
    """The handle is given up; its writer may still write."""

    handle_id: int


@dataclass(frozen=True, slots=True)
class Fence:
    """The writer has no write of this handle in flight and will start none."""

    handle_id: int


@dataclass(frozen=True, slots=True)
class WriterDied:
    """The ring's writer process is known dead."""


@dataclass(frozen=True, slots=True)
class Retire:
    """The ring is being replaced."""


RingEvent = Reserve | Unreserve | Expect | MessageSeen | Release | Abort | Fence | WriterDied | Retire


@dataclass(frozen=True, slots=True)
class SlotsReserved:
    """Reserve's answer; empty where not enough slots are free."""

    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Deliver:
    """The payload may be read until it is released."""

    handle_id: int
    message_idx: int


@dataclass(frozen=True, slots=True)
class HandleEnded:
    """The handle is forgotten: COMPLETE or CLOSED."""

    handle_id: int
    phase: HandlePhase


@dataclass(frozen=True, slots=True)
class Ignored:
    """An event that changes nothing, and why (counted)."""

    reason: str


RingEffect = SlotsReserved | Deliver | HandleEnded | Ignored


def new_ring(num_slots: int) -> Ring:
    """A ring of free slots."""
    assert num_slots > 0, num_slots
    return Ring(slots=(SlotPhase.FREE,) * num_slots)


def step(ring: Ring, event: RingEvent) -> tuple[Ring, tuple[RingEffect, ...]]:
    """The consumer's machine: one event, the next state, and what follows from it."""
    match event:
        case Reserve(num_slots):
            return _reserve(ring, num_slots)
        case Unreserve(slots):
            assert all(ring.slots[s] is SlotPhase.RESERVED for s in slots), (slots, ring.slots)
            return _mark(ring, slots, SlotPhase.FREE), ()
        case Expect(handle_id, slots, num_messages):
            return _expect(ring, handle_id, slots, num_messages)
        case Retire():
            return replace(ring, is_retired=True), ()
        case WriterDied():
            free = Ring(slots=(SlotPhase.FREE,) * len(ring.slots), is_retired=True)
            return free, tuple(HandleEnded(h, HandlePhase.CLOSED) for h in ring.handles)
    handle = ring.handles.get(event.handle_id)
    if handle is None:
        return ring, (Ignored("stale"),)
    match event:
        case MessageSeen(handle_id, message_idx):
            return _seen(ring, handle_id, handle, message_idx)
        case Release(handle_id, message_idx):
            return _release(ring, handle_id, handle, message_idx)
        case Abort(handle_id):
            return _abort(ring, handle_id, handle)
        case Fence(handle_id):
            if handle.phase is HandlePhase.QUARANTINED:
                return _close(ring, handle_id, handle)
            return _put(ring, handle_id, replace(handle, is_fenced=True)), ()


def _reserve(ring: Ring, num_slots: int) -> tuple[Ring, tuple[RingEffect, ...]]:
    free = [s for s, phase in enumerate(ring.slots) if phase is SlotPhase.FREE]
    if ring.is_retired or num_slots < 1 or len(free) < num_slots:
        return ring, (SlotsReserved(()),)
    taken = tuple(free[:num_slots])
    return _mark(ring, taken, SlotPhase.RESERVED), (SlotsReserved(taken),)


def _expect(ring: Ring, handle_id: int, slots: tuple[int, ...], num_messages: int) -> tuple[Ring, tuple[RingEffect, ...]]:
    assert handle_id not in ring.handles, f"handle {handle_id} is already expected"
    assert len(set(slots)) == len(slots) and all(ring.slots[s] is SlotPhase.RESERVED for s in slots), (slots, ring.slots)
    assert slots or num_messages == 0, (slots, num_messages)
    # Slots that no message will use are free at once.
    ring = _mark(_mark(ring, slots, SlotPhase.HELD), slots[num_messages:], SlotPhase.FREE)
    if num_messages == 0:
        return ring, (HandleEnded(handle_id, HandlePhase.COMPLETE),)
    return _put(ring, handle_id, ConsumerHandle(slots=slots, num_messages=num_messages)), ()


def _seen(ring: Ring, handle_id: int, handle: ConsumerHandle, message_idx: int) -> tuple[Ring, tuple[RingEffect, ...]]:
    if handle.phase is HandlePhase.QUARANTINED:
        return ring, (Ignored("late"),)
    if not handle.awaits(message_idx):
        return ring, (Ignored("duplicate" if message_idx in handle.landed else "out_of_window"),)
    landed = replace(handle, landed=handle.landed | {message_idx}, phase=HandlePhase.LANDING)
    return _put(ring, handle_id, landed), (Deliver(handle_id, message_idx),)


def _release(ring: Ring, handle_id: int, handle: ConsumerHandle, message_idx: int) -> tuple[Ring, tuple[RingEffect, ...]]:
    if handle.phase is HandlePhase.QUARANTINED:
        return ring, (Ignored("late"),)
    if message_idx not in handle.landed or message_idx in handle.released:
        return ring, (Ignored("duplicate"),)
    handle = replace(handle, released=handle.released | {message_idx})
    if message_idx + len(handle.slots) >= handle.num_messages:
        ring = _mark(ring, (handle.slots[message_idx % len(handle.slots)],), SlotPhase.FREE)
    if len(handle.released) < handle.num_messages:
        return _put(ring, handle_id, handle), ()
    return _forget(ring, handle_id), (HandleEnded(handle_id, HandlePhase.COMPLETE),)


def _abort(ring: Ring, handle_id: int, handle: ConsumerHandle) -> tuple[Ring, tuple[RingEffect, ...]]:
    if handle.phase is HandlePhase.QUARANTINED:
        return ring, (Ignored("duplicate"),)
    if handle.is_fenced:
        return _close(ring, handle_id, handle)
    ring = _mark(ring, _open_slots(handle), SlotPhase.QUARANTINED)
    return _put(ring, handle_id, replace(handle, phase=HandlePhase.QUARANTINED)), ()


def _close(ring: Ring, handle_id: int, handle: ConsumerHandle) -> tuple[Ring, tuple[RingEffect, ...]]:
    ring = _mark(ring, _open_slots(handle), SlotPhase.FREE)
    return _forget(ring, handle_id), (HandleEnded(handle_id, HandlePhase.CLOSED),)


def _open_slots(handle: ConsumerHandle) -> tuple[int, ...]:
    """Slots that the handle still has: those whose last message is not released."""
    k = len(handle.slots)
    done = {m % k for m in handle.released if m + k >= handle.num_messages}
    return tuple(slot for i, slot in enumerate(handle.slots[: handle.num_messages]) if i not in done)


def _mark(ring: Ring, slots: tuple[int, ...], phase: SlotPhase) -> Ring:
    chosen = set(slots)
    return replace(ring, slots=tuple(phase if s in chosen else was for s, was in enumerate(ring.slots)))


def _put(ring: Ring, handle_id: int, handle: ConsumerHandle) -> Ring:
    return replace(ring, handles={**ring.handles, handle_id: handle})


def _forget(ring: Ring, handle_id: int) -> Ring:
    return replace(ring, handles={h: state for h, state in ring.handles.items() if h != handle_id})
