"""Whether a client reads what it is sent: a connection whose bytes stay unsent for too long is cut. Knows no HTTP.

A server that only waits keeps connection, task and bytes for as long as the client pleases.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from typing import Any, Final

CLOSING_PATIENCE_S: Final = 5.0  # of a connection that is closing: nobody is served by it any more
_LOOKS: Final = 8  # for each patience
_BYTES_ACKED: Final = struct.Struct("=120xQ")  # of Linux' struct tcp_info
_RESET: Final = struct.pack("ii", 1, 0)

log = logging.getLogger(__name__)


class UnsentWatch:
    """Of one connection. begin() wherever bytes may be left or the transport was closed; it ends by itself once nothing is owed.

    Progress is what the client's system has acknowledged, or a smaller buffer where that is not known: beside a stream that goes on, a
    buffer grows although its client reads, and under TLS a part of it is nobody's to see.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, transport: asyncio.Transport, patience_s: float) -> None:
        self._loop = loop
        self._transport = transport
        self._patience_s = patience_s
        self._closing_patience_s = min(patience_s, CLOSING_PATIENCE_S)
        self._timer: asyncio.TimerHandle | None = None
        self._is_lost = False
        self._since_s = 0.0  # of the last progress
        self._was_closing = False
        self._acked, self._unsent = 0, 0

    def begin(self) -> None:
        if self._timer is None and not self._is_lost and self._is_owed():
            self._has_moved()
            self._since_s = self._loop.time()
            self._set_timer()

    def lost(self) -> None:
        """The connection is: nothing is watched from now on."""
        self._is_lost = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _is_owed(self) -> bool:
        return self._transport.is_closing() or self._transport.get_write_buffer_size() > 0

    def _set_timer(self) -> None:
        self._timer = self._loop.call_later(self._closing_patience_s / _LOOKS, self._look)

    def _look(self) -> None:
        self._timer = None
        if not self._is_owed():
            return
        if self._has_moved():
            self._since_s = self._loop.time()
        patience_s = self._closing_patience_s if self._transport.is_closing() else self._patience_s
        if self._loop.time() - self._since_s < patience_s:
            self._set_timer()
            return
        log.info("a client did not read its answer for %g s and is cut off", patience_s)
        with contextlib.suppress(OSError, AttributeError, TypeError):
            # Else the system itself would keep what it holds, and offer it to the client for minutes.
            self._socket().setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._transport.abort()

    def _has_moved(self) -> bool:
        acked, unsent, is_closing = self._bytes_acked(), self._transport.get_write_buffer_size(), self._transport.is_closing()
        has_moved = acked > self._acked or unsent < self._unsent or is_closing != self._was_closing
        self._acked, self._unsent, self._was_closing = acked, unsent, is_closing
        return has_moved

    def _bytes_acked(self) -> int:
        """0 where the system does not tell."""
        try:
            told = self._socket().getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
            return int(_BYTES_ACKED.unpack_from(told)[0])
        except (OSError, AttributeError, TypeError, struct.error):
            return 0

    def _socket(self) -> Any:  # asyncio's and uvloop's have no class in common
        return self._transport.get_extra_info("socket")
