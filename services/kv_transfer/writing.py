"""Owns the producer's half of the lifetime: which message may be written when, and when a handle is fenced. PURE.

The consumer's half and the reasons are in lifetime.py. State here is one process's: every ring it writes to, every handle it was given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum


class Verdict(Enum):
    """Whether a message may be written: now, not yet, or never again."""

    GO = "go"
    WAIT = "wait"
    DROP = "drop"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProducerHandle:
    """A grant seen from the producer."""

    ring_name: str
    slots: tuple[int, ...]
    credited: frozenset[int] = frozenset()
    in_flight: frozenset[int] = frozenset()
    is_cancelled: bool = False

    def slot(self, message_idx: int) -> tuple[str, int]:
        """The (ring, slot) that message_idx goes to."""
        return self.ring_name, self.slots[message_idx % len(self.slots)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """Everything that one process writes. busy: slots with a write in flight, and whose it is."""

    handles: Mapping[int, ProducerHandle] = field(default_factory=dict)
    busy: Mapping[tuple[str, int], tuple[int, int]] = field(default_factory=dict)


def may_write(writer: Writer, handle_id: int, message_idx: int) -> Verdict:
    """GO only if no write to the slot is in flight, the message's turn has come, and it has neither been credited nor cancelled."""
    handle = writer.handles.get(handle_id)
    if handle is None or handle.is_cancelled or message_idx in handle.credited:
        return Verdict.DROP
    before = message_idx - len(handle.slots)
    if (before >= 0 and before not in handle.credited) or handle.slot(message_idx) in writer.busy:
        return Verdict.WAIT
    return Verdict.GO


def open_handle(writer: Writer, handle_id: int, ring_name: str, slots: tuple[int, ...]) -> Writer:
    """A handle was granted; opening it again changes nothing."""
    if handle_id in writer.handles:
        return writer
    return replace(writer, handles={**writer.handles, handle_id: ProducerHandle(ring_name=ring_name, slots=slots)})


def start_write(writer: Writer, handle_id: int, message_idx: int) -> Writer:
    """A write begins; may_write() said GO."""
    assert may_write(writer, handle_id, message_idx) is Verdict.GO, (handle_id, message_idx)
    handle = writer.handles[handle_id]
    handle = replace(handle, in_flight=handle.in_flight | {message_idx})
    busy = {**writer.busy, handle.slot(message_idx): (handle_id, message_idx)}
    return replace(writer, handles={**writer.handles, handle_id: handle}, busy=busy)


def end_write(writer: Writer, handle_id: int, message_idx: int) -> Writer:
    """A write is terminal (done or failed): no byte of it moves any more."""
    busy = {slot: owner for slot, owner in writer.busy.items() if owner != (handle_id, message_idx)}
    handle = writer.handles.get(handle_id)
    if handle is None:
        return replace(writer, busy=busy)
    handle = replace(handle, in_flight=handle.in_flight - {message_idx})
    return replace(writer, handles={**writer.handles, handle_id: handle}, busy=busy)


def credit(writer: Writer, handle_id: int, message_idx: int) -> Writer:
    """The consumer released a message: its slot's next message may go."""
    handle = writer.handles.get(handle_id)
    if handle is None:
        return writer
    return replace(writer, handles={**writer.handles, handle_id: replace(handle, credited=handle.credited | {message_idx})})


def cancel(writer: Writer, handle_id: int) -> Writer:
    """No further message of the handle starts."""
    handle = writer.handles.get(handle_id)
    if handle is None:
        return writer
    return replace(writer, handles={**writer.handles, handle_id: replace(handle, is_cancelled=True)})


def is_fenced(writer: Writer, handle_id: int) -> bool:
    """Whether no write of the handle is or will be in flight: TransferFenced may be sent."""
    handle = writer.handles.get(handle_id)
    return handle is None or (handle.is_cancelled and not handle.in_flight)


def forget(writer: Writer, handle_id: int) -> Writer:
    """A fenced handle is dropped; its id is never granted again."""
    return replace(writer, handles={h: state for h, state in writer.handles.items() if h != handle_id})


def cancel_ring(writer: Writer, ring_name: str) -> Writer:
    """The ring's consumer is gone: nothing more starts. Writes under way stay busy until they are terminal."""
    handles = {h: replace(state, is_cancelled=True) if state.ring_name == ring_name else state for h, state in writer.handles.items()}
    return replace(writer, handles=handles)


def is_ring_idle(writer: Writer, ring_name: str) -> bool:
    """Whether no write to the ring is in flight."""
    return all(slot[0] != ring_name for slot in writer.busy)
