"""Addresses of sockets: `unix:/path` and `tcp:host:port`, bound and dialled. Knows no frame and no peer."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from duomo.errors import ConfigError

_MAX_UNIX_PATH_BYTES: Final = 107  # sun_path of Linux, without its closing zero
_BACKLOG: Final = 512

_P = TypeVar("_P", bound=asyncio.BaseProtocol)


@dataclass(frozen=True, slots=True)
class Address:
    """One of both kinds: path of a Unix socket, or host and port (0: the system chooses)."""

    path: Path | None
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix:{self.path}"
        return f"tcp:[{self.host}]:{self.port}" if ":" in self.host else f"tcp:{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """Raises ConfigError where `text` is neither `unix:/path` nor `tcp:host:port`."""
    kind, _, rest = text.partition(":")
    if kind == "unix" and rest:
        if len(os.fsencode(rest)) > _MAX_UNIX_PATH_BYTES:
            raise ConfigError(f"address {text} is longer than a Unix socket's {_MAX_UNIX_PATH_BYTES} bytes: choose a shorter run_dir")
        return Address(Path(rest))
    host, _, port = rest.rpartition(":")
    if kind == "tcp" and host and port.isascii() and port.isdigit() and int(port) <= 65535:
        return Address(None, host.removeprefix("[").removesuffix("]"), int(port))
    raise ConfigError(f"address {text!r} must be unix:/path or tcp:host:port")


async def dial(address: Address, protocol: Callable[[], _P]) -> _P:
    """Connect a new protocol. Raises OSError."""
    loop = asyncio.get_running_loop()
    if address.path is not None:
        return (await loop.create_unix_connection(protocol, str(address.path)))[1]
    return (await loop.create_connection(protocol, address.host, address.port))[1]


async def bind(address: Address) -> socket.socket:
    """A listening socket; a stale Unix socket file is replaced. Raises ConfigError where the address is taken or cannot be had."""
    loop = asyncio.get_running_loop()
    family = socket.AddressFamily.AF_UNIX
    try:
        if address.path is None:
            found = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
            family = found[0][0]
            target: str | tuple[object, ...] = found[0][4]
        else:
            target = str(address.path)
            clear_stale(address.path)
        bound = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise _cannot_listen(address, error) from error
    try:
        bound.setblocking(False)
        if address.path is None:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(target)
        if address.path is not None:
            os.chmod(address.path, 0o600)
        bound.listen(_BACKLOG)
    except OSError as error:
        bound.close()
        raise _cannot_listen(address, error) from error
    return bound


def bound_address(address: Address, bound: socket.socket) -> Address:
    """`address` with the port that the system chose."""
    return address if address.path is not None else Address(None, address.host, bound.getsockname()[1])


def file_id(address: Address) -> tuple[int, int] | None:
    """Which file a Unix address names now: so that a listener removes only its own."""
    if address.path is None:
        return None
    with contextlib.suppress(FileNotFoundError):
        found = address.path.stat()
        return found.st_dev, found.st_ino
    return None


def clear_stale(path: Path) -> None:
    """Remove a socket file that nobody listens on; raises OSError(EADDRINUSE) where somebody does, or it is no socket."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OSError(errno.EADDRINUSE, "a file that is no socket has this name")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # a listener whose backlog is full answers EAGAIN, and is alive
        if probe.connect_ex(str(path)) == errno.ECONNREFUSED:
            path.unlink(missing_ok=True)
            return
    raise OSError(errno.EADDRINUSE, "another process listens there")


def _cannot_listen(address: Address, error: OSError) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError(f"address {address} is taken: {error.strerror}; choose another or stop what holds it", code="address_taken")
    return ConfigError(f"cannot listen on {address}: {error}", code="bad_address")
