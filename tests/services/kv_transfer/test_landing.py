"""The consumer alone: what is expected and missing, hints about nothing, odd ends, and threads that do not wait for each other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec
import pytest

from duomo.errors import TransferError
from services.kv_transfer import landing, layout, ring
from services.kv_transfer.faults import Fault, ScriptedFaults

if TYPE_CHECKING:
    from tests.services.kv_transfer.conftest import Pair

MakePair = Callable[..., "Pair"]


def poll_for(pair: Pair, num_messages: int, timeout_s: float = 5.0) -> list[landing.Landed]:
    """What lands, once it is num_messages."""
    deadline_s, landed = time.monotonic() + timeout_s, pair.consumer.poll()
    while len(landed) < num_messages:
        assert time.monotonic() < deadline_s, landed
        time.sleep(0.001)
        landed += pair.consumer.poll()
    return landed


def test_missing_messages_are_those_not_yet_verified(pair_of: MakePair) -> None:
    pair = pair_of(ScriptedFaults({1: Fault(drops_data=True)}), num_slots=16)
    handle, spans = pair.offer(10, want_slots=8)
    assert len(spans) == 5 and pair.consumer.missing(handle.handle_id) == (0, 1, 2, 3, 4)
    pair.push(handle, spans)
    seen = [one.span.message_idx for one in poll_for(pair, 4)]
    assert pair.consumer.missing(handle.handle_id) == (1,) and sorted(seen) == [0, 2, 3, 4]
    assert pair.consumer.missing(12345) == ()


def test_hints_about_nothing_are_counted(pair_of: MakePair) -> None:
    pair = pair_of()
    handle, _ = pair.offer(3)
    inbox = pair.hub._inbox["kv-d"]
    inbox += [b"junk", layout.notification(99, 0), layout.notification(handle.handle_id, 77)]
    assert pair.consumer.poll() == []
    counters = pair.consumer.counts().counters
    assert (counters["notifications_stale"], counters["notifications_unneeded"]) == (2, 1)
    pair.consumer.release(99, 0)
    pair.consumer.fence(99)
    pair.consumer.abort(99)
    assert pair.consumer.counts().counters["release_stale"] == 1


def test_a_hint_without_its_message_is_an_error_after_a_grace(pair_of: MakePair) -> None:
    pair = pair_of()
    handle, _ = pair.offer(3)
    pair.hub._inbox["kv-d"].append(layout.notification(handle.handle_id, 0))
    started_s = time.monotonic()
    (one,) = poll_for(pair, 1)
    assert one.error is not None and one.error.code == "kv_corrupt" and one.error.retryable and len(one.payload) == 0
    assert 0.04 < time.monotonic() - started_s < 2.0
    assert pair.consumer.poll() == [] and pair.consumer.missing(handle.handle_id)[0] == 0, "awaited again"


def test_a_payload_is_read_only(pair_of: MakePair) -> None:
    pair = pair_of()
    handle, spans = pair.offer(1, want_slots=1)
    pair.push(handle, spans)
    landed = poll_for(pair, 1)
    with pytest.raises(TypeError):
        landed[0].payload[0] = 1


def test_a_handle_on_a_ring_that_is_gone_is_a_typed_error(pair_of: MakePair) -> None:
    pair = pair_of()
    handle, spans = pair.offer(3)
    with pytest.raises(TransferError, match="unknown_ring"):
        pair.consumer.expect(msgspec.structs.replace(handle, handle_id=5, ring_name="kv-old"), spans)


def test_a_handle_without_messages_is_complete_at_once(pair_of: MakePair) -> None:
    pair = pair_of()
    slots = pair.consumer.grant("p-boot", 2)
    handle, _ = pair.offer(3)
    pair.consumer.expect(msgspec.structs.replace(handle, handle_id=5, slots=slots), ())
    assert pair.consumer.counts().num_open_handles == 1, "only the other one"


def test_slots_of_an_earlier_handle_are_not_mistaken(pair_of: MakePair) -> None:
    """The same slots, the same sizes, the same message numbers: nothing is there until it is written for this handle."""
    pair = pair_of(num_slots=2)
    for _ in range(3):
        handle, spans = pair.offer(3, want_slots=1)
        assert handle.slots == (0,) and pair.consumer.poll() == []
        pair.push(handle, spans)
        pair.land((handle, spans), pulls=False)


def test_grants_do_not_wait_for_hashing(pair_of: MakePair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = pair_of()
    handle, spans = pair.offer(1, want_slots=1)
    hashing, may_go_on = threading.Event(), threading.Event()

    def slow_hash(payload: memoryview, handle_id: int, group: int, message_idx: int) -> int:
        hashing.set()
        assert may_go_on.wait(5)
        return 0

    pair.push(handle, spans[:1])[0].result(1)
    monkeypatch.setattr(ring, "message_hash", slow_hash)
    polled: list[landing.Landed] = []
    poller = threading.Thread(target=lambda: polled.extend(pair.consumer.poll()))
    poller.start()
    assert hashing.wait(5)
    started_s = time.monotonic()
    assert pair.consumer.grant("p-boot", 1) is not None
    pair.consumer.abort(handle.handle_id)
    assert time.monotonic() - started_s < 0.5
    may_go_on.set()
    poller.join(5)
    assert polled == [], "its handle was given up while it was hashed"
