"""Owns what a producer is asked to send, and what it answers. Knows no thread, slot or transport: pushing.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from duomo.wire.messages import Handle
from services.kv_transfer.layout import MessageSpan
from services.kv_transfer.transport import WriteReport


@dataclass(frozen=True, slots=True, kw_only=True)
class PushJob:
    """One message to send: fill(payload) writes exactly span.num_bytes into registered memory, in the writer thread.

    is_sealed: fill is given room for the whole message and writes padding and trailer too (layout.message_bytes, hashing.message_hash).
    The room is a memoryview, or bytes of the device where send slots lie in one: then fill seals, and returns when all is written.
    """

    handle: Handle
    span: MessageSpan
    fill: Callable[[Any], None]
    is_sealed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PushResult:
    """A message is in D's memory. Times are monotonic seconds of this process, from the start of packing to the end of the write.

    posted_s: it was packed, hashed and paced, and the write began. report: what the transport measured of the write, if it does.
    """

    num_bytes: int
    started_s: float
    posted_s: float
    ended_s: float
    report: WriteReport | None
