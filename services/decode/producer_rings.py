"""Owns the landing rings of prefill processes, and the judgement when one of those is known dead. Knows no leg.

A broken socket does not prove that its process is gone, and a write under way cannot be stopped: the ring is retired at once, its
memory kept until the process is known dead:

    the socket ended, and the directory has not listed the boot id for half a lease      (killed: its lease ran out)
    another boot id holds the same replica id                                             (restarted)

A process that fell silent may be stopped and wake up: for it only the second is proof. It is waited for during SILENT_LEASES without a
lease in the directory, then **given up**: slots come back, and the memory is kept out of use for a write that comes after all. Without
a directory, an ended socket is taken for the process' end after DEAD_WITHOUT_DIRECTORY_S, a silent one after GIVEN_UP_WITHOUT_DIRECTORY_S.
A ring that fills with quarantined slots while its producer lives is replaced. A producer that connects again is asked for the fences of
all that was given up with its earlier socket.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from duomo.errors import DuomoError, PeerError
from duomo.wire.connection import Connection
from duomo.wire.messages import HandleOffered
from services.decode.producers import Producers
from services.kv_transfer.agent import TransferAgent
from services.kv_transfer.directory import Directory, Member
from services.kv_transfer.ending import end_tasks

LOOK_PERIOD_S = 0.5
DEAD_WITHOUT_DIRECTORY_S = 1.0
GIVEN_UP_WITHOUT_DIRECTORY_S = 30.0
SILENT_LEASES = 3.0

log = logging.getLogger(__name__)


class Fate(Enum):
    """What is known of a producer without a socket. GIVEN_UP: nobody waits for it, but it may write yet."""

    UNKNOWN = "unknown"
    DEAD = "dead"
    GIVEN_UP = "given_up"


@dataclass(slots=True, kw_only=True)
class LostProducer:
    """A producer without a socket. absent_s: since when the directory does not list it; None while it does."""

    replica_id: str
    was_silent: bool
    lost_s: float
    absent_s: float | None = None

    def fate(self, boot_id: str, members: Sequence[Member] | None, lease_s: float, now_s: float) -> Fate:
        """members: what the directory lists now; None where there is no directory."""
        if members is None:
            limit_s = GIVEN_UP_WITHOUT_DIRECTORY_S if self.was_silent else DEAD_WITHOUT_DIRECTORY_S
            return self._over if now_s - self.lost_s >= limit_s else Fate.UNKNOWN
        if any(member.replica_id == self.replica_id and member.boot_id != boot_id for member in members):
            return Fate.DEAD
        if any(member.boot_id == boot_id for member in members):
            self.absent_s = None
            return Fate.UNKNOWN
        if self.absent_s is None:
            self.absent_s = now_s
        limit_s = SILENT_LEASES * lease_s if self.was_silent else lease_s / 2
        return self._over if now_s - self.absent_s >= limit_s else Fate.UNKNOWN

    @property
    def _over(self) -> Fate:
        return Fate.GIVEN_UP if self.was_silent else Fate.DEAD


class ProducerRings:
    """The rings of all producers. on_ring: a producer has a ring with free slots; called on the loop."""

    def __init__(
        self,
        producers: Producers,
        agent: TransferAgent,
        num_ring_slots: int,
        lease_s: float,
        directory: Directory | None,
        on_ring: Callable[[], None],
    ) -> None:
        self._producers = producers
        self._agent = agent
        self._num_ring_slots = num_ring_slots
        self._lease_s = lease_s
        self._directory = directory
        self._on_ring = on_ring
        self._lost: dict[str, LostProducer] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._watch: asyncio.Task[None] | None = None
        self._is_replacing = False

    def may_offer(self) -> bool:
        """Whether handles may be offered: a producer hears of a replaced ring before it hears of the ring's slots."""
        return not self._is_replacing

    def joined(self, connection: Connection) -> None:
        """A producer connected: it gets a landing ring before any handle."""
        self._lost.pop(connection.peer.boot_id, None)
        self._spawn(self._offer_ring(connection))
        if self._watch is None:
            self._watch = self._spawn(self._watch_forever())

    def left(self, connection: Connection) -> None:
        """The socket in use to a producer ended. Everything under way is quarantined."""
        boot_id = connection.peer.boot_id
        was_silent = False
        try:
            connection.check_open()
        except PeerError as error:
            was_silent = error.code == "peer_silent"
        self._agent.peer_lost(boot_id)
        self._lost[boot_id] = LostProducer(replica_id=connection.peer.replica_id, was_silent=was_silent, lost_s=time.monotonic())

    async def close(self) -> None:
        await end_tasks(self._tasks)

    def _spawn(self, work: asyncio._CoroutineLike[None]) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _offer_ring(self, connection: Connection) -> None:
        """Registering memory takes milliseconds with NIXL: not on the loop."""
        boot_id = connection.peer.boot_id
        try:
            ring = await asyncio.to_thread(self._agent.open_ring, boot_id, self._num_ring_slots)
        except DuomoError as error:
            log.error("no landing ring for %s: %s", connection.peer.replica_id, error)
            connection.end("no_ring", error.detail)
            return
        in_use = self._producers.get(boot_id)
        if in_use is not connection:
            if in_use is None:  # else its newer socket offers the ring
                self._agent.peer_lost(boot_id)
            return
        self._producers.post(boot_id, ring)
        self._ask_for_fences(boot_id)
        self._on_ring()

    def _ask_for_fences(self, boot_id: str) -> None:
        """Offer again what was given up with an earlier socket: nobody wants it any more, so it is fenced.

        What was on its way in that socket is lost, an offer as well as a fence: without being asked, the producer would never fence a
        handle that it has not heard of, or believes to have fenced.
        """
        for handle in self._agent.unfenced(boot_id):
            offer = HandleOffered(request_id=handle.request_id, attempt=handle.attempt, traceparent="", remaining_s=0.0, handle=handle)
            self._producers.post(boot_id, offer)

    async def _watch_forever(self) -> None:
        """Look at rings and at lost producers until cancelled."""
        while True:
            await asyncio.sleep(LOOK_PERIOD_S)
            if self._agent.has_stuck_rings():
                await self._replace_stuck_rings()
            if self._lost:
                await self._judge_lost()

    async def _replace_stuck_rings(self) -> None:
        """Making a ring takes up to 0.3 s with NIXL: not on the loop. Nothing is offered meanwhile."""
        self._is_replacing = True
        try:
            offers = await asyncio.to_thread(self._agent.replace_stuck_rings)
        except DuomoError as error:
            log.error("a stuck landing ring cannot be replaced: %s", error)
            for connection in self._producers.connections():
                if not self._agent.ring_name(connection.peer.boot_id):
                    connection.end("no_ring", error.detail)  # it connects again, and is offered one then
            return
        finally:
            self._is_replacing = False
        for boot_id, offer in offers:
            if self._producers.get(boot_id) is not None:
                self._producers.post(boot_id, offer)
            else:
                self._agent.peer_lost(boot_id)
            log.warning("the landing ring of %s was stuck; %s takes its place", boot_id, offer.ring_name)
        self._on_ring()

    async def _judge_lost(self) -> None:
        members: Sequence[Member] | None = None
        if self._directory is not None:
            try:
                members = await self._directory.members()
            except DuomoError as error:
                log.warning("cannot tell whether a lost producer is dead: %s", error)
                return
        now_s = time.monotonic()
        for boot_id, lost in list(self._lost.items()):
            fate = lost.fate(boot_id, members, self._lease_s, now_s)
            if fate is not Fate.UNKNOWN:
                del self._lost[boot_id]
                handles = self._agent.peer_dead(boot_id) if fate is Fate.DEAD else self._agent.peer_given_up(boot_id)
                log.info("producer %s is %s; %d handles of it closed", lost.replica_id, fate.value, len(handles))
