"""Owns the sockets to decode replicas and their attached landing rings. Knows no leg and no policy.

One connection for each decode boot id, opened at first use and kept. A peer is **reachable** once its ring is attached to the
transfer agent; one that lends its blocks has no ring, and is once it is connected. Attaching blocks (NIXL exchanges metadata), so it runs
in a thread of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from duomo.errors import DuomoError, PeerError, WireError
from duomo.wire.connection import Connection
from duomo.wire.messages import Message, RingOffered, TransferFenced
from duomo.wire.values import PeerAddress
from services.kv_transfer.agent import TransferAgent
from services.kv_transfer.ending import closed, end_tasks, in_thread

log = logging.getLogger(__name__)

MAX_GONE_PEERS = 64  # processes that left and whose fences may still have to be told


@dataclass(slots=True, eq=False)
class DecodePeer:
    """One decode process.

    slot_bytes: payload of a slot, by ring name. deferred: what came behind a RingOffered that is still being attached.
    fences: TransferFenced that could not be posted while its socket was gone. refusal: why KV can never go there.
    """

    address: PeerAddress
    connection: Connection | None = None
    is_reachable: bool = False
    connecting: asyncio.Task[None] | None = None
    num_attaching: int = 0
    slot_bytes: dict[str, int] = field(default_factory=dict)
    deferred: list[Callable[[], None]] = field(default_factory=list)
    fences: list[TransferFenced] = field(default_factory=list)
    refusal: PeerError | None = None


class DecodePeers:
    """All decode replicas that this process talks to.

    agent: None where decode lends its blocks. connect: opens a socket whose messages come back through the service (Membership.connect).
    on_change: called when a peer became reachable; on_lost: when a peer cannot be reached (any more), with the reason.
    """

    def __init__(
        self,
        agent: TransferAgent | None,
        connect: Callable[[str], Awaitable[Connection]],
        on_change: Callable[[str], None],
        on_lost: Callable[[str, PeerError], None],
    ) -> None:
        self._agent = agent
        self._connect = connect
        self._on_change = on_change
        self._on_lost = on_lost
        self._peers: dict[str, DecodePeer] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._attach_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="attach")

    def is_reachable(self, boot_id: str) -> bool:
        peer = self._peers.get(boot_id)
        return peer is not None and peer.is_reachable

    def want(self, address: PeerAddress) -> None:
        """Make sure that this replica is connected or being connected to. Failure comes by on_lost."""
        peer = self._peers.setdefault(address.boot_id, DecodePeer(address))
        if peer.refusal is not None:
            asyncio.get_running_loop().call_soon(self._on_lost, address.boot_id, peer.refusal)
        elif peer.connection is None and peer.connecting is None:
            peer.connecting = self._spawn(self._open(peer))

    def post(self, boot_id: str, message: Message) -> None:
        """Send to a peer. A peer that is gone is dropped silently here: its reading task reports it once, by on_lost."""
        peer = self._peers.get(boot_id)
        if peer is None:
            return
        if peer.connection is not None:
            with contextlib.suppress(PeerError):
                peer.connection.post(message)
                return
        if isinstance(message, TransferFenced):
            peer.fences.append(message)  # the process may live on behind a broken socket, with slots in quarantine

    def flush(self, boot_id: str) -> None:
        """Write what was posted to a peer before this tick goes on."""
        peer = self._peers.get(boot_id)
        if peer is not None and peer.connection is not None:
            peer.connection.flush()

    def ring_offered(self, connection: Connection, ring: RingOffered) -> None:
        """A peer's landing ring (a new one replaces the old one)."""
        peer = self._peers.get(connection.peer.boot_id)
        if peer is None or self._agent is None:
            raise WireError("a ring from a decode replica that this side did not connect to", code="unexpected_message")
        peer.num_attaching += 1
        self._spawn(self._attach(self._agent, peer, connection, ring))

    def when_attached(self, connection: Connection, act: Callable[[], None]) -> None:
        """Act now, or once the rings that this peer has offered so far are attached."""
        peer = self._peers.get(connection.peer.boot_id)
        if peer is not None and peer.num_attaching > 0:
            peer.deferred.append(act)
        else:
            act()

    def slot_bytes(self, boot_id: str, ring_name: str) -> int | None:
        """Payload bytes of a slot of an attached ring."""
        peer = self._peers.get(boot_id)
        return peer.slot_bytes.get(ring_name) if peer is not None else None

    def left(self, connection: Connection) -> None:
        """A decode socket ended. What was granted through it is void."""
        boot_id = connection.peer.boot_id
        peer = self._peers.get(boot_id)
        if peer is None or peer.connection is not connection:
            return
        peer.connection, peer.is_reachable = None, False
        peer.deferred.clear()
        peer.slot_bytes.clear()
        gone = [key for key, one in self._peers.items() if one.connection is None and one.connecting is None]
        for key in gone[:-MAX_GONE_PEERS]:
            del self._peers[key]
        if self._agent is not None:
            self._spawn(self._detach(self._agent, boot_id))
        self._on_lost(boot_id, PeerError(f"decode replica {connection.peer.replica_id} is gone", phase="kv.handoff"))

    async def close(self) -> None:
        await end_tasks(self._tasks)
        await closed("the thread that attaches rings", in_thread(self._attach_thread.shutdown))

    def _spawn(self, work: asyncio._CoroutineLike[None]) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _open(self, peer: DecodePeer) -> None:
        try:
            connection = await self._connect(peer.address.address)
            if connection.peer.boot_id != peer.address.boot_id:
                await connection.close()
                raise PeerError(
                    f"{peer.address.replica_id} at {peer.address.address} is another process now", code="peer_restarted", phase="kv.handoff"
                )
            peer.connection = connection
            for fence in peer.fences:
                connection.post(fence)
            peer.fences.clear()
            if self._agent is None:
                peer.is_reachable = True
                self._on_change(peer.address.boot_id)
        except PeerError as error:
            log.warning("cannot reach decode replica %s: %s", peer.address.replica_id, error)
            del self._peers[peer.address.boot_id]
            self._on_lost(
                peer.address.boot_id, PeerError(error.detail, code=error.code, phase="kv.handoff")
            )  # between the two, says whoever dials
        finally:
            peer.connecting = None

    async def _attach(self, agent: TransferAgent, peer: DecodePeer, connection: Connection, ring: RingOffered) -> None:
        boot_id = peer.address.boot_id
        try:
            await asyncio.get_running_loop().run_in_executor(self._attach_thread, agent.attach_ring, boot_id, ring)
        except DuomoError as error:
            log.warning("cannot attach the ring of %s: %s", peer.address.replica_id, error)
            lost = PeerError(f"its ring cannot be attached: {error.detail}", code=error.code, phase="kv.handoff")
            if error.code == "kv_dtype_mismatch":  # which stays so while this process and that one live
                peer.refusal = lost
            self._on_lost(boot_id, lost)
            self._attached(peer)  # grants that waited are for legs that are over now: each is fenced
            if peer.num_attaching == 0:  # else it has offered a newer one
                connection.end("no_ring", error.detail)  # it grants slots of this ring alone; connected again, it offers another
            return
        if connection.closed:
            peer.num_attaching -= 1
            return
        peer.slot_bytes[ring.ring_name] = ring.slot_bytes
        peer.is_reachable = True
        self._attached(peer)
        self._on_change(boot_id)

    def _attached(self, peer: DecodePeer) -> None:
        peer.num_attaching -= 1
        if peer.num_attaching == 0:
            deferred, peer.deferred = peer.deferred, []
            for act in deferred:
                act()

    async def _detach(self, agent: TransferAgent, boot_id: str) -> None:
        await asyncio.get_running_loop().run_in_executor(self._attach_thread, agent.detach, boot_id)
