"""Owns the proof that a transport moves bytes: one message from slot to slot at start, verified. Knows no peer, no wire and no engine.

A replica runs it before it registers: a broken NIXL or UCX ends the start with a typed error, and not the first request.
"""

from __future__ import annotations

import secrets
import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from duomo.config import TransferSection
from duomo.errors import DuomoError, TransferError
from duomo.wire.values import Handle
from services.kv_transfer import layout, ucx_routes
from services.kv_transfer.landing import LandingRings
from services.kv_transfer.layout import MessageSpan
from services.kv_transfer.memory import Allocate, Region
from services.kv_transfer.push_job import PushJob, PushResult
from services.kv_transfer.pushing import Pusher
from services.kv_transfer.sealing import seal
from services.kv_transfer.transport import Transport

if TYPE_CHECKING:  # a CPU's agent runs without torch
    from torch import Tensor

_PROOF_BYTES = 4096
_TIMEOUT_S = 10.0
_POLL_S = 0.0005


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """A message was moved and verified. lanes: by which transport and device, such as cma/memory; () where that is not known."""

    transport_name: str
    lanes: tuple[str, ...]
    seconds: float

    @property
    def way(self) -> str:
        """For people: "nixl/UCX: cma/memory"."""
        return f"{self.transport_name}: {' + '.join(self.lanes)}" if self.lanes else self.transport_name


def prove(transport: Transport, section: TransferSection, allocate: Allocate = Region) -> Proof:
    """Move one message from this transport's memory into that of a second agent of its kind, and back out.

    The whole path runs: registration, metadata, write, notification, trailer and hash. allocate: memory of the kind that rings will lie in.
    Raises TransferError where any of it fails, and where it went by another transport than kv_transfer.require_transport; of a card's
    memory the first write to each peer tells that.
    """
    started_s = time.monotonic()
    sibling = transport.sibling(f"{transport.name}.proof{secrets.token_hex(3)}")
    small = section.model_copy(update={"slot_bytes": 64 * 1024, "max_bytes_per_s": 0.0})
    landing = LandingRings(sibling, small, time.monotonic, allocate)
    pusher = Pusher("proof", transport, small, 1, time.monotonic, allocate)
    try:
        offer = landing.open_ring("proof", 1)
        pusher.attach_ring("proof", offer)
        (span,) = layout.messages(range(1), (0, 1), _PROOF_BYTES, small.slot_bytes)
        slots = landing.grant("proof", 1)
        assert slots is not None
        handle = Handle(
            handle_id=1,
            producer_boot_id="proof",
            consumer_boot_id="proof",
            model_fingerprint="",
            request_id="",
            attempt=0,
            ring_name=offer.ring_name,
            slots=slots,
            num_tokens=1,
            num_blocks=1,
        )
        landing.expect(handle, (span,))
        content = secrets.token_bytes(span.num_bytes)
        message = _sealed(content, handle.handle_id, span)
        pushed = pusher.push(PushJob(handle=handle, span=span, fill=lambda room: _put(room, message), is_sealed=True))
        _verify(landing, pushed, content, started_s + _TIMEOUT_S)
        landing.release(handle.handle_id, span.message_idx)
        # Between two agents of a process UCX copies a card's memory in another way than between two cards: that proves nothing of lanes.
        is_on_card = offer.memory != "host"
        lanes = () if is_on_card else transport.lanes(sibling.name)
    except DuomoError as error:
        raise _broken(transport, error.detail) from error
    finally:
        pusher.detach("proof")
        pusher.close()
        landing.close()
        sibling.close()
    if not is_on_card and (refusal := ucx_routes.refusal(section.require_transport, lanes, is_one_process=True)):
        raise TransferError(refusal, code="wrong_transport", retryable=False)
    return Proof(transport_name=transport.transport_name, lanes=lanes, seconds=time.monotonic() - started_s)


def _verify(landing: LandingRings, pushed: Future[PushResult], content: bytes, deadline_s: float) -> None:
    while not (landed := landing.poll()):
        if pushed.done():
            pushed.result()
        if time.monotonic() > deadline_s:
            raise TransferError(f"one message did not land within {_TIMEOUT_S:g} s")
        time.sleep(_POLL_S)
    if landed[0].error is not None or bytes(landed[0].awaited.payload) != content:
        raise TransferError("one message landed with other bytes than were sent")
    pushed.result(max(deadline_s - time.monotonic(), 0.0) + 1.0)


def _sealed(content: bytes, handle_id: int, span: MessageSpan) -> bytes:
    """The whole message: payload, padding, trailer."""
    message = bytearray(layout.message_bytes(span.num_bytes))
    message[: span.num_bytes] = content
    seal(memoryview(message), handle_id, span)
    return bytes(message)


def _put(room: memoryview | Tensor, content: bytes) -> None:
    if isinstance(room, memoryview):
        room[:] = content
    else:
        from services.kv_transfer.device_memory import put

        put(room, content)


def _broken(transport: Transport, detail: str) -> TransferError:
    return TransferError(f"{transport.transport_name} does not move KV on this machine: {detail}", code="transport_broken", retryable=False)
