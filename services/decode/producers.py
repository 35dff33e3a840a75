"""Owns what decode knows of prefill processes: their sockets, their rings, and when one is known dead. Knows no leg.

A broken socket does not prove that its process is gone, and a write under way cannot be stopped: the ring is retired at once, its
memory kept until the process is known dead:

    the socket ended, and the directory has not listed the boot id for half a lease      (killed: its lease ran out)
    another boot id holds the same replica id                                             (restarted)

A process that fell silent may be stopped and wake up: for it only the second counts. Without a directory, an ended socket is taken
for the process' end after DEAD_WITHOUT_DIRECTORY_S.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from duomo.errors import DuomoError, PeerError
from duomo.wire.connection import Connection
from duomo.wire.messages import Message
from services.kv_transfer.agent import TransferAgent
from services.kv_transfer.directory import Directory, Member

LOOK_PERIOD_S = 0.5
DEAD_WITHOUT_DIRECTORY_S = 1.0

log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class LostProducer:
    """A producer without a socket. absent_s: since when the directory does not list it; None while it does."""

    replica_id: str
    was_silent: bool
    lost_s: float
    absent_s: float | None = None

    def is_dead(self, boot_id: str, members: Sequence[Member] | None, lease_s: float, now_s: float) -> bool:
        """members: what the directory lists now; None where there is no directory."""
        if members is None:
            return not self.was_silent and now_s - self.lost_s >= DEAD_WITHOUT_DIRECTORY_S
        if any(member.replica_id == self.replica_id and member.boot_id != boot_id for member in members):
            return True
        if any(member.boot_id == boot_id for member in members):
            self.absent_s = None
            return False
        if self.absent_s is None:
            self.absent_s = now_s
        return not self.was_silent and now_s - self.absent_s >= lease_s / 2


class Producers:
    """The prefill processes that this replica has rings for. on_ring: a producer has a ring with free slots; called on the loop."""

    def __init__(
        self, agent: TransferAgent, num_ring_slots: int, lease_s: float, directory: Directory | None, on_ring: Callable[[], None]
    ) -> None:
        self._agent = agent
        self._num_ring_slots = num_ring_slots
        self._lease_s = lease_s
        self._directory = directory
        self._on_ring = on_ring
        self._connections: dict[str, Connection] = {}
        self._lost: dict[str, LostProducer] = {}
        self._tasks: set[asyncio.Task[None]] = set()

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
        """A producer connected: it gets a landing ring before any handle."""
        boot_id = connection.peer.boot_id
        self._connections[boot_id] = connection
        self._lost.pop(boot_id, None)
        self._spawn(self._offer_ring(connection))

    def left(self, connection: Connection) -> bool:
        """A producer's socket ended; whether it was the one in use. Everything under way is quarantined."""
        boot_id = connection.peer.boot_id
        if self._connections.get(boot_id) is not connection:
            return False
        del self._connections[boot_id]
        was_silent = False
        try:
            connection.check_open()
        except PeerError as error:
            was_silent = error.code == "peer_silent"
        self._agent.peer_lost(boot_id)
        self._lost[boot_id] = LostProducer(replica_id=connection.peer.replica_id, was_silent=was_silent, lost_s=time.monotonic())
        if len(self._lost) == 1:
            self._spawn(self._watch_lost())
        return True

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _spawn(self, work: asyncio._CoroutineLike[None]) -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _offer_ring(self, connection: Connection) -> None:
        """Registering memory takes milliseconds with NIXL: not on the loop."""
        boot_id = connection.peer.boot_id
        try:
            ring = await asyncio.to_thread(self._agent.open_ring, boot_id, self._num_ring_slots)
        except DuomoError as error:
            log.error("no landing ring for %s: %s", connection.peer.replica_id, error)
            connection.end("no_ring", error.detail)
            return
        if self._connections.get(boot_id) is not connection:
            self._agent.peer_lost(boot_id)
            return
        self.post(boot_id, ring)
        self._on_ring()

    async def _watch_lost(self) -> None:
        """Until every lost producer is known dead or is back."""
        while self._lost:
            await asyncio.sleep(LOOK_PERIOD_S)
            members: Sequence[Member] | None = None
            if self._directory is not None:
                try:
                    members = await self._directory.members()
                except DuomoError as error:
                    log.warning("cannot tell whether a lost producer is dead: %s", error)
                    continue
            now_s = time.monotonic()
            for boot_id, lost in list(self._lost.items()):
                if lost.is_dead(boot_id, members, self._lease_s, now_s):
                    del self._lost[boot_id]
                    handles = self._agent.peer_dead(boot_id)
                    log.info("producer %s is dead; %d handles of it closed", lost.replica_id, len(handles))
