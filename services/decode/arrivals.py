"""Owns what decode asks of the way on which KV comes. Knows neither rings nor loans: ring_arrivals.py, loan_arrivals.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from duomo.errors import DuomoError, TransferError
from duomo.wire.connection import Connection
from duomo.wire.values import Handle
from services.decode.leg import Leg
from services.kv_transfer.agent import SlotCounts


@dataclass(frozen=True, kw_only=True, slots=True)
class HandoffTerms:
    """What every handle of this replica has in common. stall_timeout_s: longest silence of a producer that has sent some of a prompt's
    KV and has not computed the rest."""

    boot_id: str
    model_fingerprint: str
    num_layers: int
    num_experts: int
    block_bytes: int
    slot_bytes: int
    write_timeout_s: float
    stall_timeout_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LandedMessage:
    """A message of a handle that is in its blocks (error None) or lay wrong in its slot. landed_s: monotonic."""

    handle_id: int
    message_idx: int
    group: int
    num_bytes: int
    landed_s: float
    error: TransferError | None


class Arrivals(Protocol):
    """How the KV of granted legs comes to be in their blocks. Everything but land() is called on the event loop.

    An offered handle ends by arrived() or withdraw(); the leg's blocks may be given to others afterwards.
    """

    @property
    def is_polled(self) -> bool:
        """Whether messages land: then land() has to look for them, and a producer's silence means something."""

    @property
    def is_writing(self) -> bool:
        """Whether the device writes messages into blocks, by and by."""

    @property
    def way(self) -> str:
        """For reports and spans: what moves the bytes."""

    @property
    def failure(self) -> DuomoError | None:
        """Why nothing arrives any more; None while all is well."""

    def offer(self, leg: Leg) -> Handle | None:
        """A handle for a leg that holds its blocks; leg.spans are its messages. None where it has to wait for slots."""

    def arrived(self, handle_id: int) -> None:
        """Every message was landed, and prefill is done."""

    def withdraw(self, handle_id: int) -> None:
        """The leg ends early: nothing may be scattered into its blocks once this returns."""

    def missing(self, handle_id: int) -> tuple[int, ...]:
        """Messages that have not landed."""

    def pulled(self, handle_id: int, message_idx: int) -> None:
        """The producer is about to be asked for a message again."""

    def fenced(self, handle_id: int) -> None:
        """The producer says that nothing of this handle is or will be in flight."""

    def land(self, *, waits: bool = False) -> tuple[LandedMessage, ...]:
        """In the step thread: take in what has landed. waits: for the device's word on it, while no step is under way."""

    def joined(self, producer: Connection) -> None: ...

    def left(self, producer: Connection) -> None: ...

    def counts(self) -> SlotCounts: ...

    async def close(self) -> None: ...


def handle_of(leg: Leg, terms: HandoffTerms, handle_id: int, ring_name: str, slots: tuple[int, ...], first_block: int) -> Handle:
    """The handle that lets leg.prefill send leg's blocks from first_block on."""
    return Handle(
        handle_id=handle_id,
        producer_boot_id=leg.prefill.boot_id,
        consumer_boot_id=terms.boot_id,
        model_fingerprint=terms.model_fingerprint,
        request_id=leg.request_id,
        attempt=leg.attempt,
        ring_name=ring_name,
        slots=slots,
        num_tokens=leg.num_tokens,
        num_blocks=len(leg.blocks),
        first_block=first_block,
    )
