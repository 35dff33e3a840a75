"""Owns the Transport protocol: one-sided writes between registered memory of agents. Knows no slot, no handle and no hash.

Two implementations: transport_nixl.py (UCX, between processes and hosts) and transport_loopback.py (one process, with faults).
A write cannot be taken back. It is over only when poll() says so; the writer's memory is read, and the reader's written, until then.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

from services.kv_transfer.memory import HOST, Memory, Place


class Span(NamedTuple):
    """length bytes from address base, in the memory of one agent."""

    base: int
    length: int
    place: Place = HOST


class WriteState(Enum):
    """How far a write is. DONE and FAILED are terminal: no byte of it moves any more."""

    IN_FLIGHT = "in_flight"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteReport:
    """What the transport itself measured of a write that is done.

    backend: what moved the bytes. post_s: the call that posted it. transfer_s: from that call until the transport saw the end.
    num_descriptors: pieces that it was made of. lanes: the backend's own transports and devices, such as cma/memory; () if not known.
    """

    backend: str
    num_bytes: int
    num_descriptors: int
    post_s: float
    transfer_s: float
    lanes: tuple[str, ...] = ()


class Write(Protocol):
    """A posted write."""

    @property
    def detail(self) -> str:
        """Why it failed; "" otherwise."""
        ...

    @property
    def report(self) -> WriteReport | None:
        """Of a write that is done; None before, and where the transport measures nothing or could not tell."""
        ...


class Transport(Protocol):
    """One agent: registered memory, peers, writes. Thread-safe. measures_writes: a write that is done and has no report is an event."""

    name: str
    transport_name: str
    measures_writes: bool

    def register(self, region: Memory) -> None:
        """Let peers write into `region` and writes start from it."""
        ...

    def deregister(self, region: Memory) -> None:
        """Undo register(); does not stop a write that is under way."""
        ...

    def metadata(self) -> bytes:
        """What a peer needs to reach the memory registered so far. Whoever has it can write there: it stays on private sockets."""
        ...

    def add_peer(self, metadata: bytes) -> str:
        """Learn a peer and return its name; a peer of that name known before is replaced. PeerError where it cannot be reached."""
        ...

    def remove_peer(self, name: str) -> None:
        """Forget a peer; unknown names are fine."""
        ...

    def lanes(self, peer: str) -> tuple[str, ...]:
        """By which transports and devices writes to this peer went so far, such as cma/memory; () if there was none, or nothing says it."""
        ...

    def write(self, local: Span, peer: str, remote: Span, notification: bytes) -> Write:
        """Post a write of `local` to `remote` of `peer`; `notification` follows it. PeerError where the peer is gone."""
        ...

    def poll(self, write: Write) -> WriteState:
        """Drive and look at a write. Called until it is terminal (the notification is sent by the call that sees the end)."""
        ...

    def notifications(self) -> list[bytes]:
        """Notifications that have arrived since the last call."""
        ...

    def sibling(self, name: str) -> Transport:
        """A new agent of the same kind in this process, under another name (ring replacement)."""
        ...

    def close(self) -> None:
        """Give everything back. No write may be in flight that the caller still cares about."""
        ...
