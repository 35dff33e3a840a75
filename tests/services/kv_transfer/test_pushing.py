"""The writer thread: what it does with a broken transport, lost send slots, waiters that give up, and its own end."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec
import pytest

from duomo.config import TransferSection
from duomo.errors import TransferError
from services.kv_transfer import layout, policy
from services.kv_transfer.agent import PushJob, TransferAgent
from services.kv_transfer.faults import Fault, ScriptedFaults
from services.kv_transfer.hashing import message_hash
from services.kv_transfer.send_slots import SendSlots
from services.kv_transfer.transport import Span, Write
from services.kv_transfer.transport_loopback import LoopbackTransport
from tests.services.kv_transfer.conftest import IMPATIENT

if TYPE_CHECKING:
    from tests.services.kv_transfer.conftest import Pair

MakePair = Callable[..., "Pair"]


def test_a_waiter_cannot_cancel_what_is_under_way(pair_of: MakePair) -> None:
    pair = pair_of(ScriptedFaults({0: Fault(delay_s=0.05)}))
    handle, spans = pair.offer(3)
    (future, *_) = pair.push(handle, spans)
    assert not future.cancel()
    pair.land((handle, spans), pulls=False)
    assert future.result(60).num_bytes == spans[0].num_bytes


def test_writes_to_a_stopped_peer_do_not_hold_up_another(pair_of: MakePair) -> None:
    """All four send slots are stuck in writes to a stopped consumer; after the deadline new ones serve a second consumer."""
    pair = pair_of(num_slots=16, section=IMPATIENT)
    stuck, spans = pair.offer(20, want_slots=8)
    pair.hub.stop("kv-d")
    pushed = pair.push(stuck, spans)
    assert {type(future.exception(60)) for future in pushed[:4]} == {TransferError}
    fence = pair.producer.cancel(stuck.handle_id)
    assert pair.producer.counts().num_writes_in_flight >= 4 and not fence.done()

    stopped, pair.consumer = pair.consumer, TransferAgent("e-boot", pair.hub.agent("kv-e"), pair.section)
    pair.producer.attach_ring("e-boot", pair.consumer.open_ring("p-boot", 4))
    handle, few = pair.offer(3)
    handle = msgspec.structs.replace(handle, consumer_boot_id="e-boot")
    pair.push(handle, few)
    pair.land((handle, few), pulls=False)
    assert not fence.done()
    stopped.close()
    fence.result(60)


def test_a_consumer_may_leave_while_a_message_for_it_is_packed(pair_of: MakePair) -> None:
    pair = pair_of()
    handle, spans = pair.offer(3)
    is_packing, may_go_on = threading.Event(), threading.Event()

    def fill(place: memoryview) -> None:
        is_packing.set()
        assert may_go_on.wait(60)

    packing = pair.producer.push(PushJob(handle=handle, span=spans[0], fill=fill))
    assert is_packing.wait(60)
    pair.producer.detach("d-boot")
    assert pair.producer.cancel(handle.handle_id).result(60) is None, "nothing was written"
    may_go_on.set()
    with pytest.raises(TransferError, match="cancelled"):
        packing.result(60)
    pair.producer.attach_ring("d-boot", pair.consumer.open_ring("p-boot", 8))
    again, spans = pair.offer(3)
    pair.push(again, spans)
    pair.land((again, spans), pulls=False)


def test_messages_too_large_for_a_send_slot_are_refused(pair_of: MakePair) -> None:
    pair = pair_of()
    large = TransferAgent("large", pair.hub.agent("kv-large"), TransferSection(slot_bytes=256 * 1024))
    pair.producer.attach_ring("large", large.open_ring("p-boot", 2))
    handle, _ = pair.offer(3)
    (span,) = layout.messages(range(70), (0, 1), 3000, 256 * 1024)
    handle = msgspec.structs.replace(handle, consumer_boot_id="large", ring_name="kv-large", slots=(0,))
    with pytest.raises(TransferError, match="slot_bytes differs"):
        pair.producer.push(pair.job(handle, span)).result(60)
    large.close()


def test_a_transport_that_breaks_its_promises_fails_every_waiter(pair_of: MakePair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = pair_of()
    handle, spans = pair.offer(20, want_slots=1)

    def write(self: LoopbackTransport, local: Span, peer: str, remote: Span, notification: bytes) -> Write:
        raise KeyError("no such thing")

    monkeypatch.setattr(LoopbackTransport, "write", write)
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    pushed = pair.push(handle, spans)
    for future in pushed:
        error = future.exception(60)
        assert isinstance(error, TransferError) and error.code in ("writer_failed", "stale_handle")
    assert pair.producer.counts().counters["writer_failed"] == 1
    (late,) = pair.push(handle, spans[:1])
    assert isinstance(late.exception(60), TransferError)


@pytest.mark.parametrize("is_stopped", [False, True])
def test_close_fails_what_is_queued_and_waits_shortly(pair_of: MakePair, is_stopped: bool) -> None:
    """For a write under way as long as it may take, and no longer."""
    pair = pair_of(section=IMPATIENT) if is_stopped else pair_of(ScriptedFaults({0: Fault(delay_s=0.1)}))
    if is_stopped:
        pair.hub.stop("kv-d")
    handle, spans = pair.offer(20, want_slots=1)
    pushed = pair.push(handle, spans)
    pair.until_in_flight()
    pair.producer.close()
    assert all(future.done() for future in pushed)
    assert isinstance(pushed[0].exception(), TransferError) is is_stopped and isinstance(pushed[1].exception(), TransferError)


def test_handles_that_nobody_closes_are_forgotten_in_time(pair_of: MakePair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.kv_transfer.pushing._MAX_IDLE_HANDLES", 256)
    pair = pair_of()
    for _ in range(300):
        handle, spans = pair.offer(1, want_slots=1)
        pair.push(handle, spans)
        pair.land((handle, spans), pulls=False)
    assert len(pair.producer._pusher._writer.handles) <= 257
    pair.assert_idle()


def test_an_idle_writer_sleeps(pair_of: MakePair) -> None:
    pair = pair_of()
    handle, spans = pair.offer(3)
    pair.push(handle, spans)
    pair.land((handle, spans), pulls=False)
    thread = pair.producer._pusher._thread
    assert thread is not None and thread.ident is not None
    writer = time.pthread_getcpuclockid(thread.ident)
    time.sleep(0.05)
    before_s = time.clock_gettime(writer)
    time.sleep(0.3)
    assert time.clock_gettime(writer) - before_s < 0.05, "of the processor, whatever else runs"


def test_a_message_that_comes_sealed_is_sent_as_it_is(pair_of: MakePair) -> None:
    """Whoever packs elsewhere writes payload, padding and trailer into the send slot; one that seals wrong is found out."""
    pair = pair_of()
    handle, spans = pair.offer(1)

    def fill(place: memoryview, span: layout.MessageSpan, digest_of: int) -> None:
        assert len(place) == layout.message_bytes(span.num_bytes)
        place[:] = bytes(len(place))
        place[: span.num_bytes] = pair.content(handle.handle_id, span)
        digest = message_hash(place[: span.num_bytes], handle.handle_id, span.group, digest_of)
        trailer = place[layout.trailer_offset(span.num_bytes) :]
        layout.write_trailer(trailer, layout.trailer_start(handle.handle_id, span), digest)

    for span, digest_of in ((spans[0], 0), (spans[1], 99)):
        job = PushJob(handle=handle, span=span, fill=functools.partial(fill, span=span, digest_of=digest_of), is_sealed=True)
        assert pair.producer.push(job).result(60).num_bytes == span.num_bytes
    assert pair.land((handle, spans[:1])) == []
    assert "kv_corrupt" in pair.land((handle, spans[1:]))


def test_a_send_slot_that_cannot_be_replaced_ends_no_writer(pair_of: MakePair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped peer keeps a slot, and there is no memory for another: the writer goes on with one less."""
    pair = pair_of(num_slots=8, section=IMPATIENT)
    handle, spans = pair.offer(1, want_slots=1)
    pair.push(handle, spans)
    pair.land((handle, spans), pulls=False)

    def none_left(num_bytes: int) -> None:
        raise TransferError(f"no room for {num_bytes} bytes", code="no_memory")

    monkeypatch.setattr(pair.producer._pusher._slots, "_allocate", none_left)
    pair.hub.stop("kv-d")
    stuck, spans = pair.offer(1, want_slots=1)
    (pushed,) = pair.push(stuck, spans[:1])
    with pytest.raises(TransferError, match="write_timeout"):
        pushed.result(60)
    pair.hub.resume("kv-d")
    assert pair.producer.failure is None and pair.producer.counts().counters["send_slot_no_memory"] == 1
    after, fresh = pair.offer(1, want_slots=1)
    pair.push(after, fresh)
    pair.push(stuck, spans[1:])
    assert pair.land((after, fresh), (stuck, spans), pulls=False) == []
    assert pair.producer.failure is None


class SlowFilling:
    """A device's packing that ends when it is told to."""

    def __init__(self) -> None:
        self.ended = threading.Event()

    def is_over(self) -> bool:
        return self.ended.is_set()

    def wait(self) -> None:
        assert self.ended.wait(60)


class AheadFilling(SlowFilling):
    """One that was begun before what it reads was there."""

    def wait(self) -> float:  # type: ignore[override]  # says what packing took
        super().wait()
        return 0.0


def test_a_message_begun_before_its_group_is_over_counts_from_there(pair_of: MakePair) -> None:
    """Else a layer group's computing would be told as packing, and as a slow handoff."""
    pair = pair_of()
    handle, spans = pair.offer(1)
    filling = AheadFilling()
    pushed = pair.producer.push(PushJob(handle=handle, span=spans[0], fill=lambda room: filling, is_sealed=True))
    assert not pushed.done()
    over_s = time.monotonic()
    filling.ended.set()
    result = pushed.result(60)
    assert over_s <= result.started_s <= result.posted_s
    pair.producer.close()


def test_writes_are_looked_at_while_a_message_is_packed(pair_of: MakePair) -> None:
    """By the look that sees a write's end its notification is sent: it does not wait for the packing of another message."""
    pair = pair_of(ScriptedFaults({0: Fault(delay_s=0.05)}), num_slots=8)
    handle, spans = pair.offer(2, want_slots=2)
    filling = SlowFilling()
    first = pair.producer.push(pair.job(handle, spans[0]))
    pair.until_in_flight()
    slow = PushJob(handle=handle, span=spans[1], fill=lambda room: filling, is_sealed=True)
    second = pair.producer.push(slow)
    assert first.result(60).num_bytes == spans[0].num_bytes and not second.done()
    filling.ended.set()
    second.result(60)
    pair.producer.close()


def test_a_card_s_writer_takes_its_time_over_a_hung_write_also_beside_a_message_that_waits_for_its_group(
    pair_of: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would look every 20 us for as long as the group is computed, and take the interpreter from those who launch the layers."""
    pair = pair_of(num_slots=8, section=IMPATIENT)
    monkeypatch.setattr(SendSlots, "is_on_host", property(lambda self: False))  # as in a card's memory
    stuck, spans = pair.offer(2, want_slots=2)
    pair.hub.stop("kv-d")
    (late,) = pair.push(stuck, spans[:1])
    assert isinstance(late.exception(60), TransferError)
    filling = AheadFilling()
    pair.producer.push(PushJob(handle=stuck, span=spans[1], fill=lambda room: filling, is_sealed=True))
    pusher = pair.producer._pusher
    deadline_s = time.monotonic() + 60
    while not pusher._packing and time.monotonic() < deadline_s:
        time.sleep(0.002)
    assert pusher._packing and pusher._sleep_s() == policy.poll_delay_s(60.0, is_seen_there=False)
    filling.ended.set()


def test_who_waits_for_a_turn_is_told(pair_of: MakePair) -> None:
    """Of one landing slot the second message waits for the first one's credit."""
    pair = pair_of()
    handle, spans = pair.offer(2, want_slots=1)
    first, second = pair.push(handle, spans[:2])
    first.result(60)
    assert pair.producer.num_waiting() == 1
    pair.land((handle, spans[:2]), pulls=False)
    second.result(60)
    assert pair.producer.num_waiting() == 0
