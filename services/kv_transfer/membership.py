"""Owns one replica's place in the system: sockets, lease, reports, drain and the hang watchdog. Knows no request, no tensor.

Prefill and decode give a `ReplicaLogic` (their service) and get the same skeleton:

    membership = Membership(card, logic, directory)        # card: who this replica is and which configuration it serves
    await membership.start()                               # listens, registers, reports ten a second to every gateway
    connection = await membership.connect(address)         # an outgoing peer (P -> D), read like an accepted one
    await membership.serve(stop)                           # until `stop` an operator's Drain or a failure; drains; then stop()
    await membership.stop()

All callbacks run on the event loop, one at a time, and must not block.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from duomo.config import DuomoConfig, PoolSection
from duomo.errors import ConfigError, DuomoError, EngineError, PeerError, WireError
from duomo.wire.address import clear_stale
from duomo.wire.connection import Connection, Identity, Listener, connect, new_boot_id
from duomo.wire.messages import CachesFlushed, FlushCaches, Message, OperatorMessage, Refused, ReplicaReport, Role, Undrain
from services.kv_transfer.directory import Directory, Member
from services.kv_transfer.ending import end_tasks

REPORT_PERIOD_S = 0.1
MAX_UNIX_PATH_BYTES = 100  # sun_path holds 108 with its NUL; the rest is room for a suffix
FAILURE_PERIOD_S = 0.25
FAILED_DRAIN_S = 1.0  # for what a broken replica can still finish
HANG_EXIT_CODE = 70  # EX_SOFTWARE: the watchdog ended this process

log = logging.getLogger(__name__)


class Progress:
    """Tells a hang from idleness. Thread-safe by single assignments: the loop writes, the watchdog thread reads.

    pending() when work waits (again and again is harmless), advance() after each finished step, idle() when none is left. moved() within a
    step that takes long, from whoever runs it or waits for it: before its end is told, so never after idle().
    """

    def __init__(self, hang_timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.hang_timeout_s = hang_timeout_s
        self.num_steps = 0
        self._clock = clock
        self._since_s: float | None = None

    def pending(self) -> None:
        if self._since_s is None:
            self._since_s = self._clock()

    def advance(self) -> None:
        self.num_steps += 1
        self._since_s = self._clock()

    def moved(self) -> None:
        self._since_s = self._clock()

    def idle(self) -> None:
        self._since_s = None

    def age_s(self) -> float:
        """Seconds since the last progress while work is pending; 0 when idle."""
        since_s = self._since_s
        return 0.0 if since_s is None else self._clock() - since_s

    def check(self) -> None:
        """Raise EngineError when pending work has not moved for hang_timeout_s."""
        age_s = self.age_s()
        if age_s > self.hang_timeout_s:
            raise EngineError(f"no step has finished for {age_s:.1f} s with work pending (hang_timeout_s is {self.hang_timeout_s})")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaCard:
    """Who a replica is. boot_id: 64 random bits of this process start; every start is a new one."""

    config: DuomoConfig
    pool: PoolSection
    replica_id: str
    role: Role
    model_fingerprint: str
    boot_id: str

    @classmethod
    def of(cls, config: DuomoConfig, role: Role, replica_id: str, model_fingerprint: str) -> ReplicaCard:
        assert role in ("prefill", "decode"), role
        pool: PoolSection = config.prefill if role == "prefill" else config.decode
        return cls(config=config, pool=pool, replica_id=replica_id, role=role, model_fingerprint=model_fingerprint, boot_id=new_boot_id())


class ReplicaLogic(Protocol):
    """What a service gives to its skeleton. `peer` is the same object from joined to left."""

    progress: Progress

    def joined(self, peer: Connection) -> None: ...

    def received(self, peer: Connection, message: Message) -> None:
        """Handle one message. A DuomoError raised here is answered by Refused; the connection lives."""

    def left(self, peer: Connection) -> None:
        """The connection has ended; peer.check_open() raises why (code peer_gone, peer_silent, closed ...)."""

    def begin_drain(self) -> None:
        """Refuse new requests from now on; the live ones finish."""

    def end_drain(self) -> None:
        """Take new requests again."""

    def flush_caches(self) -> int:
        """Forget every prefix (BlockManager.flush); of how many blocks."""

    def num_live_requests(self) -> int: ...

    def failure(self) -> DuomoError | None:
        """What has ended for good in this process, so that it must be replaced; None while all is well. Cheap."""

    def report(self) -> ReplicaReport: ...


class Membership:
    """One replica's sockets and lease. Owns: the listener, every connection's reading task, the member's key in Redis.

    identity.address is the bound address after start(); `gateways` are the live gateway connections by boot id.
    directory may be None (a replica that nobody needs to find: tests, or an address given by hand).
    """

    def __init__(self, card: ReplicaCard, logic: ReplicaLogic, directory: Directory | None) -> None:
        self.card = card
        self.gateways: dict[str, Connection] = {}
        self.is_draining = False
        self._logic = logic
        self._directory = directory
        self._own_dir: Path | None = None
        self._listener: Listener | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._connections: set[Connection] = set()
        self._drain_asked = asyncio.Event()
        self._is_ending = False
        self._drain_deadline_s = card.config.gateway.request_deadline_s
        self._watchdog: Watchdog | None = None
        self.identity = Identity(
            replica_id=card.replica_id,
            boot_id=card.boot_id,
            role=card.role,
            model_fingerprint=card.model_fingerprint,
            address="",
            secret=card.config.wire.secret,
        )

    @property
    def member(self) -> Member:
        return Member(
            replica_id=self.card.replica_id,
            boot_id=self.card.boot_id,
            role=self.card.role,
            address=self.identity.address,
            model_fingerprint=self.card.model_fingerprint,
            model_name=self.card.config.model.served_name,
        )

    async def start(self) -> None:
        """Listen, register, report. The replica must be warm before: a registered member gets requests at once."""
        asked = self._address_to_bind()
        self.identity = replace(self.identity, address=asked)
        listener = Listener(asked, self.identity, self.card.config.wire, self._serve_peer)
        await listener.start()
        self._listener = listener
        self.identity = replace(self.identity, address=_advertised(listener.address))
        self._spawn(self._report_loop())
        if self._directory is not None:
            self._spawn(self._lease_loop(self._directory))

    async def connect(self, address: str) -> Connection:
        """Open a socket to another replica and read it like an accepted one. Raises PeerError."""
        connection = await connect(address, self.identity, self.card.config.wire)
        self._spawn(self._serve_peer(connection))
        return connection

    async def drain(self, deadline_s: float) -> bool:
        """Take no new request, not ever again, and wait for the live ones; whether all finished in time."""
        self.is_draining = self._is_ending = True
        self._logic.begin_drain()
        end_s = time.monotonic() + deadline_s
        while self._logic.num_live_requests() > 0 and time.monotonic() < end_s:
            await asyncio.sleep(0.02)
        return self._logic.num_live_requests() == 0

    async def serve(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set or an operator sends a Drain that ends, then finish the live requests.

        A hang ends the process. Raises what logic.failure() says, after FAILED_DRAIN_S for what can still finish.
        """
        self._watchdog = Watchdog(self._logic.progress, self._unlink_socket)
        self._watchdog.start()
        waits = [asyncio.ensure_future(stop.wait()), asyncio.ensure_future(self._drain_asked.wait())]
        failed = asyncio.create_task(self._until_failed())
        drained: asyncio.Task[None] | None = None
        try:
            await asyncio.wait([*waits, failed], return_when=asyncio.FIRST_COMPLETED)
            if not failed.done():
                drained = asyncio.create_task(self._drain_to_the_end())
                await asyncio.wait([drained, failed], return_when=asyncio.FIRST_COMPLETED)
            if failed.done():
                await self.drain(FAILED_DRAIN_S)
                raise failed.result()
        finally:
            for task in (*waits, failed, drained):
                if task is not None:
                    task.cancel()

    async def _until_failed(self) -> DuomoError:
        while (failure := self._logic.failure()) is None:
            await asyncio.sleep(FAILURE_PERIOD_S)
        log.critical("this replica is broken and ends: %s", failure)
        return failure

    async def _drain_to_the_end(self) -> None:
        if not await self.drain(self._drain_deadline_s):
            log.warning("drain ended at its deadline with %d live requests", self._logic.num_live_requests())

    async def stop(self) -> None:
        """Unregister, close every socket, end every task. Safe to call twice."""
        if self._watchdog is not None:
            self._watchdog.stop()
        if self._directory is not None:
            try:
                await self._directory.remove(self.member)
            except DuomoError as error:
                log.warning("could not unregister (the lease will expire): %s", error)
        await end_tasks(self._tasks)
        await asyncio.gather(*(connection.close() for connection in self._connections))
        if self._listener is not None:
            await self._listener.close()
            self._listener = None
        if self._own_dir is not None:
            shutil.rmtree(self._own_dir, ignore_errors=True)

    def _spawn(self, work: asyncio._CoroutineLike[None]) -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve_peer(self, connection: Connection) -> None:
        """Read one peer until it is gone; runs as a task for each accepted or opened connection."""
        self._connections.add(connection)
        self._logic.joined(connection)
        if connection.peer.role == "gateway":
            self.gateways[connection.peer.boot_id] = connection
        try:
            while True:
                try:
                    message = await connection.receive()
                except WireError as error:
                    log.warning("%s %s sent what we do not understand: %s", connection.peer.role, connection.peer.replica_id, error)
                    continue
                self._dispatch(connection, message)
        except PeerError as error:
            log.info("%s %s is gone: %s", connection.peer.role, connection.peer.replica_id, error.detail)
        finally:
            self._connections.discard(connection)
            if self.gateways.get(connection.peer.boot_id) is connection:
                del self.gateways[connection.peer.boot_id]
            connection.end("closed", "this replica closed the connection")  # no effect where the peer ended it
            self._logic.left(connection)
            await connection.close()

    def _dispatch(self, connection: Connection, message: Message) -> None:
        try:
            if isinstance(message, OperatorMessage):
                self._obey(connection, message)
            else:
                self._logic.received(connection, message)
        except DuomoError as error:
            connection.post(Refused(code=error.code, detail=error.detail))

    def _obey(self, connection: Connection, message: OperatorMessage) -> None:
        """An operator's word, by way of a gateway. Raises WireError where it is none, or comes too late."""
        if connection.peer.role != "gateway" or isinstance(message, CachesFlushed):
            raise WireError(f"a {connection.peer.role} sends no {type(message).__name__}", code="unexpected_message")
        log.info("%s of gateway %s", type(message).__name__, connection.peer.replica_id)
        if isinstance(message, FlushCaches):
            connection.post(CachesFlushed(flush_id=message.flush_id, num_blocks=self._logic.flush_caches()))
        elif isinstance(message, Undrain):
            if self._is_ending or self._drain_asked.is_set():
                raise WireError("this replica ends when its live requests have", code="ending")
            self.is_draining = False
            self._logic.end_drain()
        elif message.ends:
            self._drain_deadline_s = message.deadline_s
            self._drain_asked.set()
        else:
            self.is_draining = True
            self._logic.begin_drain()

    async def _report_loop(self) -> None:
        while True:
            await asyncio.sleep(REPORT_PERIOD_S)
            if not self.gateways:
                continue
            report = self._logic.report()
            for gateway in list(self.gateways.values()):
                with contextlib.suppress(PeerError):  # its reading task sees the same and removes it
                    gateway.post(report)

    async def _lease_loop(self, directory: Directory) -> None:
        """Hold the lease. An absent or emptied Redis removes nobody: registration is repeated until it succeeds."""
        is_reachable = True
        period_s = self.card.config.redis.lease_s / 3
        while True:
            try:
                await directory.register(self.member)
                if not is_reachable:
                    log.info("the directory answers again; registered")
                is_reachable = True
            except DuomoError as error:
                if is_reachable:
                    log.warning("the directory does not answer, serving on: %s", error)
                is_reachable = False
            await asyncio.sleep(period_s if is_reachable else min(period_s, 0.5))

    def _address_to_bind(self) -> str:
        pool = self.card.pool
        if pool.listen == "tcp":
            return f"tcp:{pool.host}:0"
        folder = self.card.config.run_dir
        if folder is None:
            folder = self._own_dir = Path(tempfile.mkdtemp(prefix="duomo-"))
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(f"{self.card.replica_id}.*.sock"):  # of an earlier start that was killed
            with contextlib.suppress(OSError):
                clear_stale(old)
        path = folder.resolve() / f"{self.card.replica_id}.{self.card.boot_id[:8]}.sock"
        if len(os.fsencode(path)) > MAX_UNIX_PATH_BYTES:
            raise ConfigError(f"run_dir is too long for Unix sockets: {path} is over {MAX_UNIX_PATH_BYTES} bytes; name a shorter folder")
        return f"unix:{path}"

    def _unlink_socket(self) -> None:
        if self.identity.address.startswith("unix:"):
            Path(self.identity.address.removeprefix("unix:")).unlink(missing_ok=True)
        if self._own_dir is not None:
            shutil.rmtree(self._own_dir, ignore_errors=True)


class Watchdog:
    """Ends the process when its work stops moving. A thread, so that a blocked event loop is seen as well."""

    def __init__(self, progress: Progress, before_exit: Callable[[], None]) -> None:
        self._progress = progress
        self._before_exit = before_exit
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(self._progress.hang_timeout_s / 4):
            try:
                self._progress.check()
            except EngineError as error:
                log.critical("%s; ending this process", error)
                self._before_exit()
                os._exit(HANG_EXIT_CODE)  # the kernel closes every socket, which is how peers see it


def _advertised(bound: str) -> str:
    """The address others reach: a wildcard host is replaced by this machine's own."""
    for wildcard in ("tcp:0.0.0.0:", "tcp:[::]:", "tcp::::"):
        if bound.startswith(wildcard):
            return f"tcp:{socket.gethostbyname(socket.gethostname())}:{bound.removeprefix(wildcard)}"
    return bound
