"""A client for `duomo bench gateway`: raw bytes and their times over keep-alive connections, in a process of its own. Knows no server.

While streams run it does nothing but note what came when; what the bytes say is read afterwards (read_stream), so that on a machine of
few cores the client takes little from the gateway that it measures.
"""

from __future__ import annotations

import asyncio
import json
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection as Pipe
from typing import Final, cast
from urllib.parse import urlsplit

import uvloop

STARTED: Final = "started"
_OK: Final = b"HTTP/1.1 200 "
_END_OF_BODY: Final = b"0\r\n\r\n"
_STREAM_TIMEOUT_S: Final = 120.0


@dataclass(frozen=True, kw_only=True)
class Asking:
    """What is asked, over and over: `num_streams` at once, until so many requests or seconds are over. Seeds count up from first_seed.

    prompt: the one message. new_tokens: lengths, taken in turn. pause_s: between two of a connection.
    """

    url: str
    model: str
    prompt: str
    new_tokens: Sequence[int]
    num_streams: int
    first_seed: int
    num_requests: int = 1 << 40
    duration_s: float = 1e9
    pause_s: float = 0.0

    def body(self, seed: int) -> bytes:
        """The same bytes to every server."""
        return json.dumps(
            {
                "model": self.model,
                "messages": [{"role": "user", "content": self.prompt}],
                "max_tokens": self.num_tokens(seed),
                "temperature": 0,
                "seed": seed,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()

    def num_tokens(self, seed: int) -> int:
        return self.new_tokens[seed % len(self.new_tokens)]


@dataclass
class RawStream:
    """One answer as it came: when the request was written, and pieces with the moment each was read (monotonic seconds)."""

    seed: int
    asked_s: float = 0.0
    pieces: list[bytes] = field(default_factory=list)
    times_s: array[float] = field(default_factory=lambda: array("d"))


@dataclass(frozen=True)
class SeenStream:
    """One answer as it reads. texts: of each event but the opening and the usage; times_s: when its last byte came."""

    seed: int
    asked_s: float
    texts: list[str]
    num_prompt_tokens: int
    num_completion_tokens: int
    times_s: array[float]

    @property
    def text(self) -> str:
        return "".join(self.texts)


class BadAnswer(ValueError):
    """What came is no whole answer; the message begins what it was."""


class _ClientConnection(asyncio.Protocol):
    """One keep-alive connection; a stream at a time."""

    def __init__(self) -> None:
        self.stream: RawStream | None = None
        self.ended: asyncio.Future[None] | None = None
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        stream = self.stream
        if stream is None:
            return
        stream.times_s.append(time.monotonic())
        stream.pieces.append(data)
        is_refusal = len(stream.pieces) == 1 and not data.startswith(_OK)
        if (data.endswith(_END_OF_BODY) or is_refusal) and self.ended is not None and not self.ended.done():
            self.ended.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.ended is not None and not self.ended.done():
            came = b"".join(self.stream.pieces) if self.stream is not None else b""
            self.ended.set_exception(BadAnswer(f"the server closed the connection; it said {came[:300]!r}"))

    async def ask(self, request: bytes, seed: int) -> RawStream:
        assert self.transport is not None
        stream = self.stream = RawStream(seed)
        self.ended = asyncio.get_running_loop().create_future()
        stream.asked_s = time.monotonic()
        self.transport.write(request)
        async with asyncio.timeout(_STREAM_TIMEOUT_S):
            await self.ended
        self.stream = None
        return stream


async def load(asking: Asking, take: Callable[[RawStream], None]) -> None:
    """Run it; `take` is given each stream at its end. Raises BadAnswer, TimeoutError, OSError."""
    parts = urlsplit(asking.url)
    host, port = parts.hostname or "", parts.port or 80
    seeds = iter(range(asking.first_seed, asking.first_seed + asking.num_requests))
    end_s = time.monotonic() + asking.duration_s
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"

    async def one_after_another() -> None:
        _, connection = await asyncio.get_running_loop().create_connection(_ClientConnection, host, port)
        try:
            while time.monotonic() < end_s and (seed := next(seeds, None)) is not None:
                body = asking.body(seed)
                take(await connection.ask(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body, seed))
                if asking.pause_s:
                    await asyncio.sleep(asking.pause_s)
        finally:
            assert connection.transport is not None
            connection.transport.abort()

    async with asyncio.TaskGroup() as group:
        for _ in range(asking.num_streams):
            group.create_task(one_after_another())


def run_load(asking: Asking, reads_at_once: bool, pipe: Pipe) -> None:
    """The process: sends STARTED, then the list of SeenStream (those of reads_at_once without times), or what went wrong as a string.

    reads_at_once: for long runs, where the bytes of all streams would fill the memory; it disturbs the times.
    """
    raw: list[RawStream] = []
    seen: list[SeenStream] = []

    def take(stream: RawStream) -> None:
        if reads_at_once:
            seen.append(read_stream(stream, keeps_times=False))
        else:
            raw.append(stream)

    pipe.send(STARTED)
    try:
        uvloop.run(load(asking, take))
        pipe.send(seen + [read_stream(stream) for stream in raw])
    except* (BadAnswer, TimeoutError, OSError) as errors:
        pipe.send(f"{errors.exceptions[0]!r}")


def read_stream(stream: RawStream, *, keeps_times: bool = True) -> SeenStream:
    """Raises BadAnswer where it is no whole stream of chat.completion.chunk events."""
    events, times_s = _events(stream)
    if not events or events[-1] != b"[DONE]":
        raise BadAnswer(f"seed {stream.seed}: the stream does not end with [DONE]: {b''.join(stream.pieces)[:300]!r}")
    texts: list[str] = []
    token_times_s = array("d")
    usage: dict[str, int] = {}
    for event, time_s in zip(events[:-1], times_s[:-1], strict=True):
        chunk = json.loads(event)
        if "error" in chunk:
            raise BadAnswer(f"seed {stream.seed}: {event[:300]!r}")
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            delta = choice["delta"]
            if delta.get("role") and not delta.get("content") and not choice.get("finish_reason"):
                continue  # the opening
            texts.append(delta.get("content") or "")
            token_times_s.append(time_s)
    return SeenStream(
        seed=stream.seed,
        asked_s=stream.asked_s,
        texts=texts if keeps_times else ["".join(texts)],
        num_prompt_tokens=usage.get("prompt_tokens", 0),
        num_completion_tokens=usage.get("completion_tokens", 0),
        times_s=token_times_s if keeps_times else array("d"),
    )


def _events(stream: RawStream) -> tuple[list[bytes], list[float]]:
    """The data of each event, and when its last byte came."""
    if not (raw := b"".join(stream.pieces)).startswith(_OK):
        raise BadAnswer(f"seed {stream.seed}: {raw[:500]!r}")
    events: list[bytes] = []
    times_s: list[float] = []
    in_head, wire, text = True, b"", b""
    for piece, time_s in zip(stream.pieces, stream.times_s, strict=True):
        wire += piece
        if in_head:
            head, blank, rest = wire.partition(b"\r\n\r\n")
            if not blank:
                continue
            if b"transfer-encoding: chunked" not in head.lower():
                raise BadAnswer(f"seed {stream.seed}: the answer is not chunked: {head!r}")
            in_head, wire = False, rest
        while (at := wire.find(b"\r\n")) >= 0 and len(wire) >= at + 4 + (size := int(wire[:at], 16)):
            text += wire[at + 2 : at + 2 + size]
            wire = wire[at + 4 + size :]
        *whole, text = text.replace(b"\r\n", b"\n").split(b"\n\n")
        for frame in whole:
            if frame.startswith(b"data: "):
                events.append(frame[6:].strip())
                times_s.append(time_s)
    return events, times_s
