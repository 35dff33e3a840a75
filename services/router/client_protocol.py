"""One client's connection under uvicorn: how much it may send, how slowly it may send and read, and beside how many others. Knows no route.

uvicorn itself bounds none of these: a head may have any size, a client that never ends one is waited for for ever, and so is one that does
not read its answer. Requests that are sent behind one that is being answered (pipelining) wait in a line without an end, and when the
client leaves, only the last of them hears of it.
"""

from __future__ import annotations

import asyncio
import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final, Literal, cast

import uvicorn
from uvicorn._types import ASGI3Application, ASGIReceiveCallable, ASGISendCallable, ASGISendEvent, Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from duomo.config_gateway import GatewaySection
from services.router.auth import BODY_DUE_EXTENSION, OVER_LIMIT_EXTENSION
from services.router.refusals import refusal_body
from services.router.streams import TRANSPORT_EXTENSION
from services.router.unsent import UnsentWatch
from services.router.upgrades import UpgradeIgnoringParser

BODY_BYTES_PER_TIMEOUT: Final = 16 * 1024  # a body that brings less within read_timeout_s is not waited for
MAX_QUEUED: Final = 4  # requests behind the one that is being answered; hardly any client sends one
MAX_QUEUED_BODY_BYTES: Final = 64 * 1024  # of all of them
MAX_FRAMING_BYTES: Final = 64 * 1024  # of one body beside FRAMING_FACTOR times what it holds: chunks of one byte have 5 more
FRAMING_FACTOR: Final = 8
MAX_DROPPED_BYTES: Final = 64 * 1024 * 1024  # of a body that comes behind its answer, within read_timeout_s: who writes all before it
# reads would see a reset and not the answer
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


class _TakesNoMore(Exception):
    """Leaves the parser, which is not asked again."""


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
        self._raw_bytes = 0  # of the body being read, chunks and all
        self._held_bytes = 0  # of it without them
        self._dropped_bytes = 0  # of it behind its answer
        self._is_cut = False
        self._timer: asyncio.TimerHandle | None = None
        self._unsent: UnsentWatch | None = None
        self._answered: RequestResponseCycle | None = None  # the one that is; those of self.pipeline wait for it, self.cycle is the newest
        self.url = b""  # uvicorn's own knows none before a first message begins
        self.parser = UpgradeIgnoringParser(self)  # type: ignore[assignment]  # all of httptools' that uvicorn calls

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        super().connection_made(transport)
        self._unsent = UnsentWatch(self.loop, transport, self._limits.read_timeout_s)
        if len(self.connections) > self._limits.max_connections + SPARE_CONNECTIONS:
            self._limits.refused("too_many_connections")
            self._is_cut = True
            transport.abort()
            return
        self._set_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._clear_timer()
        self._tell_all_gone()
        if self._unsent is not None:
            self._unsent.lost()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def eof_received(self) -> None:
        super().eof_received()
        self.loop.call_soon(self._watch_unsent)  # the transport closes behind this

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_unsent()

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size() and not self.transport.is_closing():  # it is not idle: its answer is on its way
            self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
            return
        super().timeout_keep_alive_handler()
        self._watch_unsent()

    def data_received(self, data: bytes) -> None:
        if self._is_cut:
            return
        self._has_begun_now = False
        if self._reading == "body" and not self._may_bring(len(data)):
            return
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
        if len(self.pipeline) >= MAX_QUEUED:
            self._take_no_more()
        if self.cycle is not None:
            self._clear_timer()  # it was another message's
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
        """Also of trailers, which are headers behind a body: they count on, and are dropped. They prove nobody's key and set no option."""
        self._num_headers += 1
        self._count(len(name) + len(value))
        if self._reading == "head":
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()  # raises for a target that is none: then it is still a head that is refused
        self._reading, self._body_bytes = "body", 0
        self._raw_bytes = self._held_bytes = self._dropped_bytes = 0
        self._clear_timer()  # it was the head's
        extensions = cast(dict[str, object], self.scope["extensions"])
        extensions[BODY_DUE_EXTENSION] = functools.partial(_is_body_due, weakref.ref(self.cycle))  # which holds the scope
        if self.pipeline:
            self.flow.resume_reading()  # who does not read does not hear that the client leaves; the line is bounded by us

    def on_body(self, body: bytes) -> None:
        self._held_bytes += len(body)
        if self.pipeline and sum(len(cycle.body) for cycle, _ in self.pipeline) + len(body) > MAX_QUEUED_BODY_BYTES:
            self.pipeline.popleft()  # the newest, whose body this is
            self._take_no_more()
        super().on_body(body)

    def on_message_complete(self) -> None:
        if cast(UpgradeIgnoringParser, self.parser).is_body_behind:
            return
        self._reading = "nothing"
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn where the parser gave up, for which our own limits are a reason too."""
        if self._is_cut:
            return
        if self._is_head_too_large():
            self._refuse_head()
        else:
            self._cut(400, "This is no valid HTTP request.", "invalid_http")

    # inside

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        """uvicorn's, which keeps the task from us."""
        self._answered = cycle
        task = self.loop.create_task(cycle.run_asgi(_until_closed(app, cycle) if cycle.scope["http_version"] == "1.0" else app))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        task.add_done_callback(lambda _: self._watch_unsent())

    def _watch_unsent(self) -> None:
        if self._unsent is not None:
            self._unsent.begin()

    def _tell_all_gone(self) -> None:
        """Whoever answers, or waits to, hears that the client is gone."""
        for cycle in (self._answered, *(cycle for cycle, _ in self.pipeline)):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        self.pipeline.clear()

    def _take_no_more(self) -> None:
        """The line is full: what it holds is answered, and the connection closes behind the last of it. Leaves the parser."""
        self._is_cut = True
        self._clear_timer()
        last = self.pipeline[0][0] if self.pipeline else self._answered
        assert last is not None
        self.cycle = last
        last.keep_alive = False
        raise _TakesNoMore

    def _may_bring(self, num_bytes: int) -> bool:
        """Whether so many more bytes of a body are read: not behind its answer for ever, and not as chunks that hold next to nothing."""
        self._body_bytes += num_bytes
        self._raw_bytes += num_bytes
        if self.cycle.response_complete:
            self._dropped_bytes += num_bytes
            if self._dropped_bytes > MAX_DROPPED_BYTES:
                self._is_cut = True
                self._clear_timer()
                self.transport.close()
        elif self._raw_bytes - num_bytes > MAX_FRAMING_BYTES + FRAMING_FACTOR * self._held_bytes:
            self._cut(400, "The body's chunks are framing for the most part.", "invalid_http")
        return not self._is_cut

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
        is_sending = self._reading == "body" and self._body_bytes >= BODY_BYTES_PER_TIMEOUT and not self.cycle.response_complete
        if self.flow.read_paused or is_sending:  # paused: it is we who do not read
            self._set_timer()
        elif self._reading == "nothing":
            self._is_cut = True
            self.transport.close()  # it has asked for nothing, and is told nothing
            self._watch_unsent()
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
        self._tell_all_gone()
        self.transport.close()
        self._watch_unsent()

    def _may_answer(self) -> bool:
        """Whether an answer of ours would be the first to what is being read, and stand behind those of what came before."""
        if self._reading != "body":
            return self.cycle is None or self.cycle.response_complete
        return not self.pipeline and not self.cycle.response_started


def _until_closed(app: ASGI3Application, cycle: RequestResponseCycle) -> ASGI3Application:
    """For a client of HTTP/1.0, which knows no chunks: uvicorn sends every answer without a length as such. Here it ends with the
    connection, which uvicorn closes behind each of its answers, as their heads say."""

    async def answering(scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        is_endless = False

        async def sending(message: ASGISendEvent) -> None:
            nonlocal is_endless
            if message["type"] == "http.response.start":
                is_endless = all(name.lower() != b"content-length" for name, _ in message.get("headers", ()))
                if is_endless:
                    cycle.chunked_encoding = False
            elif is_endless and message["type"] == "http.response.body":
                cycle.expected_content_length = len(message.get("body", b""))  # what is sent is what there is to send
            await send(message)

        await app(scope, receive, sending)

    return answering


def _is_body_due(cycle: weakref.ref[RequestResponseCycle]) -> bool:
    answered = cycle()
    return answered is not None and answered.more_body
