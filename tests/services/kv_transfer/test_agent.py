"""The agent over the loopback transport: whatever the medium does, right bytes or a typed error, and every slot comes back."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING

import msgspec
import pytest

from duomo.config import TransferSection
from duomo.errors import DuomoError, TransferError
from services.kv_transfer.agent import PushJob, PushResult
from services.kv_transfer.faults import Fault, ScriptedFaults, SeededFaults
from tests.services.kv_transfer.conftest import IMPATIENT

if TYPE_CHECKING:
    from tests.services.kv_transfer.conftest import Pair


MakePair = Callable[..., "Pair"]


def code_of(future: Future[PushResult]) -> str:
    """How a push failed; "" where it did not."""
    error = future.exception(60)
    assert error is None or isinstance(error, DuomoError), error
    return error.code if error is not None else ""


@pytest.mark.parametrize("num_blocks", [1, 10, 63])
@pytest.mark.parametrize("want_slots", [1, 3])
def test_a_handle_lands_whole(pair_of: MakePair, num_blocks: int, want_slots: int) -> None:
    pair = pair_of()
    handle, spans = pair.offer(num_blocks, want_slots)
    pushed = pair.push(handle, spans)
    assert pair.land((handle, spans), pulls=False) == []
    results = [future.result(60) for future in pushed]
    assert [result.num_bytes for result in results] == [span.num_bytes for span in spans]
    assert all(result.started_s <= result.ended_s for result in results)
    pair.producer.cancel(handle.handle_id).result(60)
    pair.assert_idle()


ONE_FAULT = {
    "delay": Fault(delay_s=0.05),
    "drop": Fault(drops_data=True),
    "silent": Fault(drops_notification=True),
    "early": Fault(announces_early=True, delay_s=0.02),
    "early_and_very_late": Fault(announces_early=True, delay_s=0.12),
    "twice": Fault(duplicate_after_s=0.0),
    "twice_late": Fault(duplicate_after_s=0.03),
    "first_byte": Fault(corrupt_byte=0),
    "a_byte": Fault(corrupt_byte=29_999),
    "padding": Fault(corrupt_byte=60_001),
    "trailer": Fault(corrupt_byte=60_040),
    "hash": Fault(corrupt_byte=60_065),
    "truncated": Fault(truncate_bytes=30_000),
    "nothing": Fault(truncate_bytes=0),
}


@pytest.mark.parametrize("name", ONE_FAULT)
@pytest.mark.parametrize("write_idx", [0, 2, 5])
def test_one_fault_costs_a_pull_at_most(pair_of: MakePair, name: str, write_idx: int) -> None:
    pair = pair_of(ScriptedFaults({write_idx: ONE_FAULT[name]}))
    handle, spans = pair.offer(20)
    assert len(spans) == 8
    pair.push(handle, spans)
    errors = pair.land((handle, spans))
    harmless = name in ("delay", "padding" if write_idx == 0 else "", "silent", "early", "twice", "twice_late", "drop")
    assert set(errors) <= ({"kv_corrupt"} if not harmless else set()), errors
    if name in ("a_byte", "first_byte", "trailer", "hash", "truncated"):
        assert errors == ["kv_corrupt"] and pair.consumer.counts().counters["messages_corrupt"] == 1
    pair.producer.cancel(handle.handle_id).result(60)
    pair.assert_idle()


@pytest.mark.parametrize("seed", range(6))
def test_everything_at_once_gives_right_bytes(pair_of: MakePair, seed: int) -> None:
    faults = SeededFaults(
        seed=seed,
        max_delay_s=0.01,
        chance_drop=0.1,
        chance_drop_notification=0.2,
        chance_announce_early=0.2,
        chance_duplicate=0.2,
        chance_corrupt=0.1,
    )
    pair = pair_of(faults)
    for num_blocks in (5, 21, 3):
        handle, spans = pair.offer(num_blocks, want_slots=2)
        pair.push(handle, spans)
        pair.land((handle, spans), timeout_s=20)
        pair.producer.cancel(handle.handle_id).result(60)
    pair.assert_idle()


def test_handles_interleave_and_a_full_ring_grants_later(pair_of: MakePair) -> None:
    pair = pair_of(SeededFaults(seed=1, max_delay_s=0.003), num_slots=4)
    first, second = pair.offer(20, want_slots=9), pair.offer(20, want_slots=9)
    assert len(first[0].slots) == len(second[0].slots) == 2, "half a ring each"
    assert pair.consumer.grant(pair.producer_boot_id, 1) is None
    pair.push(*second)
    pair.push(*first)
    pair.land(first, second, pulls=False)
    pair.assert_idle()


def test_granted_slots_can_be_given_back(pair_of: MakePair) -> None:
    pair = pair_of()
    slots = pair.consumer.grant("p-boot", 4)
    assert slots is not None and pair.consumer.counts().num_free_slots == 4
    pair.consumer.give_back("p-boot", slots)
    pair.assert_idle()
    assert pair.consumer.grant("unknown", 1) is None


def test_a_late_write_after_abort_lands_in_quarantine_only(pair_of: MakePair) -> None:
    """The write of message 0 is on its way for long; its handle is aborted meanwhile, another handle lands in other slots."""
    pair = pair_of(ScriptedFaults({0: Fault(delay_s=1000.0)}), num_slots=8)
    late, spans = pair.offer(3, want_slots=1)
    pair.push(late, spans[:1])
    pair.until_in_flight()
    pair.consumer.abort(late.handle_id)
    fence = pair.producer.cancel(late.handle_id)
    assert not fence.done() and pair.consumer.counts().num_quarantined_slots == 1
    other, other_spans = pair.offer(10, want_slots=4)
    assert not set(other.slots) & set(late.slots)
    pair.push(other, other_spans)
    pair.land((other, other_spans), pulls=False)
    pair.clock.ahead_s += 1000.0
    fence.result(60)
    ring = pair.hub._regions[0]
    assert bytes(ring.slice(late.slots[0] * (64 * 1024 + 64), spans[0].num_bytes)) == pair.content(late.handle_id, spans[0]), "it did land"
    assert pair.consumer.counts().num_quarantined_slots == 1, "the fence is what frees"
    pair.consumer.fence(late.handle_id)
    pair.assert_idle()
    assert pair.consumer.poll() == []


def test_a_ring_with_many_slots_in_quarantine_is_replaced_and_used_again(pair_of: MakePair) -> None:
    pair = pair_of(num_slots=8, section=IMPATIENT)
    pair.hub.stop("kv-d")
    stuck, spans = pair.offer(20, want_slots=3)
    pushed = pair.push(stuck, spans)
    with pytest.raises(TransferError, match="write_timeout"):
        pushed[0].result(60)
    pair.consumer.abort(stuck.handle_id)
    assert pair.consumer.replace_stuck_rings() == [] and not pair.consumer.has_stuck_rings(), "a fence may be on its way"
    pair.clock.ahead_s += 2.0
    assert pair.consumer.has_stuck_rings()
    ((producer, offer),) = pair.consumer.replace_stuck_rings()
    assert producer == "p-boot" and offer.ring_name == "kv-d.1" and pair.consumer.replace_stuck_rings() == []
    pair.producer.attach_ring("d-boot", offer)
    fence = pair.producer.cancel(stuck.handle_id)
    handle, fresh = pair.offer(10)
    assert handle.ring_name == "kv-d.1" and pair.consumer.counts().num_retired_rings == 1
    pair.push(handle, fresh)
    pair.land((handle, fresh), pulls=False)
    assert not fence.done()
    pair.hub.resume("kv-d")
    fence.result(60)
    pair.consumer.fence(stuck.handle_id)
    assert pair.consumer.counts().num_retired_rings == 0
    pair.assert_idle()


def test_every_stuck_ring_is_replaced_and_offered(pair_of: MakePair) -> None:
    """Nothing but replace_stuck_rings() replaces: an abort that did would keep the offers to itself."""
    pair = pair_of(num_slots=8)
    pair.offer(20, want_slots=3)
    pair.start_producer("p-other")
    pair.offer(20, want_slots=3)
    for ring in list(pair.consumer._landing._rings()):
        for handle_id in list(ring.state.handles):
            pair.consumer.abort(handle_id)
    pair.clock.ahead_s += 2.0
    assert sorted(producer for producer, _ in pair.consumer.replace_stuck_rings()) == ["p-boot", "p-other"]
    pair.consumer.peer_dead("p-boot")
    assert pair.consumer.ring_name("p-boot") == "" and pair.consumer.ring_name("p-other")


def test_producers_given_up_leave_no_slots_and_little_memory(pair_of: MakePair) -> None:
    """Stopped producers: their slots and handles are over; the rings of the newest four stay where their writes may still land."""
    pair = pair_of(num_slots=4)
    for number in range(6):
        pair.start_producer(f"p-{number}")
        handle, _ = pair.offer(3, want_slots=1)
        pair.consumer.peer_lost(f"p-{number}")
        assert pair.consumer.counts().num_quarantined_slots == 1
        assert pair.consumer.peer_given_up(f"p-{number}") == (handle.handle_id,)
        counts = pair.consumer.counts()
        assert (counts.num_quarantined_slots, counts.num_retired_rings, counts.num_open_handles) == (0, 0, 0)
    assert [ring.producer_boot_id for ring in pair.consumer._landing._kept] == ["p-2", "p-3", "p-4", "p-5"]
    offer = pair.consumer.open_ring("p-5", 4)
    assert offer.ring_name not in (
        "kv-d",
        *(ring.offer.ring_name for ring in pair.consumer._landing._kept if ring.offer.ring_name != "kv-d"),
    )


def test_a_fence_in_time_keeps_the_ring(pair_of: MakePair) -> None:
    pair = pair_of(num_slots=8)
    for _ in range(3):
        handle, spans = pair.offer(20, want_slots=4)
        pair.push(handle, spans)
        pair.consumer.abort(handle.handle_id)
        pair.producer.cancel(handle.handle_id).result(60)
        pair.consumer.fence(handle.handle_id)
        pair.clock.ahead_s += 2.0
        assert pair.consumer.replace_stuck_rings() == []
    pair.assert_idle()


def test_a_peer_that_keeps_rings_in_quarantine_gets_no_more(pair_of: MakePair) -> None:
    pair = pair_of(num_slots=2)
    for _ in range(4):
        handle, _ = pair.offer(3, want_slots=1)
        pair.consumer.abort(handle.handle_id)
        pair.clock.ahead_s += 2.0
        assert len(pair.consumer.replace_stuck_rings()) == 1
    assert pair.consumer.counts().num_retired_rings == 4 and pair.consumer.grant("p-boot", 1) is None
    assert len(pair.consumer.peer_dead("p-boot")) == 4
    counts = pair.consumer.counts()
    assert (counts.num_slots, counts.num_quarantined_slots, counts.num_retired_rings, counts.num_open_handles) == (0, 0, 0, 0)


def test_the_producer_dies_in_a_write_and_comes_back_under_a_new_boot_id(pair_of: MakePair) -> None:
    pair = pair_of(ScriptedFaults({2: Fault(kills_writer=True, truncate_bytes=1000)}))
    handle, spans = pair.offer(20)
    pushed = pair.push(handle, spans)
    with pytest.raises(AssertionError, match="did not land"):
        pair.land((handle, spans), timeout_s=0.5, pulls=False)
    assert isinstance(pushed[2].exception(60), DuomoError)
    pair.producer.close()
    pair.consumer.abort(handle.handle_id)
    assert pair.consumer.counts().num_quarantined_slots > 0
    assert pair.consumer.peer_dead("p-boot") == (handle.handle_id,)
    pair.start_producer("p-boot-2")
    again, spans = pair.offer(20)
    pair.push(again, spans)
    pair.land((again, spans), pulls=False)
    pair.assert_idle()


def test_a_lost_socket_quarantines_until_the_process_is_known_dead(pair_of: MakePair) -> None:
    pair = pair_of()
    handle, spans = pair.offer(20)
    pair.push(handle, spans[:1])
    pair.consumer.peer_lost("p-boot")
    assert pair.consumer.counts().num_retired_rings == 1 and pair.consumer.grant("p-boot", 1) is None
    offer = pair.consumer.open_ring("p-boot", 8)
    assert offer.ring_name == "kv-d.1", "an old write cannot reach the new ring"
    pair.producer.attach_ring("d-boot", offer)
    pair.producer.cancel(handle.handle_id).result(60)
    pair.consumer.fence(handle.handle_id)
    assert pair.consumer.counts().num_retired_rings == 0
    pair.assert_idle()
    assert pair.consumer.open_ring("p-boot", 8) == offer, "an idle ring is offered again as it is"


def test_the_consumer_dies(pair_of: MakePair) -> None:
    pair = pair_of()
    handle, spans = pair.offer(20, want_slots=1)
    pushed = pair.push(handle, spans)
    pushed[0].result(60)
    pair.hub.kill("kv-d")
    pair.producer.credit(handle.handle_id, 0)
    assert code_of(pushed[1]) == "peer_gone"
    pair.producer.detach("d-boot")
    assert {code_of(future) for future in pushed[2:]} == {"cancelled"}
    assert pair.producer.cancel(handle.handle_id).result(60) is None
    refused = pair.producer.push(pair.job(handle, spans[2]))
    assert code_of(refused) == "stale_handle"


@pytest.mark.parametrize("field", ["producer_boot_id", "consumer_boot_id", "ring_name"])
def test_a_handle_of_another_life_is_refused(pair_of: MakePair, field: str) -> None:
    pair = pair_of()
    handle, spans = pair.offer(3)
    other = msgspec.structs.replace(handle, **{field: "another"})
    error = pair.producer.push(pair.job(other, spans[0])).exception(60)
    assert isinstance(error, TransferError) and error.code == "stale_handle"


def test_packing_that_fails_is_that_messages_error_alone(pair_of: MakePair) -> None:
    pair = pair_of()
    handle, spans = pair.offer(20)

    def fill(_: memoryview) -> None:
        raise ValueError("no such block")

    error = pair.producer.push(PushJob(handle=handle, span=spans[0], fill=fill)).exception(60)
    assert isinstance(error, TransferError) and error.code == "pack_failed" and "no such block" in error.detail
    pair.push(handle, spans)
    pair.land((handle, spans), pulls=False)


def test_the_rate_cap_is_kept_and_the_push_is_seen_as_long(pair_of: MakePair) -> None:
    section = TransferSection(slot_bytes=64 * 1024, max_bytes_per_s=1_000_000)
    pair = pair_of(section=section)
    handle, spans = pair.offer(20)
    started_s = time.monotonic()
    pushed = pair.push(handle, spans)
    pair.land((handle, spans), pulls=False)
    took_s, least_s = time.monotonic() - started_s, sum(span.num_bytes for span in spans) / 1e6
    assert least_s <= took_s
    result = pushed[0].result(0)
    assert result.ended_s - result.started_s >= spans[0].num_bytes / 1e6


def test_cancel_stops_what_is_queued_and_resolves_once_nothing_is_in_flight(pair_of: MakePair) -> None:
    pair = pair_of()
    pair.hub.stop("kv-d")
    handle, spans = pair.offer(20, want_slots=1)
    pushed = pair.push(handle, spans)
    pair.until_in_flight()
    fence = pair.producer.cancel(handle.handle_id)
    assert {code_of(future) for future in pushed[1:]} == {"cancelled"}
    assert not fence.done() and not pushed[0].done(), "its write is in flight"
    pair.hub.resume("kv-d")
    fence.result(60)
    assert pushed[0].exception(60) is None
    assert pair.producer.counts().num_writes_in_flight == 0


def test_poll_is_cheap(pair_of: MakePair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Called every millisecond: while nothing is awaited it seldom asks the transport, and what is not there is not hashed."""
    pair = pair_of()
    calls: Counter[str] = Counter()
    monkeypatch.setattr("services.kv_transfer.ring.message_hash", lambda *_: calls.update(["hashed"]))
    notifications = pair.consumer._landing._transport.notifications

    def asked() -> list[bytes]:
        calls.update(["asked"])
        return notifications()

    monkeypatch.setattr(pair.consumer._landing._transport, "notifications", asked)
    began_s = pair.clock()
    for _ in range(200):
        pair.consumer.poll()
    assert calls["asked"] <= 1 + (pair.clock() - began_s) / 0.1
    pair.offer(20, want_slots=4)
    for _ in range(200):
        pair.consumer.poll()
    assert calls["hashed"] == 0
