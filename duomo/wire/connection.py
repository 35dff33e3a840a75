"""Connections between processes: dialled, accepted, closed. Owns the listening socket; knows no service, only Messages (stream.py)."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Awaitable, Callable
from typing import Self

from duomo.config import WireSection
from duomo.errors import PeerError
from duomo.wire.address import bind, bound_address, dial, file_id, parse_address
from duomo.wire.handshake import Handshake, Identity, new_boot_id
from duomo.wire.stream import Connection

__all__ = ["Connection", "Identity", "Listener", "connect", "new_boot_id"]

_log = logging.getLogger(__name__)


async def connect(address: str, identity: Identity, wire: WireSection) -> Connection:
    """Dial a Listener and shake hands.

    Raises PeerError (unreachable, connect_timeout, or the code of the refusal) and ConfigError for what is no address.
    """
    target = parse_address(address)
    connections: list[Connection] = []

    def make() -> Connection:
        handshake = Handshake(identity, "connector")
        connections.append(Connection(wire, handshake, handshake.opening()))
        return connections[-1]

    is_open = False
    try:
        async with asyncio.timeout(wire.connect_timeout_s):
            connection = await dial(target, make)
            await connection.is_open.wait()
        connection.check_open()
        is_open = True
        return connection
    except TimeoutError as error:
        raise PeerError(f"{address} did not answer in {wire.connect_timeout_s:g} s", code="connect_timeout") from error
    except OSError as error:
        raise PeerError(f"cannot reach {address}: {error.strerror or error}", code="unreachable") from error
    finally:
        if not is_open:
            for made in connections:
                made.end("closed", "the handshake did not finish")


class Listener:
    """Accepts peers. Owns the socket, its file, and one task for each accepted connection, in which on_connection runs.

    When on_connection returns or raises, its connection is closed. address: the bound one (TCP port 0 resolved), which Hello carries too.
    """

    def __init__(self, address: str, identity: Identity, wire: WireSection, on_connection: Callable[[Connection], Awaitable[None]]) -> None:
        self.address = address
        self.identity = identity
        self._wire = wire
        self._on_connection = on_connection
        self._server: asyncio.Server | None = None
        self._file: tuple[int, int] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Bind and accept. Raises ConfigError where the address is taken or cannot be had."""
        asked = parse_address(self.address)
        bound = await bind(asked)
        self._file = file_id(asked)
        self.address = str(bound_address(asked, bound))
        self.identity = dataclasses.replace(self.identity, address=self.address)
        loop = asyncio.get_running_loop()
        create = loop.create_unix_server if asked.path is not None else loop.create_server
        self._server = await create(self._accept, sock=bound)

    async def close(self) -> None:
        """Stop accepting, end every accepted connection and its task, remove the socket's file."""
        if self._server is None:
            return
        server, self._server = self._server, None
        path = parse_address(self.address).path
        if path is not None and self._file == file_id(parse_address(self.address)):
            path.unlink(missing_ok=True)
        server.close()
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _accept(self) -> Connection:
        connection = Connection(self._wire, Handshake(self.identity, "listener"), None)
        task = asyncio.get_running_loop().create_task(self._serve(connection))
        self._tasks.add(task)
        task.add_done_callback(self._served)
        return connection

    async def _serve(self, connection: Connection) -> None:
        try:
            await connection.is_open.wait()
            if not connection.closed:
                await self._on_connection(connection)
        finally:
            await connection.close()

    def _served(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        if isinstance(error, PeerError):
            _log.info("a peer is gone: %s", error)
        else:
            _log.error("a peer's task failed, its connection is closed", exc_info=error)
