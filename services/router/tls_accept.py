"""Accepts TLS connections, counting those that have not shaken hands yet. Knows no request.

asyncio's own server has no say over them: a client that connects and is silent takes a descriptor for as long as a handshake may last, and
many of them take all, so that nothing is accepted and no replica dialled.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

_ACCEPTS_A_TURN: Final = 64
_PAUSE_S: Final = 1.0  # after an accept that failed for want of descriptors, as asyncio pauses

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsTerms:
    """handshake_s: how long one may take. has_room: whether one more connection may be held beside so many that shake hands. refused: hears
    of each that was closed for want of room."""

    context: ssl.SSLContext
    handshake_s: float
    has_room: Callable[[int], bool]
    refused: Callable[[], None]


class TlsAcceptor:
    """On the running loop, from start() on; like asyncio's Server as far as uvicorn asks for one. The socket is its creator's to close."""

    def __init__(self, made: Callable[[], asyncio.Protocol], bound: socket.socket, terms: TlsTerms) -> None:
        self._loop = asyncio.get_running_loop()
        self._made = made
        self._bound = bound
        self._terms = terms
        self._shaking: set[asyncio.Task[None]] = set()
        self._paused: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._paused = None
        self._loop.add_reader(self._bound.fileno(), self._accept)

    def close(self) -> None:
        """Whoever shakes hands is cut; connections live on."""
        if self._paused is not None:
            self._paused.cancel()
        self._loop.remove_reader(self._bound.fileno())
        for shaking in self._shaking:
            shaking.cancel()

    async def wait_closed(self) -> None:
        await asyncio.gather(*self._shaking, return_exceptions=True)

    def _accept(self) -> None:
        for _ in range(_ACCEPTS_A_TURN):
            try:
                connection, _ = self._bound.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                log.error("cannot accept connections for %g s: %s", _PAUSE_S, error)
                self._loop.remove_reader(self._bound.fileno())
                self._paused = self._loop.call_later(_PAUSE_S, self.start)
                return
            if not self._terms.has_room(len(self._shaking)):
                self._terms.refused()
                connection.close()
                continue
            connection.setblocking(False)
            task = self._loop.create_task(self._shake_hands(connection))
            self._shaking.add(task)
            task.add_done_callback(functools.partial(self._shaken, connection))

    def _shaken(self, connection: socket.socket, task: asyncio.Task[None]) -> None:
        self._shaking.discard(task)
        if task.cancelled():
            connection.close()  # one that was cut before it began is nobody else's

    async def _shake_hands(self, connection: socket.socket) -> None:
        terms = self._terms
        try:
            await self._loop.connect_accepted_socket(self._made, connection, ssl=terms.context, ssl_handshake_timeout=terms.handshake_s)
        except OSError as error:  # also what TLS and its time limit raise
            log.debug("a TLS handshake failed: %s", error)
