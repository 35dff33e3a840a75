"""Owns the two sides of a measured handoff: a producer process and a consumer, with the agents and landers that serve. Knows no report.

The producer pushes what the consumer grants; credits and results come and go through a pipe.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext, SpawnProcess

import msgspec
import torch

from bench.serve.handoff_pools import NUM_SETS, Pool, Shape, Where, as_bytes, fill_pool, wait_for
from duomo.config import TransferSection
from duomo.wire.messages import RingOffered
from duomo.wire.values import Handle
from services.decode.landers import OpenTables
from services.kv_transfer import layout
from services.kv_transfer.agent import PushJob, PushResult, TransferAgent
from services.kv_transfer.layout import MessageSpan
from services.kv_transfer.memory import Memory, Place
from services.kv_transfer.transport import Span, WriteState
from services.kv_transfer.transport_nixl import NixlTransport
from services.prefill.worker import group_bounds

PRODUCER, CONSUMER = "bench-p", "bench-d"
TIMEOUT_S = 60.0
_POLL_S = 0.00005
_WRITE_POLL_S = 0.0002


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One handoff. whole_s: from the offer until the last message is verified, in its blocks and its slot free.

    transport_s: how long a write was under way, by the transport's own telemetry. pack_s: packing, hashing and waiting for a turn,
    summed over messages. lanes: what UCX wrote by.
    """

    whole_s: float
    transport_s: float
    pack_s: float
    num_messages: int
    lanes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What both processes are told. in_flight: messages that may be on their way at once."""

    section: TransferSection
    shape: Shape
    in_flight: int
    producer: Where
    consumer: Where


@dataclass(frozen=True, slots=True, kw_only=True)
class RawTarget:
    """Memory of the consumer for writes alone."""

    metadata: bytes
    address: int
    place: Place


@dataclass(frozen=True, slots=True, kw_only=True)
class RawWrites:
    """Writes alone, nothing packed and nothing verified: one prompt's bytes out of registered memory as messages of message_bytes.

    into_pid: by process_vm_writev into that process instead of the transport: what the kernel gives to CMA at most.
    """

    turn: int
    message_bytes: int
    into_pid: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushing:
    """The consumer grants `handle` (as it is on the wire): push it."""

    handle: bytes
    turn: int
    num_groups: int


def spans_of(shape: Shape, num_groups: int, slot_bytes: int) -> tuple[MessageSpan, ...]:
    bounds = group_bounds(shape.spec.num_layers, num_groups, 1)
    return layout.messages(range(shape.num_blocks), bounds, shape.spec.block_bytes, slot_bytes)


class Producer:
    """The other process: its agent, its pool, and memory to write from alone."""

    def __init__(self, pipe: Connection, setting: Setting, offer: RingOffered, target: RawTarget) -> None:
        self._pipe = pipe
        self._setting = setting
        self._target = target
        where = setting.producer
        where.make_current()
        self._transport = NixlTransport(f"kv-{PRODUCER}", setting.section, where.locks())
        self._agent = TransferAgent(PRODUCER, self._transport, setting.section, num_send_slots=setting.in_flight, allocate=where.allocate())
        self._agent.attach_ring(CONSUMER, offer)
        self._pool = Pool(setting.shape, where)
        fill_pool(self._pool)
        self._source: Memory = where.allocate()(NUM_SETS * setting.shape.num_bytes)
        as_bytes(self._source).copy_(self._pool.flat_bytes())
        wait_for(self._pool.tensor.device)
        self._transport.register(self._source)
        self._peer = self._transport.add_peer(target.metadata)

    def serve(self) -> None:
        """Do what comes through the pipe until it says None."""
        self._pipe.send("ready")
        while (told := self._pipe.recv()) is not None:
            if isinstance(told, RawWrites):
                self._pipe.send(self._write_by_transport(told) if told.into_pid is None else self._write_by_syscall(told))
            elif isinstance(told, Pushing):
                self._push(told)
            else:
                self._agent.credit(*told)
        self._agent.close()

    def _push(self, told: Pushing) -> None:
        """Queue every message; the end of the last one sends what all of them took."""
        handle = msgspec.msgpack.decode(told.handle, type=Handle)
        spans = spans_of(self._setting.shape, told.num_groups, self._setting.section.slot_bytes)
        results: list[PushResult | str] = []
        ended = threading.Lock()

        def note(future: Future[PushResult]) -> None:
            with ended:
                error = future.exception()
                results.append(future.result() if error is None else repr(error))
                if len(results) == len(spans):
                    self._pipe.send(results)

        for span in spans:
            fill = functools.partial(self._pool.fill, told.turn, handle.handle_id, span)
            self._agent.push(PushJob(handle=handle, span=span, fill=fill, is_sealed=self._pool.is_sealed)).add_done_callback(note)

    def _pieces(self, told: RawWrites) -> list[tuple[int, int]]:
        num_bytes = self._setting.shape.num_bytes
        first = told.turn % NUM_SETS * num_bytes
        return [(at, min(told.message_bytes, first + num_bytes - at)) for at in range(first, first + num_bytes, told.message_bytes)]

    def _write_by_transport(self, told: RawWrites) -> float:
        """Seconds from the first post until the transport has seen the last write's end."""
        pieces = self._pieces(told)
        started_s = time.perf_counter()
        writes = []
        for at, length in pieces:
            local = Span(self._source.address + at, length, self._source.place)
            writes.append(self._transport.write(local, self._peer, Span(self._target.address + at, length, self._target.place), b"raw"))
        while writes:
            assert time.perf_counter() < started_s + TIMEOUT_S, f"{len(writes)} writes do not end"
            states = [(write, self._transport.poll(write)) for write in writes]
            assert WriteState.FAILED not in (state for _, state in states), "a write failed: nothing is reported"
            writes = [write for write, state in states if state is WriteState.IN_FLIGHT]
            if writes and self._target.place.kind == "host":
                time.sleep(_WRITE_POLL_S)  # a loop would take the core from those that copy; the writer thread sleeps too, longer
        return time.perf_counter() - started_s

    def _write_by_syscall(self, told: RawWrites) -> float:
        write = ctypes.CDLL(None, use_errno=True).process_vm_writev
        write.restype = ctypes.c_ssize_t
        iovecs = ctypes.POINTER(_IoVec)
        write.argtypes = [ctypes.c_int, iovecs, ctypes.c_ulong, iovecs, ctypes.c_ulong, ctypes.c_ulong]
        pieces = self._pieces(told)
        started_s = time.perf_counter()
        for at, length in pieces:
            ours, theirs = _IoVec(self._source.address + at, length), _IoVec(self._target.address + at, length)
            written = write(told.into_pid, ours, 1, theirs, 1, 0)
            if written != length:
                raise OSError(ctypes.get_errno(), f"process_vm_writev wrote {written} of {length} bytes")
        return time.perf_counter() - started_s


class _IoVec(ctypes.Structure):
    """struct iovec of process_vm_writev(2)."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def produce(pipe: Connection, setting: Setting, offer: bytes, target: RawTarget) -> None:
    """The producer process."""
    torch.set_num_threads(1)
    Producer(pipe, setting, msgspec.msgpack.decode(offer, type=RingOffered), target).serve()


class Consumer:
    """This process' side, and the producer process that it starts. The creator calls close()."""

    def __init__(self, context: SpawnContext, setting: Setting) -> None:
        self._setting = setting
        self.shape, where = setting.shape, setting.consumer
        where.make_current()
        self._transport = NixlTransport(f"kv-{CONSUMER}", setting.section, where.locks())
        self._agent = TransferAgent(CONSUMER, self._transport, setting.section, num_send_slots=1, allocate=where.allocate())
        self._pool, expected = Pool(self.shape, where), Pool(self.shape, where)
        fill_pool(expected)
        self._expected = expected
        self._tables = OpenTables()
        self._raw: Memory = where.allocate()(NUM_SETS * self.shape.num_bytes)
        as_bytes(self._raw).zero_()
        wait_for(self._pool.tensor.device)
        self._transport.register(self._raw)
        offer = self._agent.open_ring(PRODUCER, 2 * setting.in_flight)  # a handle is granted half a ring at most
        target = RawTarget(metadata=self._transport.metadata(), address=self._raw.address, place=self._raw.place)
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, setting, msgspec.msgpack.encode(offer), target)
        self._producer: SpawnProcess = context.Process(target=produce, args=arguments, daemon=True)
        self._producer.start()
        theirs.close()
        assert self._answer() == "ready"

    def close(self) -> None:
        if self._producer.is_alive():
            self._pipe.send(None)
            self._producer.join(5)
        if self._producer.is_alive():
            self._producer.kill()
            self._producer.join(5)
        self._agent.close()

    def raw_s(self, turn: int, message_bytes: int, *, by_syscall: bool = False) -> float:
        """Seconds that the writes of one prompt's bytes take; then they are compared."""
        first = turn % NUM_SETS * self.shape.num_bytes
        landed = as_bytes(self._raw)[first : first + self.shape.num_bytes]
        landed.zero_()
        wait_for(landed.device)
        self._pipe.send(RawWrites(turn=turn, message_bytes=message_bytes, into_pid=os.getpid() if by_syscall else None))
        took_s = self._answer()
        assert isinstance(took_s, float), took_s
        expected = self._expected.flat_bytes()[first : first + self.shape.num_bytes].to(landed.device)
        assert torch.equal(landed, expected), "wrong bytes: nothing is reported"
        return took_s

    def handoff(self, turn: int, num_groups: int) -> Sample:
        """Hand one prompt over; then its blocks are compared."""
        table = self.shape.table(turn)
        self._pool.blocks(turn).zero_()
        wait_for(self._pool.tensor.device)
        spans = spans_of(self.shape, num_groups, self._setting.section.slot_bytes)
        handle = self._grant(len(spans))
        self._agent.expect(handle, spans)
        self._tables.open(handle.handle_id, table)
        started_s = time.perf_counter()
        self._pipe.send(Pushing(handle=msgspec.msgpack.encode(handle), turn=turn, num_groups=num_groups))
        num_left = len(spans)
        while num_left:
            landed = self._pool.lander.land(self._agent, self._tables)
            for message in landed:
                assert message.error is None, message.error
                self._pipe.send((handle.handle_id, message.message_idx))
            num_left -= len(landed)
            if not landed:
                time.sleep(_POLL_S)
                assert time.perf_counter() < started_s + TIMEOUT_S, f"{num_left} messages did not land"
        whole_s = time.perf_counter() - started_s
        self._tables.close(handle.handle_id)
        results = self._answer()
        assert isinstance(results, list) and all(isinstance(result, PushResult) for result in results), results
        assert torch.equal(self._pool.blocks(turn), self._expected.blocks(turn)), "wrong bytes: nothing is reported"
        reports = [(result.posted_s, result.report) for result in results if result.report is not None]
        assert len(reports) == len(spans), "the transport did not measure every write"
        return Sample(
            whole_s=whole_s,
            transport_s=busy_s((posted_s, posted_s + report.transfer_s) for posted_s, report in reports),
            pack_s=sum(result.posted_s - result.started_s for result in results),
            num_messages=len(spans),
            lanes=tuple(sorted({lane for _, report in reports for lane in report.lanes})),
        )

    def idle_poll_s(self) -> float:
        """Seconds of a look at rings in which nothing is expected."""
        started_s = time.perf_counter()
        for _ in range(2000):
            self._agent.due()
        return (time.perf_counter() - started_s) / 2000

    def _grant(self, num_messages: int) -> Handle:
        slots = self._agent.grant(PRODUCER, min(num_messages, self._setting.in_flight))
        assert slots is not None, "a handoff before this one has not given its slots back"
        return Handle(
            handle_id=self._agent.next_handle_id(),
            producer_boot_id=PRODUCER,
            consumer_boot_id=CONSUMER,
            model_fingerprint="",
            request_id="",
            attempt=0,
            ring_name=self._agent.ring_name(PRODUCER),
            slots=slots,
            num_tokens=self.shape.num_blocks * self.shape.spec.block_tokens,
            num_blocks=self.shape.num_blocks,
        )

    def _answer(self) -> object:
        """What the producer says next; its end, or its silence, ends the run."""
        assert self._pipe.poll(TIMEOUT_S), f"the producer has said nothing for {TIMEOUT_S:g} s"
        return self._pipe.recv()


def busy_s(spans: Iterable[tuple[float, float]]) -> float:
    """How much time (start, end) cover together: writes that overlap count once."""
    covered, end_s = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, end_s))
        end_s = max(end_s, end)
    return covered
