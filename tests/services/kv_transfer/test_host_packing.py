"""Messages are packed and sealed beside the writer, in order, whole; what a fill raises is told when it is waited for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from duomo.errors import TransferError
from duomo.wire.values import Handle
from services.kv_transfer import layout
from services.kv_transfer.host_packing import HostFilling, HostPacker
from services.kv_transfer.layout import MessageSpan
from services.kv_transfer.push_job import PushJob
from services.kv_transfer.sealing import seal
from services.kv_transfer.transport import Span, Write
from services.kv_transfer.transport_loopback import LoopbackTransport

if TYPE_CHECKING:
    from tests.services.kv_transfer.conftest import Pair


def test_a_message_is_what_packing_and_sealing_make_of_it(pair_of: Callable[..., Pair]) -> None:
    handle, spans = pair_of().offer(5)
    packer, order = HostPacker(), []
    rooms = [memoryview(bytearray(b"\xff" * layout.message_bytes(span.num_bytes))) for span in spans]

    def fill(span: MessageSpan, place: memoryview) -> None:
        order.append(span.message_idx)
        place[:] = bytes([span.message_idx + 1]) * span.num_bytes

    fillings = [packer.begin(job_of(handle, span, fill), room, wanted) for span, room in zip(spans, rooms, strict=True)]
    for filling in fillings:
        filling.wait()
        assert filling.is_over()
    for span, room in zip(spans, rooms, strict=True):
        expected = bytearray(len(room))
        expected[: span.num_bytes] = bytes([span.message_idx + 1]) * span.num_bytes
        seal(memoryview(expected), handle.handle_id, span)
        assert bytes(room) == expected
    assert order == [span.message_idx for span in spans]
    packer.close()


def wanted() -> bool:
    """A HostPacker's is_dropped of a message that is sent."""
    return False


def job_of(handle: Handle, span: MessageSpan, fill: Callable[[MessageSpan, memoryview], None]) -> PushJob:
    return PushJob(handle=handle, span=span, fill=lambda place: fill(span, place))


def test_the_next_message_is_packed_while_one_is_written(pair_of: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    """The second write ends only when the third message is being packed, whose packing begins only when the second is being written.

    The first write keeps the writer until the others wait in its line: it could not begin one that nobody has given it.
    """
    pair = pair_of()
    handle, spans = pair.offer(20, want_slots=4)
    are_given, is_writing, is_packing = threading.Event(), threading.Event(), threading.Event()
    write, met = LoopbackTransport.write, []

    def slow_write(self: LoopbackTransport, local: Span, peer: str, remote: Span, notification: bytes) -> Write:
        if not met:
            met.append(are_given.wait(5))
        else:
            is_writing.set()
            met.append(is_packing.wait(5))
        return write(self, local, peer, remote, notification)

    monkeypatch.setattr(LoopbackTransport, "write", slow_write)
    for span in spans[:3]:
        job = pair.job(handle, span)

        def fill(place: memoryview, job: PushJob = job) -> None:
            if job.span.message_idx == 2:
                met.append(is_writing.wait(5))
                is_packing.set()
            job.fill(place)

        pair.producer.push(replace(job, fill=fill))
    pushed = pair.push(handle, spans[3:])
    are_given.set()
    pair.land((handle, spans), pulls=False)
    assert all(future.result(1) for future in pushed) and len(met) > 3 and all(met)


def test_a_fill_that_fails_is_one_message_s_failure(pair_of: Callable[..., Pair]) -> None:
    pair = pair_of()
    handle, spans = pair.offer(20, want_slots=4)

    def fill(_: memoryview) -> None:
        raise ValueError("no such block")

    failed = pair.producer.push(replace(pair.job(handle, spans[0]), fill=fill))
    with pytest.raises(TransferError, match="no such block") as caught:
        failed.result(2)
    assert caught.value.code == "pack_failed"
    pair.push(handle, spans)
    pair.land((handle, spans), pulls=False)


def test_what_was_given_up_in_the_line_is_not_packed(pair_of: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first message is being packed, the others wait for the thread: their blocks are free when it is done.

    The writer goes on after the first only when it has all four: with nothing more to begin it would wait for the first to be packed.
    """
    begin, stand_in_line, are_given = HostPacker.begin, threading.Semaphore(0), threading.Event()

    def told(self: HostPacker, job: PushJob, message: memoryview, is_dropped: Callable[[], bool]) -> HostFilling:
        filling = begin(self, job, message, is_dropped)
        stand_in_line.release()
        assert are_given.wait(5)
        return filling

    monkeypatch.setattr(HostPacker, "begin", told)
    pair = pair_of()
    handle, spans = pair.offer(20, want_slots=4)
    packed, is_packing, may_end = list[int](), threading.Event(), threading.Event()

    def fill(span: MessageSpan, _: memoryview) -> None:
        packed.append(span.message_idx)
        is_packing.set()
        assert may_end.wait(5)

    futures = [pair.producer.push(job_of(handle, span, fill)) for span in spans[:4]]
    are_given.set()
    assert is_packing.wait(5) and all(stand_in_line.acquire(timeout=5) for _ in futures)
    fenced = pair.producer.cancel(handle.handle_id)
    may_end.set()
    for future in futures:
        with pytest.raises(TransferError) as caught:
            future.result(5)
        assert caught.value.code == "cancelled"
    fenced.result(5)
    assert packed == [0]


def test_a_closed_packer_begins_nothing(pair_of: Callable[..., Pair]) -> None:
    handle, spans = pair_of().offer(1)
    packer = HostPacker()
    packer.close()
    with pytest.raises(RuntimeError, match="after shutdown"):
        packer.begin(job_of(handle, spans[0], lambda span, place: None), memoryview(bytearray(1)), wanted)
