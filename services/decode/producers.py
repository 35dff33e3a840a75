"""Owns the sockets to prefill processes. Knows no leg and no ring (producer_rings.py)."""

from __future__ import annotations

import contextlib

from duomo.errors import PeerError
from duomo.wire.connection import Connection
from duomo.wire.messages import Message


class Producers:
    """The socket in use to each prefill process, by boot id."""

    def __init__(self) -> None:
        self._connections: dict[str, Connection] = {}

    def get(self, boot_id: str) -> Connection | None:
        """The socket in use; None for a process that is not connected (any more)."""
        return self._connections.get(boot_id)

    def connections(self) -> list[Connection]:
        return list(self._connections.values())

    def post(self, boot_id: str, message: Message) -> None:
        """Send to a producer. One that is gone needs no message: its reading task reports it, and its legs end there."""
        connection = self._connections.get(boot_id)
        if connection is not None:
            with contextlib.suppress(PeerError):
                connection.post(message)

    def rtt_s(self, boot_id: str) -> float:
        """Round trip to a producer; 0 before its first heartbeat, and once it is gone."""
        connection = self._connections.get(boot_id)
        return (connection.rtt_s if connection is not None else None) or 0.0

    def joined(self, connection: Connection) -> None:
        self._connections[connection.peer.boot_id] = connection

    def left(self, connection: Connection) -> bool:
        """A producer's socket ended; whether it was the one in use."""
        if self._connections.get(connection.peer.boot_id) is not connection:
            return False
        del self._connections[connection.peer.boot_id]
        return True
