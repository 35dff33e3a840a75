"""Owns one landing ring: its memory, its state, and the messages that may land in it now. Knows no other ring, no lock and no wire.

The state's rules are lifetime.py's, the bytes' places layout.py's; landing.py owns all rings of a process and their order.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from duomo.wire.messages import Handle, RingOffered
from services.kv_transfer import layout, lifetime, policy
from services.kv_transfer.hashing import message_hash
from services.kv_transfer.layout import MessageSpan
from services.kv_transfer.lifetime import SlotPhase
from services.kv_transfer.memory import Region
from services.kv_transfer.transport import Transport


@dataclass(slots=True, eq=False)
class Awaited:
    """A message that may land now; `start` is how its trailer begins. message: all its memory, payload to trailer.

    is_examined: somebody is finding out whether it lies there whole, and will say so (landing.judged).
    """

    handle_id: int
    span: MessageSpan
    start: bytes
    message: memoryview
    announced_s: float | None = None
    look: policy.Look | None = None
    is_examined: bool = False

    @property
    def payload(self) -> memoryview:
        return self.message[: self.span.num_bytes]

    @property
    def trailer(self) -> memoryview:
        return self.message[layout.trailer_offset(self.span.num_bytes) :]

    @property
    def key(self) -> tuple[int, int]:
        return self.handle_id, self.span.message_idx

    def has_trailer(self) -> bool:
        return self.trailer[: len(self.start)] == self.start

    def is_due(self, now_s: float) -> bool:
        """Whether something may lie there, and it is time to look (again)."""
        if self.is_examined:
            return False
        if self.look is not None and now_s < self.look.next_s:
            return False
        return self.announced_s is not None or self.has_trailer()

    def is_right(self) -> bool:
        """Whether the message lies there whole."""
        if not self.has_trailer():
            return False
        digest = message_hash(self.payload, self.handle_id, self.span.group, self.span.message_idx)
        return digest == layout.read_hash(self.trailer)


@dataclass(slots=True, eq=False)
class RingMemory:
    """A ring's memory, its agent, its state. offered: the handles of its state. pulled: messages that may be written twice."""

    producer_boot_id: str
    region: Region
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
