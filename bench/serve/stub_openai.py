"""Owns an OpenAI-compatible server that computes nothing: what stands behind a peer in `duomo bench gateway`. Knows no peer and no figure.

It says and notes what stub_engine.py does, as chat.completion.chunk events over HTTP/1.1: a first token at once, then one of every stream
each step_s, written stream by stream (a step's tokens of several streams share no connection in this protocol).
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Final, cast

import uvloop

from bench.serve.stub_ledger import StubLedger, answer_bench
from bench.serve.stub_story import StubStory

_HEAD: Final = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"

_NO_MODELS: Final = b'{"object": "list", "data":[]}'


@dataclass(frozen=True, kw_only=True)
class OpenAIStubOptions:
    port: int
    model: Path
    step_s: float


@dataclass(slots=True, eq=False)
class _Stream:
    """One answer. events: what is still to be sent, last first."""

    connection: _Connection
    seed: int
    events: list[bytes]
    ending: bytes


class OpenAIStub:
    """All streams of one stub."""

    def __init__(self, options: OpenAIStubOptions) -> None:
        self.ledger = StubLedger()
        self._options = options
        self._story = StubStory(options.model)
        self._live: set[_Stream] = set()

    def begin(self, connection: _Connection, body: bytes, received_s: float) -> None:
        asked = json.loads(body)
        seed, num_tokens = int(asked["seed"]), int(asked["max_tokens"])
        self.ledger.begin(seed, received_s)
        head = {"id": f"chatcmpl-{seed}", "object": "chat.completion.chunk", "created": int(time.time()), "model": asked["model"]}
        events = []
        for index, piece in enumerate(self._story.pieces(seed, num_tokens)):
            choice = {"index": 0, "delta": {"content": piece}, "finish_reason": "length" if index + 1 == num_tokens else None}
            events.append(_chunk(head | {"choices": [choice]}))
        opening = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        events[0] = _chunk(head | {"choices": [opening]}) + events[0]
        usage = {"prompt_tokens": 0, "completion_tokens": num_tokens, "total_tokens": num_tokens}
        ending = _chunk(head | {"choices": [], "usage": usage}) + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
        stream = _Stream(connection, seed, events[::-1], ending)
        self._live.add(stream)
        self._send(stream, _HEAD)

    def lost(self, connection: _Connection) -> None:
        self._live = {stream for stream in self._live if stream.connection is not connection}

    async def step(self) -> None:
        """A token of every stream each step_s, by a clock that does not drift."""
        due_s = time.monotonic()
        while True:
            due_s = max(due_s + self._options.step_s, time.monotonic() - self._options.step_s)
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            for stream in list(self._live):
                self._send(stream, b"")

    def _send(self, stream: _Stream, before: bytes) -> None:
        transport = stream.connection.transport
        assert transport is not None
        event = stream.events.pop()
        self.ledger.sent(stream.seed, time.monotonic())
        transport.write(before + event + (b"" if stream.events else stream.ending))
        if not stream.events:
            self._live.discard(stream)
            self.ledger.end(stream.seed)


class _Connection(asyncio.Protocol):
    """One keep-alive connection of the peer: a request at a time."""

    def __init__(self, stub: OpenAIStub) -> None:
        self.transport: asyncio.Transport | None = None
        self._stub = stub
        self._came = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stub.lost(self)

    def data_received(self, data: bytes) -> None:
        received_s = time.monotonic()
        self._came += data
        head, blank, body = self._came.partition(b"\r\n\r\n")
        if not blank:
            return
        if head.startswith(b"GET "):  # a peer that looks for its models
            assert self.transport is not None
            self._came = body
            self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 29\r\n\r\n" + _NO_MODELS)
            return
        lengths = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        assert lengths, f"a request without Content-Length: {head!r}"
        if len(body) >= int(lengths[0]):
            self._came = body[int(lengths[0]) :]
            self._stub.begin(self, body[: int(lengths[0])], received_s)


def _chunk(content: dict[str, object]) -> bytes:
    event = b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(event), event)


def run_openai_stub(options: OpenAIStubOptions, pipe: Pipe) -> None:
    """The process, until the bench asks it to stop or is gone."""

    async def main() -> None:
        stub = OpenAIStub(options)
        server = await asyncio.get_running_loop().create_server(lambda: _Connection(stub), "127.0.0.1", options.port)
        stepping = asyncio.create_task(stub.step())
        try:
            await answer_bench(pipe, stub.ledger)
        finally:
            stepping.cancel()
            server.close()

    uvloop.run(main())
