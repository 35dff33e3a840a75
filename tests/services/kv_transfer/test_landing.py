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
from services.kv_transfer.policy import CORRUPT_AFTER_S

if TYPE_CHECKING:
    from tests.services.kv_transfer.conftest import Pair

MakePair = Callable[..., "Pair"]


def poll_for(pair: Pair, num_messages: int, timeout_s: float = 60.0) -> list[landing.Landed]:
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
    started_s = pair.clock()
    (one,) = poll_for(pair, 1)
    assert one.error is not None and one.error.code == "kv_corrupt" and one.error.retryable and len(one.payload) == 0
    assert pair.clock() - started_s >= CORRUPT_AFTER_S
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
        assert may_go_on.wait(60)
        return 0

    pair.push(handle, spans[:1])[0].result(60)
    monkeypatch.setattr(ring, "message_hash", slow_hash)
    polled: list[landing.Landed] = []
    poller = threading.Thread(target=lambda: polled.extend(pair.consumer.poll()))
    poller.start()
    assert hashing.wait(60)
    assert pair.consumer.grant("p-boot", 1) is not None
    pair.consumer.abort(handle.handle_id)
    assert poller.is_alive(), "it is still hashing"
    may_go_on.set()
    poller.join(60)
    assert polled == [], "its handle was given up while it was hashed"


def test_whoever_verifies_elsewhere_is_given_each_message_once_until_it_has_judged(pair_of: MakePair) -> None:
    pair = pair_of()
    handle, spans = pair.offer(1, want_slots=1)
    (pushed,) = pair.push(handle, spans[:1])
    pushed.result(60)
    (awaited,) = pair.consumer.due()
    assert awaited.may_be_there() and bytes(awaited.payload) == pair.content(handle.handle_id, spans[0])
    assert len(awaited.message) == layout.message_bytes(spans[0].num_bytes)
    assert pair.consumer.due() == [] and pair.consumer.poll() == [], "it is being examined"
    landed = pair.consumer.judged(awaited, True)
    assert landed is not None and landed.error is None and landed.span == spans[0]
    assert pair.consumer.judged(awaited, True) is None, "judged before"


def test_what_is_judged_wrong_is_looked_at_again_and_in_the_end_an_error(pair_of: MakePair) -> None:
    pair = pair_of()
    handle, spans = pair.offer(1, want_slots=1)
    (pushed,) = pair.push(handle, spans[:1])
    pushed.result(60)
    looks, landed, deadline_s = 0, None, time.monotonic() + 60
    while landed is None:
        assert time.monotonic() < deadline_s
        for awaited in pair.consumer.due():
            looks, landed = looks + 1, pair.consumer.judged(awaited, False)
        time.sleep(0.001)
    assert looks >= 3 and landed.error is not None and landed.error.code == "kv_corrupt"


def test_a_verdict_on_a_handle_that_was_given_up_meanwhile_is_void(pair_of: MakePair) -> None:
    pair = pair_of()
    handle, spans = pair.offer(1, want_slots=1)
    (pushed,) = pair.push(handle, spans[:1])
    pushed.result(60)
    (awaited,) = pair.consumer.due()
    pair.consumer.abort(handle.handle_id)
    assert pair.consumer.judged(awaited, True) is None
    assert pair.consumer.counts().num_quarantined_slots == 1


def test_a_pulled_message_that_changes_while_it_is_copied_is_refused_and_any_other_is_not_looked_at_again(pair_of: MakePair) -> None:
    """A first write that was taken for lost lands and is right; the second, asked for meanwhile, spoils what is being copied."""
    pair = pair_of()
    handle, spans = pair.offer(3)
    for future in pair.push(handle, spans[:3]):
        future.result(60)
    plain, pulled, spoilt = sorted(poll_for(pair, 3), key=lambda one: one.span.message_idx)
    for one in (pulled, spoilt):
        pair.consumer.pulled(handle.handle_id, one.span.message_idx)
    for one in (plain, spoilt):
        one.awaited.message[7] ^= 1
    assert pair.consumer.copied(plain) is plain, "nobody writes it twice: it is not hashed twice"
    assert pair.consumer.copied(pulled) is pulled
    refused = pair.consumer.copied(spoilt)
    assert refused.error is not None and refused.error.code == "kv_corrupt" and len(refused.payload) == 0
    assert pair.consumer.counts().counters["messages_corrupt"] == 1
    pair.consumer.release(handle.handle_id, pulled.span.message_idx)
    pair.consumer.abort(handle.handle_id)
    pair.consumer.fence(handle.handle_id)
    pair.assert_idle()
