"""Owns one landing ring: its memory, its state, and the messages that may land in it now. Knows no other ring, no lock and no wire.

The state's rules are lifetime.py's, the bytes' places layout.py's; landing.py owns all rings of a process and their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from duomo.wire.messages import RingOffered
from duomo.wire.values import Handle
from services.kv_transfer import layout, lifetime, policy
from services.kv_transfer.hashing import message_hash
from services.kv_transfer.layout import MessageSpan
from services.kv_transfer.lifetime import SlotPhase
from services.kv_transfer.memory import Memory
from services.kv_transfer.transport import Transport

if TYPE_CHECKING:  # a CPU's agent runs without torch
    from torch import Tensor


@dataclass(slots=True, eq=False)
class Awaited:
    """A message that may land now; `start` is how its trailer begins. message: all its memory, payload to trailer, where it lies.

    is_examined: somebody is finding out whether it lies there whole, and will say so (landing.judged). In a device's memory nobody looks
    for a trailer: the message is due from its notification on, and one whose notification is lost is pulled as one that never came.
    """

    handle_id: int
    span: MessageSpan
    start: bytes
    message: memoryview | Tensor
    announced_s: float | None = None
    look: policy.Look | None = None
    is_examined: bool = False

    @property
    def payload(self) -> memoryview:
        """Of a message in the host's memory; of a device's a copy, which waits for the device."""
        return self._on_host()[: self.span.num_bytes]

    @property
    def key(self) -> tuple[int, int]:
        return self.handle_id, self.span.message_idx

    def may_be_there(self) -> bool:
        """Whether it is worth a verification: its trailer is seen, or on a device said to be there."""
        if not isinstance(self.message, memoryview):
            return self.announced_s is not None
        return _trailer(self.message, self.span)[: len(self.start)] == self.start

    def is_due(self, now_s: float) -> bool:
        """Whether something may lie there, and it is time to look (again)."""
        if self.is_examined:
            return False
        if self.look is not None and now_s < self.look.next_s:
            return False
        return self.announced_s is not None or self.may_be_there()

    def is_right(self) -> bool:
        """Whether the message lies there whole."""
        if not self.may_be_there():
            return False
        message = self._on_host()
        trailer = _trailer(message, self.span)
        digest = message_hash(message[: self.span.num_bytes], self.handle_id, self.span.group, self.span.message_idx)
        return trailer[: len(self.start)] == self.start and digest == layout.read_hash(trailer)

    def expect_anew(self) -> None:
        """Only a rewrite is looked at from here on."""
        if isinstance(self.message, memoryview):
            _trailer(self.message, self.span)[:] = bytes(layout.TRAILER_BYTES)
        self.look = self.announced_s = None

    def _on_host(self) -> memoryview:
        return self.message if isinstance(self.message, memoryview) else memoryview(self.message.cpu().numpy().tobytes())


@dataclass(slots=True, eq=False)
class RingMemory:
    """A ring's memory, its agent, its state. offered: the handles of its state. pulled: messages that may be written twice."""

    producer_boot_id: str
    region: Memory
    transport: Transport
    offer: RingOffered
    state: lifetime.Ring
    spans: dict[int, tuple[MessageSpan, ...]] = field(default_factory=dict)
    awaited: dict[tuple[int, int], Awaited] = field(default_factory=dict)
    offered: dict[int, Handle] = field(default_factory=dict)
    pulled: set[tuple[int, int]] = field(default_factory=set)
    crowded_since_s: float | None = None

    def note_crowding(self, now_s: float) -> None:
        """Called after each change of the quarantine."""
        if not policy.is_crowded(self.state.count(SlotPhase.QUARANTINED), self.offer.num_slots):
            self.crowded_since_s = None
        elif self.crowded_since_s is None:
            self.crowded_since_s = now_s

    def apply(self, event: lifetime.RingEvent) -> tuple[lifetime.RingEffect, ...]:
        self.state, effects = lifetime.step(self.state, event)
        for effect in effects:
            if isinstance(effect, lifetime.HandleEnded):
                self.offered.pop(effect.handle_id, None)
        return effects

    def quarantined(self) -> list[Handle]:
        """Handles that were given up, and whose fence has not come."""
        is_given_up = lifetime.HandlePhase.QUARANTINED
        return [self.offered[handle_id] for handle_id, handle in self.state.handles.items() if handle.phase is is_given_up]

    def await_turns(self, handle_id: int) -> None:
        """Look for every message of the handle whose turn has come."""
        handle = self.state.handles[handle_id]
        for message_idx in handle.awaited():
            if (handle_id, message_idx) not in self.awaited:
                span = self.spans[handle_id][message_idx]
                base = layout.slot_of(handle.slots, message_idx) * layout.slot_stride(self.offer.slot_bytes)
                self.awaited[handle_id, message_idx] = Awaited(
                    handle_id,
                    span,
                    layout.trailer_start(handle_id, span),
                    self.region.slice(base, layout.message_bytes(span.num_bytes)),
                )

    def drop(self, handle_id: int) -> None:
        """Forget what was expected of the handle."""
        self.spans.pop(handle_id, None)
        self.pulled = {key for key in self.pulled if key[0] != handle_id}
        for key in [key for key in self.awaited if key[0] == handle_id]:
            del self.awaited[key]

    def wipe_trailers(self, handle: Handle, spans: Sequence[MessageSpan]) -> None:
        """An earlier life's trailer cannot be mistaken, but cannot help either: wipe where the handle's messages end, on a host."""
        stride = layout.slot_stride(self.offer.slot_bytes)
        for span in spans[: len(handle.slots)]:
            end = layout.slot_of(handle.slots, span.message_idx) * stride + layout.trailer_offset(span.num_bytes)
            place = self.region.slice(end, layout.TRAILER_BYTES)
            if isinstance(place, memoryview):
                place[:] = bytes(layout.TRAILER_BYTES)


def _trailer(message: memoryview, span: MessageSpan) -> memoryview:
    return message[layout.trailer_offset(span.num_bytes) :]
