"""The gateway under uvicorn: its sockets, signals left alone. With client_protocol.py the only file that knows uvicorn; knows no route.

The listening socket has a small send buffer, so that "behind" means what the client has not read and not what the kernel hoards.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import logging
import resource
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from typing import Final, cast

import uvicorn
from fastapi import FastAPI

from duomo.config_gateway import GatewaySection
from duomo.errors import ConfigError
from services.router.client_protocol import SPARE_CONNECTIONS, ClientLimits, ClientProtocol, EdgeConfig
from services.router.tls import tls_context
from services.router.tls_accept import TlsAcceptor, TlsTerms

_BACKLOG: Final = 1024
_SEND_BUFFER_BYTES: Final = 64 * 1024  # the kernel doubles it
_STOP_WAIT_S: Final = 5
_MAX_HANDSHAKE_S: Final = 10.0
_OTHER_FILES: Final = 512  # replicas, Redis, logs, libraries

log = logging.getLogger(__name__)


class EmbeddedServer(uvicorn.Server):
    """Leaves signals to whoever embeds it."""

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]  # uvicorn's own is a generator context without names
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's, which leaves a handshake its minute, and counts nobody before it (tls_accept.py)."""
        config = self.config
        assert isinstance(config, EdgeConfig) and sockets is not None
        await self.lifespan.startup()
        made = functools.partial(ClientProtocol, config, self.server_state, self.lifespan.state)
        if config.ssl is None:
            loop = asyncio.get_running_loop()
            self.servers = [await loop.create_server(made, sock=bound, backlog=config.backlog) for bound in sockets]
        else:
            doors = [TlsAcceptor(made, bound, self._tls_terms(config, config.ssl)) for bound in sockets]
            for door in doors:
                door.start()
            self.servers = cast(list[asyncio.base_events.Server], doors)
        self.started = True

    def _tls_terms(self, config: EdgeConfig, context: ssl.SSLContext) -> TlsTerms:
        limits, connections = config.limits, self.server_state.connections
        return TlsTerms(
            context=context,
            handshake_s=min(limits.read_timeout_s, _MAX_HANDSHAKE_S),
            has_room=lambda num_shaking: len(connections) + num_shaking < limits.max_connections + SPARE_CONNECTIONS,
            refused=lambda: limits.refused("too_many_connections"),
        )


def allow_connections(section: GatewaySection) -> None:
    """Raise this process' limit of open files to what its connections need, as far as it may: systems often begin at 1024.

    Without a descriptor nothing can be accepted, nobody refused, and no replica dialled.
    """
    wanted = section.max_connections + SPARE_CONNECTIONS + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most < wanted:
        log.warning("gateway.max_connections is %d, but this process may open %d files alone (ulimit -Hn)", section.max_connections, most)


def bind_port(section: GatewaySection) -> socket.socket:
    """The gateway's listening socket. Raises ConfigError naming the option where the port is taken or the host is none of ours."""
    return _bind(section.host, section.port, "")


def bind_admin_port(section: GatewaySection) -> socket.socket | None:
    """The admin API's; None where none is named."""
    return None if section.admin_port is None else _bind(section.admin_host, section.admin_port, "admin_")


def _bind(host: str, port: int, which: str) -> socket.socket:
    """which: what the options' names begin with."""
    flag = "--" + which.replace("_", "-")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, proto)
    except OSError as error:
        raise ConfigError(f"gateway.{which}host {host} ({flag}host) cannot be used: {error}", code="bad_address") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        bound.bind(address)
        bound.listen(_BACKLOG)
        bound.setblocking(False)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            option = f"{flag}port (gateway.{which}port)"
            raise ConfigError(f"port {port} is taken: choose another by {option} or stop what listens there", code="port_taken") from error
        raise ConfigError(f"cannot listen on {host}:{port} ({flag}host, {flag}port): {error}", code="bad_address") from error
    return bound


@contextlib.asynccontextmanager
async def serving(app: FastAPI, bound: socket.socket, section: GatewaySection, refused: Callable[[str], None]) -> AsyncIterator[None]:
    """Serve `app` on the bound socket while the block runs; open answers get a few seconds to end. Closes the socket.

    refused: see ClientLimits. Raises ConfigError for TLS files that cannot be used.
    """
    settings = EdgeConfig(
        app,
        http=ClientProtocol,
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        proxy_headers=False,  # a client may write whatever it likes there, and the audit names who called
        server_header=False,
        date_header=False,
        timeout_keep_alive=section.keep_alive_timeout_s,  # type: ignore[arg-type]  # goes to call_later, which takes fractions
        timeout_graceful_shutdown=_STOP_WAIT_S,
    )
    settings.limits = ClientLimits.of(section, refused)
    settings.load()
    settings.ssl = tls_context(section)
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
