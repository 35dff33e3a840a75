"""From a request's events to the client's socket: server-sent events or one object, disconnects, slow clients.

A sink takes events of all requests of one HTTP call; its response owns the sending. Events become bytes when they happen, so what a client
is behind is known in bytes. Knows no replica and no policy.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from duomo.errors import DuomoError, RequestCancelled
from services.router.answers import AnswerShape, FinishedChoice
from services.router.generation import GenerationEnded, GenerationEvent, GenerationFailed, PromptScoresKnown, TextEmitted, Usage
from services.router.scored_prompt import FEW_ENTRIES, ScoredPrompt

# uvicorn's transport, put into the ASGI scope by edge.py: tells how much a client is behind, and can be cut.
TRANSPORT_EXTENSION = "duomo.transport"

log = logging.getLogger(__name__)


class ClientTransport(Protocol):
    """What streaming and a slow client's cutting need of the server's transport."""

    def write(self, data: bytes) -> None: ...
    def is_closing(self) -> bool: ...
    def get_write_buffer_size(self) -> int: ...
    def abort(self) -> None: ...


class Sink(ABC):
    """What both kinds of answer share: waiting, usage, the first failure. num_requests must end before the answer is complete.

    first_sent_s, second_sent_s: when the first and second token's bytes were handed to the client's socket.
    """

    def __init__(self, num_requests: int, wants_pieces: bool) -> None:
        self.wants_pieces = wants_pieces
        self.error: DuomoError | None = None
        self.usage = Usage(0, 0, None)
        self.first_sent_s = 0.0
        self.second_sent_s = 0.0
        self._num_left = num_requests
        self._waiter: asyncio.Future[None] | None = None
        self._num_writing = 0
        self._held: list[GenerationEvent] = []  # what came while a prompt is written

    @property
    def is_over(self) -> bool:
        return self._num_left == 0 or self.error is not None

    def deliver(self, event: GenerationEvent) -> None:
        """A prompt that is shown is written first, a long one in a thread: nothing that stands behind it goes out before."""
        if isinstance(event, PromptScoresKnown):
            self._write(event.scored)
        elif self._num_writing:
            self._held.append(event)
        else:
            self._take(event)

    def leave(self, why: str) -> None:
        """The client is gone: whoever sends stops."""
        if not self.is_over:
            self.error = RequestCancelled(why)
        self._wake()

    @abstractmethod
    def _take(self, event: GenerationEvent) -> None:
        """The event's turn has come."""

    def _write(self, scored: ScoredPrompt) -> None:
        if scored.num_entries <= FEW_ENTRIES:
            scored.write()
            return
        self._num_writing += 1
        asyncio.get_running_loop().run_in_executor(None, scored.write).add_done_callback(self._written)

    def _written(self, done: asyncio.Future[None]) -> None:
        self._num_writing -= 1
        fault = None if done.cancelled() else done.exception()
        if fault is not None:
            log.error("a prompt's log-probabilities cannot be written", exc_info=fault)
            self.error = self.error or DuomoError("The server made a mistake.", phase="gateway")
        if not self._num_writing:
            held, self._held = self._held, []
            for event in held:
                self._take(event)
        self._wake()

    def _count(self, event: GenerationEnded | GenerationFailed) -> None:
        self._num_left -= 1
        if isinstance(event, GenerationFailed):
            self.error = self.error or event.error
        else:
            self.usage = _sum(self.usage, event.usage)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _sleep(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None


class WholeSink(Sink):
    """Gathers every choice until all have ended."""

    def __init__(self, num_requests: int, wants_pieces: bool) -> None:
        super().__init__(num_requests, wants_pieces)
        self._choices: dict[int, FinishedChoice] = {}

    def _take(self, event: GenerationEvent) -> None:
        if isinstance(event, TextEmitted):
            choice = self._choices.setdefault(event.choice, FinishedChoice(event.choice))
            choice.texts.append(event.text)
            choice.pieces += event.pieces
            choice.finish_reason, choice.stop_string = event.finish_reason, event.stop_string
        elif not isinstance(event, PromptScoresKnown):
            self._count(event)
            if self.is_over:
                self._wake()

    async def gather(self, shape: AnswerShape) -> bytes:
        """The answer. Raises the error of the first request that failed."""
        while not self.is_over:
            await self._sleep()
        if self.error is not None:
            raise self.error
        return shape.whole([self._choices[number] for number in sorted(self._choices)], self.usage)


class StreamSink(Sink):
    """Turns each event into its bytes at once. on_behind is called when the client is more than max_behind_bytes behind."""

    def __init__(
        self,
        num_requests: int,
        wants_pieces: bool,
        shape: AnswerShape,
        *,
        max_behind_bytes: int,
        transport: ClientTransport | None,
        on_behind: Callable[[], None],
    ) -> None:
        super().__init__(num_requests, wants_pieces)
        self._shape = shape
        self._max_behind_bytes = max_behind_bytes
        self._transport = transport
        self._on_behind = on_behind
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._opened: set[int] = set()
        self._num_sent = 0
        self._is_passing = False  # whoever sends sleeps until the end; bytes go to the transport from here
        self._is_write_due = False
        self.recorder: Callable[[bytes], None] | None = None  # told of all bytes on their way out

    def _take(self, event: GenerationEvent) -> None:
        if self.error is not None:
            return
        if isinstance(event, TextEmitted):
            written = b""
            if event.choice not in self._opened:
                self._opened.add(event.choice)
                written = self._shape.opening(event.choice)
                self._max_behind_bytes += len(written)  # a prompt that is echoed comes all at once: no client could keep up with it
            written += self._shape.chunk(event)
            self._buffer += written
            if not written:
                self.sent()  # nothing of this token goes out: it is as good as there
            if len(self._buffer) > self._max_behind_bytes - self._unsent_bytes():
                self.error = RequestCancelled("the client reads too slowly", code="slow_client")
                self._on_behind()
        elif not isinstance(event, PromptScoresKnown):
            self._count(event)
            if isinstance(event, GenerationFailed):
                if self._opened:
                    self._buffer += self._shape.failure(event.error)
            elif self._num_left == 0:
                self._buffer += self._shape.ending(self.usage)
        if not self._is_passing or self.is_over:
            self._wake()
        elif not self._is_write_due:
            self._is_write_due = True
            self._loop.call_soon(self._pass_on)

    @property
    def has_transport(self) -> bool:
        return self._transport is not None

    async def first(self) -> None:
        """Wait for the first bytes. Raises the error of a request that failed before it, so that it can be an HTTP status."""
        while not self._buffer and self.error is None:
            await self._sleep()
        if not self._opened and self.error is not None:
            raise self.error

    async def next(self) -> bytes | None:
        """All bytes since the last call in one piece; None at the end, or when the client is gone."""
        while not self._buffer:
            if self.is_over:
                return None
            await self._sleep()
        if isinstance(self.error, RequestCancelled):
            return None
        return self._taken()

    async def pass_through(self) -> bytes | None:
        """What `next` would give until the end goes straight to the transport, as chunks of a chunked body: a write for each tick in which
        tokens came, and nobody is woken for it. Returns the last bytes (none are written yet), or None when the client is gone."""
        self._is_passing = True
        while not self.is_over:
            await self._sleep()
        self._is_passing = False
        return None if isinstance(self.error, RequestCancelled) else self._taken()

    def _pass_on(self) -> None:
        self._is_write_due = False
        transport = self._transport
        if self._is_passing and self._buffer and not self.is_over and transport is not None and not transport.is_closing():
            taken = self._taken()
            transport.write(b"%x\r\n%b\r\n" % (len(taken), taken))
            self.sent()

    def _taken(self) -> bytes:
        taken, self._buffer = bytes(self._buffer), bytearray()
        if self.recorder is not None:
            self.recorder(taken)
        return taken

    def sent(self) -> None:
        """The bytes of the last `next` are with the client's socket."""
        self._num_sent += 1
        if self._num_sent == 1:
            self.first_sent_s = time.monotonic()
        elif self._num_sent == 2:
            self.second_sent_s = time.monotonic()

    def _unsent_bytes(self) -> int:
        return self._transport.get_write_buffer_size() if self._transport is not None else 0


class StreamResponse(Response):
    """Sends a StreamSink's bytes until it ends or its client is gone; then calls on_end once.

    The first bytes and the last go the server's way; those between go past it, to the transport that it writes to itself, where there is
    one: a task woken for every token, through all layers of an application, costs more than the token. delay_s: slept before each write
    (config.DelaySection), for which every write goes the server's way.
    """

    media_type = "text/event-stream"

    def __init__(self, sink: StreamSink, headers: dict[str, str], on_end: Callable[[], None], delay_s: float = 0.0) -> None:
        self.status_code = 200
        self.background = None
        self._sink = sink
        self._on_end = on_end
        self._delay_s = delay_s
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **headers})

    @property
    def sink(self) -> StreamSink:
        """Whose bytes these are."""
        return self._sink

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sink = self._sink
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            last: bytes | None = b""
            while (chunk := await sink.next()) is not None:
                if self._delay_s:
                    await asyncio.sleep(self._delay_s)
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                sink.sent()
                if sink.has_transport and not self._delay_s and scope.get("http_version") != "1.0":  # who knows no chunks
                    last = await sink.pass_through()
                    break
            if last is not None and not isinstance(sink.error, RequestCancelled):
                await send({"type": "http.response.body", "body": last, "more_body": False})
                if last:
                    sink.sent()
        finally:
            self._on_end()


async def watch_client(receive: Receive, sink: Sink) -> None:
    """Tell the sink when the client closes its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
    sink.leave("the client closed its connection")


def _sum(one: Usage, other: Usage) -> Usage:
    cached = None if one.cached_tokens is None and other.cached_tokens is None else (one.cached_tokens or 0) + (other.cached_tokens or 0)
    return Usage(one.prompt_tokens + other.prompt_tokens, one.completion_tokens + other.completion_tokens, cached)
