"""The gateway under uvicorn: its socket, protocol, signals left alone. The only file that knows uvicorn; knows no route.

The listening socket has a small send buffer, so that "behind" means what the client has not read and not what the kernel hoards.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import AsyncIterator
from typing import Final, cast

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from duomo.config_gateway import GatewaySection
from duomo.errors import ConfigError
from services.router.streams import TRANSPORT_EXTENSION

_BACKLOG: Final = 1024
_SEND_BUFFER_BYTES: Final = 64 * 1024  # the kernel doubles it
_STOP_WAIT_S: Final = 5

log = logging.getLogger(__name__)


class ClientProtocol(HttpToolsProtocol):
    """Puts the client's transport into the scope, where streams.py finds how far the client is behind."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        extensions: dict[str, dict[object, object]] = {}
        extensions[TRANSPORT_EXTENSION] = cast(dict[object, object], self.transport)  # no mapping, but ours alone
        self.scope["extensions"] = extensions


class EmbeddedServer(uvicorn.Server):
    """Leaves signals to whoever embeds it."""

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]  # uvicorn's own is a generator context without names
        yield


def bind_port(section: GatewaySection) -> socket.socket:
    """The listening socket. Raises ConfigError naming the option where the port is taken or the host is none of ours."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(section.host, section.port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, proto)
    except OSError as error:
        raise ConfigError(f"gateway.host {section.host} (--host) cannot be used: {error}", code="bad_address") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        bound.bind(address)
        bound.listen(_BACKLOG)
        bound.setblocking(False)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {section.port} is taken: choose another by --port (gateway.port) or stop what listens there", code="port_taken"
            ) from error
        raise ConfigError(f"cannot listen on {section.host}:{section.port} (--host, --port): {error}", code="bad_address") from error
    return bound


@contextlib.asynccontextmanager
async def serving(app: FastAPI, bound: socket.socket) -> AsyncIterator[None]:
    """Serve `app` on the bound socket while the block runs; open answers get a few seconds to end. Closes the socket."""
    settings = uvicorn.Config(
        app,
        http=ClientProtocol,
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        date_header=False,
        timeout_graceful_shutdown=_STOP_WAIT_S,
    )
    server = EmbeddedServer(settings)
    running = asyncio.get_running_loop().create_task(server.serve(sockets=[bound]))
    try:
        while not server.started and not running.done():
            await asyncio.sleep(0.005)
        yield
    finally:
        server.should_exit = True
        await running
        bound.close()
