"""Owns the producer's side of an agent: the writer thread, every message until its write is terminal. Knows no wire and no engine.

A send slot is leased by a write from fill() until the write is terminal, whatever happened to its handle meanwhile: the transport reads it.
A caller's Future ends when the write is done, failed, cancelled or past its deadline; cancel()'s when no write of the handle is in flight.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from duomo.config import TransferSection
from duomo.errors import PeerError, TransferError
from duomo.wire.messages import RingOffered
from services.kv_transfer import layout, policy, writing
from services.kv_transfer.host_packing import HostPacker
from services.kv_transfer.memory import Allocate, Memory, Place
from services.kv_transfer.push_job import Packing, PendingPush, PushJob, PushResult, cancelled, pack_failed
from services.kv_transfer.send_slots import SendSlots
from services.kv_transfer.timely import timely
from services.kv_transfer.transport import Span, Transport, Write, WriteState
from services.kv_transfer.writing import Verdict

_MAX_IDLE_HANDLES = 4096  # a live one that is forgotten between two messages would lose its credits: more than are ever open at once
_MAX_CLOSED_HANDLES = 4096
_LATE_POLL_S = 0.01


@dataclass(slots=True, eq=False)
class _InFlight:
    pending: PendingPush
    write: Write
    send_slot: Memory
    started_s: float
    posted_s: float
    is_late: bool = False


class Pusher:
    """All writes of one producer process. Started by the first attach_ring(), ended by close()."""

    def __init__(
        self,
        boot_id: str,
        transport: Transport,
        section: TransferSection,
        num_send_slots: int,
        now_s: Callable[[], float],
        allocate: Allocate,
    ) -> None:
        self._boot_id = boot_id
        self._transport = transport
        self._section = section
        self._now_s = now_s
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_closing = False
        self._writer = writing.Writer()
        self._rings: dict[str, tuple[str, RingOffered]] = {}
        self._leaving: set[str] = set()
        self._pending: list[PendingPush] = []
        self._sending: PendingPush | None = None
        self._sending_slot: Memory | None = None
        self._packing: list[Packing] = []
        self._in_flight: list[_InFlight] = []
        self._packer = HostPacker()
        self._slots = SendSlots(transport, allocate, num_send_slots)
        self._fences: dict[int, Future[None]] = {}
        self._closed: OrderedDict[int, None] = OrderedDict()
        self._free_at_s = 0.0
        self.failure: TransferError | None = None
        self.counters: Counter[str] = Counter()

    def attach_ring(self, consumer_boot_id: str, offer: RingOffered) -> None:
        """A consumer offered its ring. PeerError where it cannot be reached, TransferError where the offer contradicts itself or us."""
        if offer.kv_dtype != self._section.kv_dtype:
            raise TransferError(
                f"kv_transfer.kv_dtype is {self._section.kv_dtype} in prefill and {offer.kv_dtype} in decode: both need the same",
                code="kv_dtype_mismatch",
            )
        with self._changed:
            known = self._rings.get(offer.ring_name)
            if known == (consumer_boot_id, offer) and offer.ring_name not in self._leaving:
                return
            name = self._transport.add_peer(offer.agent_metadata)
            if name != offer.ring_name:
                raise TransferError(f"ring {offer.ring_name} carries the metadata of agent {name}", code="unknown_ring")
            self._leaving.discard(name)
            self._rings[name] = (consumer_boot_id, offer)
            self._slots.make(offer.slot_bytes)
            if self._thread is None:
                self._thread = threading.Thread(target=timely(self._run), name="kv-writer", daemon=True)
                self._thread.start()

    def detach(self, consumer_boot_id: str) -> None:
        """The consumer is gone: nothing more starts, jobs fail, and it is forgotten once its last write is terminal."""
        with self._changed:
            for name in [name for name, (owner, _) in self._rings.items() if owner == consumer_boot_id]:
                self._writer = writing.cancel_ring(self._writer, name)
                self._leaving.add(name)
            self._settle()
            self._changed.notify_all()

    def push(self, job: PushJob) -> Future[PushResult]:
        """Send one message when its turn has come. The future raises TransferError (or PeerError) where it did not arrive."""
        future: Future[PushResult] = _new_future()
        handle = job.handle
        with self._changed:
            owner, offer = self._rings.get(handle.ring_name, ("", None))
            refusal = ""
            if self._is_closing or handle.handle_id in self._closed or handle.ring_name in self._leaving:
                refusal = "the handle is closed"
            elif offer is None or owner != handle.consumer_boot_id or handle.producer_boot_id != self._boot_id:
                refusal = f"the handle is not for this process or for no ring that is attached ({handle.ring_name})"
            elif not handle.slots or max(handle.slots) >= offer.num_slots or job.span.num_bytes > offer.slot_bytes:
                refusal = "the handle's slots do not fit the ring"
            elif layout.message_bytes(job.span.num_bytes) > self._slots.num_bytes:
                refusal = "the message does not fit a send slot: kv_transfer.slot_bytes differs between the replicas"
            if refusal:
                future.set_exception(TransferError(f"handle {handle.handle_id}: {refusal}", code="stale_handle"))
                return future
            self._writer = writing.open_handle(self._writer, handle.handle_id, handle.ring_name, handle.slots)
            self._pending.append(PendingPush(job, future))
            self._changed.notify_all()
        return future

    def credit(self, handle_id: int, message_idx: int) -> None:
        """GroupLanded came: the slot's next message may go."""
        with self._changed:
            self._writer = writing.credit(self._writer, handle_id, message_idx)
            self._settle()
            self._changed.notify_all()

    def cancel(self, handle_id: int) -> Future[None]:
        """Start no further message of the handle. Resolves when none is in flight: TransferFenced may be sent. Again: the same future."""
        with self._changed:
            fence = self._fences.get(handle_id)
            if fence is None:
                fence = self._fences[handle_id] = _new_future()
                self._closed[handle_id] = None
                while len(self._closed) > _MAX_CLOSED_HANDLES:
                    self._closed.popitem(last=False)
                self._writer = writing.cancel(self._writer, handle_id)
                self._settle()
                self._changed.notify_all()
            return fence

    def num_waiting(self) -> int:
        """Messages that are not being packed yet."""
        with self._changed:
            return len(self._pending)

    def num_in_flight(self) -> int:
        """Writes that are not terminal."""
        with self._changed:
            return len(self._in_flight)

    def close(self, timeout_s: float = 1.0) -> None:
        """Fail what is queued, wait shortly for what is in flight, end the thread, give the send slots back."""
        with self._changed:
            self._is_closing = True
            for name in self._rings:
                self._writer = writing.cancel_ring(self._writer, name)
            self._settle()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s)
        self._packer.close()
        with self._changed:
            held = [self._sending_slot] if self._sending_slot is not None else []
            self._slots.release([*held, *(one.send_slot for one in self._packing), *(one.send_slot for one in self._in_flight)])

    def _run(self) -> None:
        try:
            self._write_until_closed()
        except Exception as error:  # nobody else would hear of it: every waiter gets a typed failure, and so does every later push
            self._fail_all(TransferError(f"the writer thread failed: {error!r}", code="writer_failed", retryable=False))
            raise

    def _fail_all(self, error: TransferError) -> None:
        with self._changed:
            self._is_closing = True
            self.failure = error
            self.counters["writer_failed"] += 1
            sending = [self._sending] if self._sending is not None else []
            sending += [*(one.pending for one in self._packing), *(one.pending for one in self._in_flight)]
            waiting = [pending.future for pending in (*sending, *self._pending)]
            self._pending = []
        for future in waiting:
            if not future.done():
                future.set_exception(error)

    def _write_until_closed(self) -> None:
        give_up_s: float | None = None
        while True:
            with self._changed:
                self._poll_writes()
                packed = self._take_packed()
                pending = self._choose() if packed is None else None
                if packed is None and pending is None:
                    if self._is_closing and not self._in_flight:
                        return
                    if self._is_closing:
                        give_up_s = give_up_s if give_up_s is not None else self._now_s() + self._section.write_timeout_s
                        if self._now_s() >= give_up_s:
                            for packing in self._packing:  # beside a write that does not end; their slots stay theirs
                                packing.pending.future.set_exception(cancelled(packing.pending))
                            return
                    self._changed.wait(self._sleep_s())
                    continue
                self._sending = pending if packed is None else packed.pending
            if packed is not None:
                self._send(packed)
            elif pending is not None:
                self._pack(pending)
            self._sending = self._sending_slot = None

    def _sleep_s(self) -> float | None:
        is_on_host = self._slots.is_on_host
        if not self._in_flight:
            return policy.poll_delay_s(0.0, is_seen_there=is_on_host) if self._packing else None
        if self._packing and is_on_host:
            return policy.poll_delay_s(0.0)
        if not self._packing and all(flight.is_late for flight in self._in_flight):
            return _LATE_POLL_S
        # a device may pack behind a group that is still computed: what is right for the newest write is often enough for that
        newest_s = max(flight.posted_s for flight in self._in_flight)
        return policy.poll_delay_s(self._now_s() - newest_s, is_seen_there=is_on_host)

    def _take_packed(self) -> Packing | None:
        """The first message in its send slot: when it is whole, or there is nothing to begin or to look at but to wait for it."""
        if not self._packing:
            return None
        filling = self._packing[0].filling
        is_busy = bool(self._in_flight) or (self._slots.has_free and self._next_place() is not None)
        return None if filling is not None and is_busy and not filling.is_over() else self._packing.pop(0)

    def _choose(self) -> PendingPush | None:
        """Take the first job whose turn has come, if a send slot is free."""
        self._settle()
        place = self._next_place() if self._slots.has_free else None
        return None if place is None else self._pending.pop(place)

    def _next_place(self) -> int | None:
        """Of that job. One whose slot another message is being packed for waits, as for one that is being written there."""
        taken = {packing.pending.target for packing in self._packing}
        for place, pending in enumerate(self._pending):
            if writing.may_write(self._writer, *pending.key) is Verdict.GO and pending.target not in taken:
                return place
        return None

    def _pack(self, pending: PendingPush) -> None:
        """Begin to pack a message into a send slot that is free. In the writer thread, without the lock."""
        job, started_s = pending.job, self._now_s()
        with self._changed:
            send_slot = self._sending_slot = self._slots.take()
        num_bytes = layout.message_bytes(job.span.num_bytes)
        message = send_slot.slice(0, num_bytes)
        try:
            filling = job.fill(message) if job.is_sealed else self._packer.begin(job, message, lambda: self._is_dropped(pending))
        except Exception as error:  # a caller's code: its fault becomes this message's typed failure, and the writer lives on
            self._abandon(pending, send_slot, pack_failed(pending, error))
            return
        self._packing.append(Packing(pending, send_slot, started_s, filling))

    def _send(self, packed: Packing) -> None:
        """Wait until it is whole, and for the pace, and post it. In the writer thread without the lock, but for the decision to post."""
        pending, send_slot = packed.pending, packed.send_slot
        self._sending_slot = send_slot
        job, span, handle_id = pending.job, pending.job.span, pending.job.handle.handle_id
        num_bytes = layout.message_bytes(span.num_bytes)
        try:
            packed.wait(self._now_s)
        except Exception as error:  # the device's fault, as a caller's above
            self._abandon(pending, send_slot, pack_failed(pending, error))
            return
        with self._changed:
            self._free_at_s = policy.paced_until_s(self._free_at_s, self._now_s(), num_bytes, self._section.max_bytes_per_s)
            while (left_s := self._free_at_s - self._now_s()) > 0 and not self._is_closing:
                self._changed.wait(min(left_s, self._sleep_s() or left_s))
                self._poll_writes()
            verdict = writing.may_write(self._writer, *pending.key)
            if verdict is Verdict.GO:
                self._writer = writing.start_write(self._writer, *pending.key)
                offer = self._rings[job.handle.ring_name][1]
        if verdict is not Verdict.GO:
            self._abandon(pending, send_slot, cancelled(pending))
            return
        slot = layout.slot_of(job.handle.slots, span.message_idx)
        there = Place(offer.memory, offer.device_idx)
        remote = Span(offer.base_address + slot * layout.slot_stride(offer.slot_bytes), num_bytes, there)
        note = layout.notification(handle_id, span.message_idx)
        posted_s = self._now_s()
        try:
            write = self._transport.write(Span(send_slot.address, num_bytes, send_slot.place), offer.ring_name, remote, note)
        except (PeerError, TransferError) as error:
            with self._changed:
                self._writer = writing.end_write(self._writer, *pending.key)
            self._abandon(pending, send_slot, error)
            return
        with self._changed:
            self._in_flight.append(_InFlight(pending, write, send_slot, packed.started_s, posted_s))

    def _abandon(self, pending: PendingPush, send_slot: Memory, error: TransferError | PeerError) -> None:
        with self._changed:
            self._slots.give(send_slot)
            self.counters[f"push_{error.code}"] += 1
            self._settle()
        pending.future.set_exception(error)

    def _poll_writes(self) -> None:
        """Look at every write in flight. The lock is held, so that a terminal write and its slots change together."""
        now_s = self._now_s()
        for flight in list(self._in_flight):
            state = self._transport.poll(flight.write)
            future = flight.pending.future
            if state is WriteState.IN_FLIGHT:
                if not flight.is_late and now_s - flight.posted_s >= self._section.write_timeout_s:
                    flight.is_late = True
                    self.counters["push_write_timeout"] += 1
                    self._replace_kept_slot()
                    future.set_exception(TransferError(f"a write is in flight for {now_s - flight.posted_s:.3f} s", code="write_timeout"))
                continue
            self._in_flight.remove(flight)
            self._writer = writing.end_write(self._writer, *flight.pending.key)
            self._slots.give(flight.send_slot)
            if flight.is_late:
                pass  # its future has ended already
            elif state is WriteState.DONE:
                self.counters["messages_pushed"] += 1
                future.set_result(self._result(flight))
            else:
                self.counters["push_transfer_failed"] += 1
                future.set_exception(TransferError(f"a write failed: {flight.write.detail}"))
        self._settle()

    def _result(self, flight: _InFlight) -> PushResult:
        report = flight.write.report
        if report is not None:
            self.counters["transport_bytes"] += report.num_bytes
            self.counters["transport_descriptors"] += report.num_descriptors
            self.counters["transport_post_us"] += round(report.post_s * 1e6)
            self.counters["transport_transfer_us"] += round(report.transfer_s * 1e6)
        elif self._transport.measures_writes:
            self.counters["transport_unmeasured"] += 1
        return PushResult(
            num_bytes=flight.pending.job.span.num_bytes,
            started_s=flight.started_s,
            posted_s=flight.posted_s,
            ended_s=self._now_s(),
            report=report,
        )

    def _settle(self) -> None:
        """Fail dropped jobs, resolve fences, forget what is over. The lock is held."""
        dropped = [p for p in self._pending if self._is_dropped(p)]
        if dropped:
            self._pending = [p for p in self._pending if p not in dropped]
        for pending in dropped:
            pending.future.set_exception(cancelled(pending))
        for handle_id in [h for h in self._fences if writing.is_fenced(self._writer, h)]:
            self._writer = writing.forget(self._writer, handle_id)
            self._fences.pop(handle_id).set_result(None)
        for name in [name for name in self._leaving if writing.is_ring_idle(self._writer, name)]:
            self._leaving.discard(name)
            self._rings.pop(name, None)
            self._transport.remove_peer(name)
        if len(self._writer.handles) > _MAX_IDLE_HANDLES:
            packing = [one.pending for one in self._packing] + ([self._sending] if self._sending is not None else [])
            waiting = {pending.key[0] for pending in (*self._pending, *packing)}
            for handle_id, handle in list(self._writer.handles.items())[: len(self._writer.handles) - _MAX_IDLE_HANDLES]:
                if not handle.in_flight and handle_id not in waiting:
                    self._writer = writing.forget(self._writer, handle_id)

    def _is_dropped(self, pending: PendingPush) -> bool:
        """From any thread, the lock held or not: a Writer does not change, another takes its place."""
        return writing.may_write(self._writer, *pending.key) is Verdict.DROP

    def _replace_kept_slot(self) -> None:
        """Where there is memory; without, the others go on with one slot less."""
        try:
            self._slots.replace_kept()
        except TransferError as error:
            self.counters[f"send_slot_{error.code}"] += 1


def _new_future() -> Future[Any]:
    """A future that its waiter cannot cancel: what was started here ends here, and is told."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future
