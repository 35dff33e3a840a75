"""A ring's messages lie where layout says, come up when their turn has come, and crowding is timed from its start."""

from __future__ import annotations

from duomo.wire.messages import RingOffered
from services.kv_transfer import layout, lifetime
from services.kv_transfer.hashing import message_hash
from services.kv_transfer.memory import Region
from services.kv_transfer.ring import RingMemory
from services.kv_transfer.transport_loopback import LoopbackHub

SLOT_BYTES = 300


def a_ring(num_slots: int = 4) -> RingMemory:
    region = Region(num_slots * layout.slot_stride(SLOT_BYTES))
    offer = RingOffered(ring_name="r", agent_metadata=b"", base_address=region.address, slot_bytes=SLOT_BYTES, num_slots=num_slots)
    return RingMemory("p", region, LoopbackHub().agent("r"), offer, lifetime.new_ring(num_slots))


def test_a_message_is_seen_in_its_slot_and_nowhere_else() -> None:
    ring = a_ring()
    spans = layout.messages(range(3), (0, 1), 257, SLOT_BYTES)
    ring.apply(lifetime.Reserve(2))
    ring.apply(lifetime.Expect(7, (0, 1), 3))
    ring.spans[7] = spans
    ring.await_turns(7)
    assert sorted(ring.awaited) == [(7, 0), (7, 1)] and not any(a.is_due(0.0) for a in ring.awaited.values())

    payload = bytes(range(256)) + b"!"
    place = ring.region.slice(layout.slot_stride(SLOT_BYTES), layout.message_bytes(257))
    place[:257] = payload
    digest = message_hash(memoryview(payload), 7, 0, 1)
    layout.write_trailer(place[layout.trailer_offset(257) :], layout.trailer_start(7, spans[1]), digest)
    first, second = ring.awaited[7, 0], ring.awaited[7, 1]
    assert second.is_due(0.0) and second.is_right() and bytes(second.payload) == payload
    assert not first.is_due(0.0) and not first.is_right()
    place[100] = 0
    assert second.is_due(0.0) and not second.is_right()

    ring.apply(lifetime.MessageSeen(7, 0))
    ring.apply(lifetime.Release(7, 0))
    ring.await_turns(7)
    assert (7, 2) in ring.awaited and ring.awaited[7, 1] is second, "what is looked at stays"
    ring.drop(7)
    assert not ring.awaited and not ring.spans


def test_crowding_counts_from_its_first_moment_and_ends_with_the_fence() -> None:
    ring = a_ring()
    ring.apply(lifetime.Reserve(2))
    ring.apply(lifetime.Expect(7, (0, 1), 2))
    ring.note_crowding(1.0)
    assert ring.crowded_since_s is None
    ring.apply(lifetime.Abort(7))
    ring.note_crowding(2.0)
    ring.note_crowding(3.0)
    assert ring.crowded_since_s == 2.0
    ring.apply(lifetime.Fence(7))
    ring.note_crowding(4.0)
    assert ring.crowded_since_s is None
