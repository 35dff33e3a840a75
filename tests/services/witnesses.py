"""Owns what a soak of handoffs writes down beside the system: every message packed, written, refused, accepted. Knows no request.

A witness keeps its own digest of each message (BLAKE2, of what prefill packed), so that nothing that the transfer believes by its own hash
goes unexamined. `found` lists what must never happen; the rest are counts for the ledger of a run.
"""

from __future__ import annotations

import ctypes
import hashlib
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from duomo.config import TransferSection
from duomo.errors import PeerError
from duomo.wire.values import Handle
from services.kv_transfer import layout
from services.kv_transfer.agent import Landed, TransferAgent
from services.kv_transfer.faults import Fault, FaultPlan
from services.kv_transfer.layout import MessageSpan
from services.kv_transfer.memory import Region
from services.kv_transfer.transport import Span, Transport, Write, WriteReport, WriteState
from services.prefill.pending import Pending
from services.prefill.worker import PrefillWorker

Key = tuple[int, int]  # (handle id, message index)


@dataclass
class Witness:
    """Everything seen, by message. Thread-safe. closed: handles given up whose slots came back, by how."""

    found: list[str] = field(default_factory=list)
    handles: dict[int, int] = field(default_factory=dict)  # offered: how many messages each has
    payload_bytes: dict[Key, int] = field(default_factory=dict)
    writes: dict[Key, list[Fault]] = field(default_factory=lambda: defaultdict(list))
    accepted: Counter[Key] = field(default_factory=Counter)
    refused: Counter[Key] = field(default_factory=Counter)
    aborted: set[int] = field(default_factory=set)
    fenced: set[int] = field(default_factory=set)
    orphaned: set[int] = field(default_factory=set)
    num_posted: int = 0
    num_terminal: int = 0
    _digests: dict[Key, bytes] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def packed(self, key: Key, payload: memoryview) -> None:
        """Prefill packs a message, perhaps again: leased blocks do not change in between."""
        digest = hashlib.blake2b(payload, digest_size=16).digest()
        with self._lock:
            if self._digests.setdefault(key, digest) != digest:
                self.found.append(f"message {key} was packed twice with different bytes: its blocks were not leased any more")

    def copied(self, key: Key, payload: memoryview) -> None:
        """Decode has just copied these bytes for the message."""
        digest = hashlib.blake2b(payload, digest_size=16).digest()
        with self._lock:
            if self._digests.get(key) != digest:
                self.found.append(f"message {key} was copied, and is not what was packed")

    def is_complete(self, handle_id: int) -> bool:
        """Whether every message of the handle was accepted."""
        return all(self.accepted[handle_id, message] for message in range(self.handles[handle_id]))

    def corruptions(self) -> Counter[str]:
        """What became of each message whose bytes were spoilt on the way where somebody reads them: `by_hash` refused, `rewritten`
        before it was looked at, or its handle `given_up` first. `accepted` would be a message taken for right without another write."""
        fates: Counter[str] = Counter()
        for key, faults in self.writes.items():
            spoilt = [place for place, fault in enumerate(faults) if _spoils(fault, self.payload_bytes[key])]
            if not spoilt:
                continue
            if self.refused[key]:
                fates["by_hash"] += 1
            elif self.accepted[key]:
                fates["rewritten" if len(faults) > len(spoilt) else "accepted"] += 1
            else:
                fates["given_up"] += 1
        return fates


def _spoils(fault: Fault, num_bytes: int) -> bool:
    """Whether a flipped byte lies in what is verified: the payload, or the 40 bytes of the trailer that say something."""
    at = fault.corrupt_byte
    if at is None or fault.drops_data:
        return False
    end = layout.trailer_offset(num_bytes)
    return at < num_bytes or end <= at < end + 40


class WitnessedWorker(PrefillWorker):
    """Prefill's worker, its messages written down."""

    witness: Witness

    def pack(self, handle_id: int, span: MessageSpan, blocks: Sequence[int], out: memoryview, after: Pending[float] | None = None) -> None:
        super().pack(handle_id, span, blocks, out, after)
        self.witness.packed((handle_id, span.message_idx), out)


class WitnessedAgent(TransferAgent):
    """An agent that tells what it accepts, refuses and gives up."""

    def __init__(self, witness: Witness, boot_id: str, transport: Transport, section: TransferSection, num_send_slots: int) -> None:
        super().__init__(boot_id, transport, section, num_send_slots=num_send_slots)
        self._witness = witness
        self._payloads: dict[Key, memoryview] = {}

    def expect(self, handle: Handle, spans: Sequence[MessageSpan]) -> None:
        self._witness.handles[handle.handle_id] = len(spans)
        self._witness.payload_bytes.update({(handle.handle_id, span.message_idx): span.num_bytes for span in spans})
        super().expect(handle, spans)

    def poll(self) -> list[Landed]:
        landed = super().poll()
        for message in landed:
            key = (message.handle_id, message.span.message_idx)
            if message.error is not None:
                self._witness.refused[key] += 1
                continue
            self._witness.accepted[key] += 1
            self._payloads[key] = message.payload  # not read yet: given up now, its slot may be another's before anybody copies it
        return landed

    def copied(self, landed: Landed) -> Landed:
        copied = super().copied(landed)
        if copied.error is not None:
            key = (landed.handle_id, landed.span.message_idx)
            self._witness.refused[key] += 1
            self._witness.accepted[key] -= 1
            self._payloads.pop(key, None)
        return copied

    def release(self, handle_id: int, message_idx: int) -> None:
        """Its payload has just been copied into blocks."""
        key = (handle_id, message_idx)
        payload = self._payloads.pop(key, None)
        if payload is not None:  # else its handle was given up in between
            self._witness.copied(key, payload)
        super().release(handle_id, message_idx)

    def abort(self, handle_id: int) -> None:
        self._witness.aborted.add(handle_id)
        for key in [key for key in self._payloads if key[0] == handle_id]:
            del self._payloads[key]
        super().abort(handle_id)

    def fence(self, handle_id: int) -> None:
        self._witness.fenced.add(handle_id)
        super().fence(handle_id)

    def peer_dead(self, producer_boot_id: str) -> tuple[int, ...]:
        ended = super().peer_dead(producer_boot_id)
        self._witness.orphaned.update(ended)
        return ended

    def peer_given_up(self, producer_boot_id: str) -> tuple[int, ...]:
        ended = super().peer_given_up(producer_boot_id)
        self._witness.orphaned.update(ended)
        return ended


@dataclass(eq=False, kw_only=True)
class _Write:
    """A write of a FaultyTransport. inner: None until it is posted; due_s: when that is."""

    local: Span
    peer: str
    remote: Span
    notification: bytes
    due_s: float
    inner: Write | None = None
    state: WriteState = WriteState.IN_FLIGHT
    detail: str = ""

    @property
    def report(self) -> WriteReport | None:
        return self.inner.report if self.inner is not None else None


class FaultyTransport:
    """Any transport, its writes watched, and spoilt, lost or late as a plan says. A Transport.

    A late write is in flight from the start: its bytes go out when it is polled behind its time.
    """

    def __init__(self, inner: Transport, witness: Witness, faults: FaultPlan) -> None:
        self.name, self.transport_name, self.measures_writes = inner.name, inner.transport_name, inner.measures_writes
        self._inner = inner
        self._witness = witness
        self._faults = faults
        self._num_writes = 0

    def write(self, local: Span, peer: str, remote: Span, notification: bytes) -> Write:
        fault = self._faults.fault(self._num_writes, local.length)
        self._num_writes += 1
        if fault.corrupt_byte is not None:
            ctypes.c_uint8.from_address(local.base + fault.corrupt_byte).value ^= 0xFF
        late_s = time.monotonic() + fault.delay_s if fault.delay_s else 0.0
        note = b"lost" if fault.drops_notification else notification
        write = _Write(local=local, peer=peer, remote=remote, notification=note, due_s=late_s)
        if fault.drops_data:
            write.state = WriteState.DONE
        elif not fault.delay_s:
            self._post(write)
        key = layout.read_notification(notification)
        assert key is not None
        self._witness.writes[key].append(fault)
        return write

    def poll(self, write: Write) -> WriteState:
        assert isinstance(write, _Write), write
        if write.state is not WriteState.IN_FLIGHT:
            return write.state
        if write.inner is None:
            if time.monotonic() < write.due_s:
                return WriteState.IN_FLIGHT
            try:
                self._post(write)
            except PeerError as error:
                write.state, write.detail = WriteState.FAILED, error.detail
                return write.state
        assert write.inner is not None
        write.state = self._inner.poll(write.inner)
        if write.state is not WriteState.IN_FLIGHT:
            self._witness.num_terminal += 1
            write.detail = write.inner.detail
            if getattr(write.inner, "handle", None) is not None:
                self._witness.found.append("the handle of a write that is over was not released")
        return write.state

    def _post(self, write: _Write) -> None:
        write.inner = self._inner.write(write.local, write.peer, write.remote, write.notification)
        self._witness.num_posted += 1

    def register(self, region: Region) -> None:
        self._inner.register(region)

    def deregister(self, region: Region) -> None:
        self._inner.deregister(region)

    def metadata(self) -> bytes:
        return self._inner.metadata()

    def lanes(self, peer: str) -> tuple[str, ...]:
        return self._inner.lanes(peer)

    def add_peer(self, metadata: bytes) -> str:
        return self._inner.add_peer(metadata)

    def remove_peer(self, name: str) -> None:
        self._inner.remove_peer(name)

    def notifications(self) -> list[bytes]:
        return self._inner.notifications()

    def sibling(self, name: str) -> Transport:
        return FaultyTransport(self._inner.sibling(name), self._witness, self._faults)

    def close(self) -> None:
        self._inner.close()
