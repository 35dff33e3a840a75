"""One client's connection under uvicorn: how much of a head it may send, how slowly, and beside how many others. Knows no route.

uvicorn itself bounds none of these: a head may have any size, and a client that never ends one is waited for for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final, Literal, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from duomo.config_gateway import GatewaySection
from services.router.auth import OVER_LIMIT_EXTENSION
from services.router.refusals import refusal_body
from services.router.streams import TRANSPORT_EXTENSION

BODY_BYTES_PER_TIMEOUT: Final = 16 * 1024  # a body that brings less within read_timeout_s is not waited for
SPARE_CONNECTIONS: Final = 256  # above the limit are told so; what comes above these is cut without a word


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientLimits:
    """Of every connection. refused: hears the code of each refusal that no route and no guard has made."""

    max_headers: int
    max_header_bytes: int
    read_timeout_s: float
    max_connections: int
    refused: Callable[[str], None]

    @classmethod
    def of(cls, section: GatewaySection, refused: Callable[[str], None]) -> ClientLimits:
        return cls(
            max_headers=section.max_headers,
            max_header_bytes=section.max_header_bytes,
            read_timeout_s=section.read_timeout_s,
            max_connections=section.max_connections,
            refused=refused,
        )


class EdgeConfig(uvicorn.Config):
    """uvicorn's, with what every connection is held to."""

    limits: ClientLimits


class _HeadTooLarge(Exception):
    """Leaves the parser, which then asks for a refusal (send_400_response)."""


class ClientProtocol(HttpToolsProtocol):
    """Also puts the client's transport into the scope, where streams.py finds how far the client is behind."""

    def __init__(
        self, config: uvicorn.Config, server_state: ServerState, app_state: dict[str, Any], _loop: asyncio.AbstractEventLoop | None = None
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        assert isinstance(config, EdgeConfig)
        self._limits = config.limits
        self._reading: Literal["nothing", "head", "body"] = "nothing"
        self._has_begun_now = False  # the message being read began within the bytes being fed
        self._num_headers = 0
        self._header_bytes = 0  # of headers that are whole
        self._head_bytes = 0  # of a head that is not: an endless one is never told header by header
        self._body_bytes = 0  # since the timer was set
        self._is_cut = False
        self._timer: asyncio.TimerHandle | None = None

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections + SPARE_CONNECTIONS:
            self._limits.refused("too_many_connections")
            self._is_cut = True
            transport.abort()
            return
        self._set_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._clear_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_cut:
            return
        self._has_begun_now = False
        if self._reading == "body":
            self._body_bytes += len(data)
        super().data_received(data)
        if self._is_cut or self.transport.is_closing():
            self._clear_timer()
            return
        if self._reading == "head" and not self._has_begun_now:
            self._head_bytes += len(data)
            if self._head_bytes > self._limits.max_header_bytes:
                self._refuse_head()
                return
        # A client that owes us something: the rest of a request or, where none is being answered, its next one.
        if self._reading != "nothing" or self.cycle is None or self.cycle.response_complete:
            if self._timer is None:
                self._set_timer()
        else:
            self._clear_timer()

    # httptools

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._reading, self._has_begun_now = "head", True
        self._num_headers = self._header_bytes = self._head_bytes = 0
        extensions: dict[str, dict[object, object]] = {}
        extensions[TRANSPORT_EXTENSION] = cast(dict[object, object], self.transport)  # no mapping, but ours alone
        if len(self.connections) > self._limits.max_connections:
            extensions[OVER_LIMIT_EXTENSION] = {"is": True}  # the guard, which knows the path, says so
        self.scope["extensions"] = extensions

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Also of trailers, which are headers behind a body: they count on."""
        self._num_headers += 1
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._reading, self._body_bytes = "body", 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._reading = "nothing"
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn where the parser gave up, for which our own limits are a reason too."""
        if self._is_head_too_large():
            self._refuse_head()
        else:
            self._is_cut = True
            super().send_400_response(msg)

    # inside

    def _count(self, num_bytes: int) -> None:
        self._header_bytes += num_bytes
        if self._is_head_too_large():
            raise _HeadTooLarge

    def _is_head_too_large(self) -> bool:
        return self._num_headers > self._limits.max_headers or self._header_bytes > self._limits.max_header_bytes

    def _refuse_head(self) -> None:
        limits = self._limits
        detail = f"The request's headers are more than {limits.max_headers}, or larger than {limits.max_header_bytes} bytes."
        self._cut(431, detail, "headers_too_large")

    def _set_timer(self) -> None:
        self._body_bytes = 0
        self._timer = self.loop.call_later(self._limits.read_timeout_s, self._overdue)

    def _clear_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _overdue(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        is_sending = self._reading == "body" and self._body_bytes >= BODY_BYTES_PER_TIMEOUT
        if self.flow.read_paused or is_sending:  # paused: it is we who do not read
            self._set_timer()
        elif self._reading == "nothing":
            self._is_cut = True
            self.transport.close()  # it has asked for nothing, and is told nothing
        else:
            part = "headers were" if self._reading == "head" else "body was"
            self._cut(408, f"The request's {part} not sent within {self._limits.read_timeout_s:g} s.", "request_timeout")

    def _cut(self, status: int, detail: str, code: str) -> None:
        """Answer, where nothing has been answered yet, and close; what the client still sends is not read."""
        self._is_cut = True
        self._clear_timer()
        self._limits.refused(code)
        if self._may_answer():
            body = refusal_body(self.url.decode("latin-1"), status, (detail, None, code))
            head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
            self.transport.write(f"{head}\r\nconnection: close\r\n\r\n".encode() + body)
        self.transport.close()

    def _may_answer(self) -> bool:
        """Whether an answer of ours would be the first to what is being read, and stand behind those of what came before."""
        if self._reading == "head":
            return self.cycle is None or self.cycle.response_complete
        return not self.pipeline and not self.cycle.response_started
