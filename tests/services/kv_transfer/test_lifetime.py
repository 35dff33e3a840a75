"""Both halves of the lifetime against each other: any order of writes, delays, pulls, cancels, deaths and ring replacements."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.kv_transfer import lifetime, writing
from services.kv_transfer.lifetime import (
    Abort,
    Deliver,
    Expect,
    Fence,
    HandleEnded,
    HandlePhase,
    Ignored,
    MessageSeen,
    Release,
    Reserve,
    Retire,
    Ring,
    SlotPhase,
    SlotsReserved,
    Unreserve,
    WriterDied,
)

NUM_SLOTS = 5
Message = tuple[int, int]  # handle, message


def _reserve(ring: Ring, num_slots: int) -> tuple[Ring, tuple[int, ...]]:
    ring, (effect,) = lifetime.step(ring, Reserve(num_slots))
    assert isinstance(effect, SlotsReserved)
    return ring, effect.slots


@dataclass
class _RingPlace:
    """A ring of the consumer and what lies in its slots."""

    name: str
    state: Ring
    content: dict[int, Message] = field(default_factory=dict)


@dataclass
class _Flight:
    message: Message
    ring: _RingPlace
    slot: int
    process: int
    has_landed: bool = False


class World:
    """A consumer, a producer process (replaced when killed), ordered sockets between them, and a medium without any order."""

    def __init__(self) -> None:
        self.process = 0
        self.rings: list[_RingPlace] = []
        self.retired: list[_RingPlace] = []
        self.writer = writing.Writer()
        self.jobs: list[Message] = []
        self.medium: list[_Flight] = []
        self.to_producer: deque[tuple[str, int, int]] = deque()
        self.to_consumer: deque[int] = deque()
        self.sizes: dict[int, int] = {}
        self.slots_of: dict[int, tuple[int, ...]] = {}
        self.ring_of: dict[int, _RingPlace] = {}
        self.reading: dict[Message, tuple[_RingPlace, int]] = {}
        self.pulled: set[Message] = set()
        self.ended: dict[int, HandlePhase] = {}
        self.num_handles = 0
        self.is_killed = False
        self._new_ring()

    @property
    def ring(self) -> _RingPlace:
        return self.rings[-1]

    def _new_ring(self) -> None:
        self.rings.append(_RingPlace(f"ring{len(self.rings)}", lifetime.new_ring(NUM_SLOTS)))

    def _apply(self, place: _RingPlace, event: lifetime.RingEvent) -> tuple[lifetime.RingEffect, ...]:
        place.state, effects = lifetime.step(place.state, event)
        for effect in effects:
            if isinstance(effect, HandleEnded):
                assert effect.handle_id not in self.ended
                self.ended[effect.handle_id] = effect.phase
                self.reading = {m: at for m, at in self.reading.items() if m[0] != effect.handle_id}
        return effects

    # what may happen next; `pick` chooses among the possible

    def grant(self, pick: int) -> None:
        self.ring.state, slots = _reserve(self.ring.state, 1 + pick % 3)
        if not slots:
            return
        if pick % 11 == 0:
            self._apply(self.ring, Unreserve(slots))
            return
        self.num_handles += 1
        handle, num_messages = self.num_handles, pick % 8
        self.sizes[handle], self.slots_of[handle], self.ring_of[handle] = num_messages, slots, self.ring
        self._apply(self.ring, Expect(handle, slots, num_messages))
        self.to_producer.append(("offer", handle, 0))

    def deliver_to_producer(self, _: int) -> None:
        if not self.to_producer or self.is_killed:
            return
        what, handle, message = self.to_producer.popleft()
        if what == "offer":
            self.writer = writing.open_handle(self.writer, handle, self.ring_of[handle].name, self.slots_of[handle])
            self.jobs += [(handle, m) for m in range(self.sizes[handle])]
        elif what == "credit":
            self.writer = writing.credit(self.writer, handle, message)
        elif what == "pull":
            self.jobs.append((handle, message))
        else:
            self.writer = writing.cancel(self.writer, handle)
            self._fence(handle)

    def _fence(self, handle: int) -> None:
        state = self.writer.handles.get(handle)
        if state is not None and state.is_cancelled and writing.is_fenced(self.writer, handle):
            self.writer = writing.forget(self.writer, handle)
            self.to_consumer.append(handle)

    def write(self, pick: int) -> None:
        if self.is_killed:
            return
        for i in range(len(self.jobs)):
            job = self.jobs[(pick + i) % len(self.jobs)]
            verdict = writing.may_write(self.writer, *job)
            if verdict is not writing.Verdict.WAIT:
                self.jobs.remove(job)
            if verdict is writing.Verdict.GO:
                self.writer = writing.start_write(self.writer, *job)
                place = self.ring_of[job[0]]
                slot = self.slots_of[job[0]][job[1] % len(self.slots_of[job[0]])]
                self.medium.append(_Flight(job, place, slot, self.process))
            if verdict is not writing.Verdict.WAIT:
                return

    def land(self, pick: int) -> None:
        """Bytes move: any write under way, in any order; also of a handle that was given up long ago."""
        waiting = [flight for flight in self.medium if not flight.has_landed]
        if not waiting:
            return
        flight = waiting[pick % len(waiting)]
        flight.has_landed = True
        read = [m for m, at in self.reading.items() if at == (flight.ring, flight.slot)]
        assert all(m == flight.message for m in read), f"{flight.message} lands where {read} is being read"
        flight.ring.content[flight.slot] = flight.message

    def finish_write(self, pick: int) -> None:
        landed = [flight for flight in self.medium if flight.has_landed]
        if landed and not self.is_killed:
            flight = landed[pick % len(landed)]
            self.medium.remove(flight)
            self.writer = writing.end_write(self.writer, *flight.message)
            self._fence(flight.message[0])

    def see(self, pick: int) -> None:
        """The consumer looks at a slot whose content is complete."""
        for place in self.rings:
            for handle, state in list(place.state.handles.items()):
                for message in state.awaited():
                    slot = state.slots[message % len(state.slots)]
                    if place.content.get(slot) == (handle, message):
                        effects = self._apply(place, MessageSeen(handle, message))
                        assert effects == (Deliver(handle, message),)
                        self.reading[handle, message] = (place, slot)
                        return

    def release(self, pick: int) -> None:
        if not self.reading:
            return
        message = sorted(self.reading)[pick % len(self.reading)]
        place, slot = self.reading.pop(message)
        assert place.content[slot] == message, "the payload changed while it was read"
        self._apply(place, Release(*message))
        self.to_producer.append(("credit", *message))

    def pull(self, pick: int) -> None:
        """A message that looks corrupt is asked for again, once."""
        live = [
            (h, m) for place in self.rings for h, state in place.state.handles.items() for m in state.awaited() if (h, m) not in self.pulled
        ]
        if live:
            message = live[pick % len(live)]
            self.pulled.add(message)
            self.to_producer.append(("pull", *message))

    def abort(self, pick: int) -> None:
        handles = [(place, h) for place in self.rings for h in place.state.handles]
        if handles:
            place, handle = handles[pick % len(handles)]
            self._apply(place, Abort(handle))
            self.reading = {m: at for m, at in self.reading.items() if m[0] != handle}
            self.to_producer.append(("cancel", handle, 0))

    def producer_cancels(self, pick: int) -> None:
        if self.writer.handles and not self.is_killed:
            handle = sorted(self.writer.handles)[pick % len(self.writer.handles)]
            self.writer = writing.cancel(self.writer, handle)
            self._fence(handle)

    def deliver_to_consumer(self, _: int) -> None:
        if self.to_consumer:
            handle = self.to_consumer.popleft()
            self._apply(self.ring_of[handle], Fence(handle))

    def replace_ring(self, _: int) -> None:
        self._apply(self.ring, Retire())
        assert _reserve(self.ring.state, 1)[1] == ()
        self._new_ring()

    def kill(self, _: int) -> None:
        """The producer's process dies: what it wrote so far stays, nothing more lands."""
        self.is_killed = True
        self.medium = [flight for flight in self.medium if flight.has_landed]

    def learn_of_death(self, _: int) -> None:
        if self.is_killed:
            for place in self.rings:
                self._apply(place, WriterDied())
                assert place.state.is_empty and not place.state.handles
            self.process += 1
            self.is_killed = False
            self.writer, self.jobs, self.medium = writing.Writer(), [], []
            self.to_producer.clear()
            self.to_consumer.clear()
            self.reading.clear()
            self._new_ring()

    def check(self) -> None:
        for place in self.rings:
            owned: list[int] = []
            for state in place.state.handles.values():
                owned += lifetime._open_slots(state)
            assert len(owned) == len(set(owned)), "a slot with two handles"
            held = place.state.count(SlotPhase.HELD) + place.state.count(SlotPhase.QUARANTINED)
            assert held == len(owned) and place.state.count(SlotPhase.RESERVED) == 0, "a slot leaked"
            quarantined = {h for h, state in place.state.handles.items() if state.phase is HandlePhase.QUARANTINED}
            assert place.state.count(SlotPhase.QUARANTINED) == sum(len(lifetime._open_slots(place.state.handles[h])) for h in quarantined)
        under_way = [(flight.ring.name, flight.slot) for flight in self.medium]
        assert len(under_way) == len(set(under_way)), "two writes under way to one slot"
        for flight in self.medium:
            fenced = self.ended.get(flight.message[0]) is HandlePhase.CLOSED
            assert not fenced or flight.has_landed, "a fenced handle has bytes under way"


_MOVES = (World.deliver_to_producer, World.write, World.land, World.finish_write, World.see, World.release, World.deliver_to_consumer)
# Delays alone; with pulls and cancels too; with deaths and new rings too (rare, since each empties the world).
_DELAYS = (*_MOVES, World.grant)
_CANCELS = (*_MOVES * 3, World.grant, World.grant, World.pull, World.pull, World.pull, World.abort, World.producer_cancels)
_DEATHS = (*_CANCELS * 2, World.replace_ring, World.kill, World.learn_of_death, World.learn_of_death)
_PICKS = st.integers(0, 997)


def _steps(kinds: tuple[Callable[[World, int], None], ...]) -> st.SearchStrategy[list[tuple[int, int]]]:
    return st.lists(st.tuples(st.integers(0, len(kinds) - 1), _PICKS), min_size=60, max_size=160)


def _run(kinds: tuple[Callable[[World, int], None], ...], steps: list[tuple[int, int]]) -> World:
    world = World()
    for step, pick in steps:
        kinds[step](world, pick)
        world.check()
    return world


def _end(world: World) -> None:
    """Everything is given up; what is under way ends in its own time; then nothing may be held."""
    world.learn_of_death(0)
    for _ in range(250):
        for act in (World.abort, *_MOVES):
            act(world, 0)
        world.check()
        if all(place.state.is_empty for place in world.rings) and not world.medium:
            break
    assert all(place.state.is_empty and not place.state.handles for place in world.rings), "quarantined though the writer is done"


@settings(max_examples=120, deadline=None)
@given(_steps(_CANCELS))
def test_no_late_write_touches_what_is_read_under_pulls_and_cancels(steps: list[tuple[int, int]]) -> None:
    _end(_run(_CANCELS, steps))


@settings(max_examples=80, deadline=None)
@given(_steps(_DEATHS))
def test_no_slot_leaks_under_deaths_and_new_rings(steps: list[tuple[int, int]]) -> None:
    _end(_run(_DEATHS, steps))


@settings(max_examples=80, deadline=None)
@given(_steps(_DELAYS))
def test_under_any_delay_every_handle_completes(steps: list[tuple[int, int]]) -> None:
    world = _run(_DELAYS, steps)
    for _ in range(400):
        for act in _MOVES:
            act(world, 0)
    assert set(world.ended) == set(range(1, world.num_handles + 1))
    assert all(phase is HandlePhase.COMPLETE for phase in world.ended.values())
    assert world.ring.state.is_empty


def test_a_pulled_twin_does_not_reach_the_slots_next_handle() -> None:
    """Handle 1's only message is written, pulled, seen and released; its twin is still queued when handle 2 gets the slot."""
    world = World()
    for _ in range(NUM_SLOTS - 1):
        world.ring.state, _ = _reserve(world.ring.state, 1)
    world.num_handles = 1
    world.ring.state, slots = _reserve(world.ring.state, 1)
    for handle in (1, 2):
        world.sizes[handle], world.slots_of[handle], world.ring_of[handle] = 1, slots, world.ring
    world._apply(world.ring, Expect(1, slots, 1))
    world.to_producer.append(("offer", 1, 0))
    world.deliver_to_producer(0)
    world.jobs.append((1, 0))  # a pull that came while the first write was still to start
    for act in (World.write, World.land, World.see, World.release, World.finish_write, World.deliver_to_producer):
        act(world, 0)
    world.ring.state, slots = _reserve(world.ring.state, 1)
    world._apply(world.ring, Expect(2, slots, 1))
    world.to_producer.append(("offer", 2, 0))
    world.deliver_to_producer(0)
    world.jobs.sort(reverse=True)
    for act in (World.write, World.land, World.see, World.finish_write, World.write, World.write, World.land):
        act(world, 0)
    assert not world.medium and world.reading


def _handle(num_slots: int, num_messages: int) -> Ring:
    ring, slots = _reserve(lifetime.new_ring(NUM_SLOTS), num_slots)
    return lifetime.step(ring, Expect(9, slots, num_messages))[0]


def test_one_slot_is_enough_for_progress() -> None:
    ring = _handle(1, 3)
    for message in range(3):
        assert ring.handles[9].awaited() == (message,)
        ring, (effect,) = lifetime.step(ring, MessageSeen(9, message))
        assert effect == Deliver(9, message)
        ring, effects = lifetime.step(ring, Release(9, message))
    assert effects == (HandleEnded(9, HandlePhase.COMPLETE),) and ring.is_empty


@pytest.mark.parametrize(
    ("before", "event", "reason"),
    [
        ((), MessageSeen(8, 0), "stale"),
        ((), Fence(8), "stale"),
        ((), MessageSeen(9, 2), "out_of_window"),
        ((), MessageSeen(9, 7), "out_of_window"),
        ((MessageSeen(9, 0),), MessageSeen(9, 0), "duplicate"),
        ((), Release(9, 0), "duplicate"),
        ((MessageSeen(9, 0), Release(9, 0)), Release(9, 0), "duplicate"),
        ((Abort(9),), MessageSeen(9, 0), "late"),
        ((MessageSeen(9, 0), Abort(9)), Release(9, 0), "late"),
        ((Abort(9),), Abort(9), "duplicate"),
    ],
)
def test_what_changes_nothing_says_why(before: tuple[lifetime.RingEvent, ...], event: lifetime.RingEvent, reason: str) -> None:
    ring = _handle(2, 4)
    for earlier in before:
        ring = lifetime.step(ring, earlier)[0]
    after, effects = lifetime.step(ring, event)
    assert effects == (Ignored(reason),) and after == ring


def test_slots_whose_last_message_was_released_are_never_quarantined() -> None:
    ring = _handle(3, 3)
    ring = lifetime.step(lifetime.step(ring, MessageSeen(9, 1))[0], Release(9, 1))[0]
    assert ring.count(SlotPhase.HELD) == 2
    ring = lifetime.step(ring, Abort(9))[0]
    assert ring.count(SlotPhase.QUARANTINED) == 2 and ring.count(SlotPhase.FREE) == 3


def test_a_fence_before_the_abort_leaves_no_quarantine() -> None:
    ring = lifetime.step(_handle(2, 4), Fence(9))[0]
    ring, effects = lifetime.step(ring, Abort(9))
    assert effects == (HandleEnded(9, HandlePhase.CLOSED),) and ring.is_empty


def test_slots_that_no_message_needs_come_back_at_once() -> None:
    assert _handle(3, 1).count(SlotPhase.HELD) == 1
    ring, slots = _reserve(lifetime.new_ring(2), 2)
    ring, effects = lifetime.step(ring, Expect(1, slots, 0))
    assert effects == (HandleEnded(1, HandlePhase.COMPLETE),) and ring.is_empty
