"""Owns what a producer is asked to send, how a message is filled, and what is answered. Knows no thread, slot or transport: pushing.py."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from duomo.errors import TransferError
from duomo.wire.values import Handle
from services.kv_transfer import layout
from services.kv_transfer.layout import MessageSpan
from services.kv_transfer.memory import Memory
from services.kv_transfer.transport import WriteReport


class Filling(Protocol):
    """A message that a device is writing into its send slot. What it reads and writes stays until it is over."""

    def is_over(self) -> bool:
        """Whether all of it is written. Cheap."""

    def wait(self) -> float | None:
        """Return when it is over. Gives the interpreter away. Seconds that the writing took, where it had to wait for what it reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PushJob:
    """One message to send: fill(payload) writes exactly span.num_bytes into registered memory, in a thread of the agent (host_packing.py).

    is_sealed: fill runs in the writer thread, at once, or by and by where it answers with a Filling. It is given room for the whole message
    and writes padding and trailer too (layout.message_bytes, hashing.message_hash). The room is a memoryview;
    where send slots lie in a device it is bytes there, and fill seals.
    """

    handle: Handle
    span: MessageSpan
    fill: Callable[[Any], Filling | None]
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


@dataclass(slots=True, eq=False)
class PendingPush:
    """A job whose message is not in its send slot yet, or has not been posted."""

    job: PushJob
    future: Future[PushResult]

    @property
    def key(self) -> tuple[int, int]:
        return self.job.handle.handle_id, self.job.span.message_idx

    @property
    def target(self) -> tuple[str, int]:
        """The slot that it goes to."""
        return self.job.handle.ring_name, layout.slot_of(self.job.handle.slots, self.job.span.message_idx)


@dataclass(slots=True, eq=False)
class Packing:
    """A message in its send slot; filling None: it is whole. started_s: when it was begun, or what it reads was there."""

    pending: PendingPush
    send_slot: Memory
    started_s: float
    filling: Filling | None

    def wait(self, now_s: Callable[[], float]) -> None:
        """Until it is whole."""
        took_s = self.filling.wait() if self.filling is not None else None
        if took_s is not None:
            self.started_s = max(self.started_s, now_s() - took_s)


class GivenUpError(Exception):
    """A fill was not begun: its message was given up while it stood in line. What lies in its send slot is another's."""


def pack_failed(pending: PendingPush, error: Exception) -> TransferError:
    if isinstance(error, GivenUpError):
        return cancelled(pending)
    return TransferError(f"packing message {pending.job.span.message_idx} failed: {error!r}", code="pack_failed")


def cancelled(pending: PendingPush) -> TransferError:
    handle_id, message_idx = pending.key
    return TransferError(f"message {message_idx} of handle {handle_id} was cancelled or has landed", code="cancelled", retryable=False)
