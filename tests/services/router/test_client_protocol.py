"""What a connection may cost: heads that are too large or never end, slow bodies, idle and too many connections. Raw sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from duomo.api_keys import hashed
from services.router import client_protocol
from tests.services.router.hand_clock import HandClock
from tests.services.router.stub_replicas import Script
from tests.services.router.stub_system import StubSystem, stub_system

CHAT = json.dumps({"model": "tiny-moe", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}).encode()
LINE = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
WHOLE = LINE + b"content-length: %d\r\n\r\n" % len(CHAT) + CHAT
WAIT_S = 60.0  # for what comes in a fraction of it: a test that hangs fails here

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@contextlib.asynccontextmanager
async def dialled(system: StubSystem) -> AsyncIterator[Streams]:
    reader, writer = await asyncio.open_connection("127.0.0.1", system.gateway.config.gateway.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def to_the_end(reader: asyncio.StreamReader) -> bytes:
    """Everything until the server closes."""
    said = b""
    async with asyncio.timeout(WAIT_S):
        with contextlib.suppress(ConnectionResetError):
            while piece := await reader.read(65536):
                said += piece
    return said


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict]:
    """One whole answer of a connection that lives on."""
    async with asyncio.timeout(WAIT_S):
        head = await reader.readuntil(b"\r\n\r\n")
        lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")]
        body = await reader.readexactly(int(lengths[0].split(b":")[1]))
    return int(head.split()[1]), json.loads(body)


def status_and_error(said: bytes) -> tuple[int, dict]:
    head, _, body = said.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


@pytest.mark.parametrize(
    "head",
    [
        LINE + b"x-long: " + b"a" * 5000 + b"\r\n\r\n",
        LINE + b"".join(b"x-%d: 1\r\n" % number for number in range(40)) + b"\r\n",
        b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
    ],
    ids=["bytes", "number", "url"],
)
def test_a_head_that_is_too_large_is_answered_431(tmp_path: Path, head: bytes) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, overrides={"gateway": {"max_header_bytes": 4096, "max_headers": 32}}) as system:
            async with dialled(system) as (reader, writer):
                writer.write(head)
                status, error = status_and_error(await to_the_end(reader))
                assert (status, error["code"]) == (431, "headers_too_large") and "4096 bytes" in error["message"]
            counter = system.gateway.metrics.requests.labels("refused", "headers_too_large")
            assert counter._value.get() == 1
            assert (await system.client.get("/health/live")).status_code == 200

    asyncio.run(scenario())


@pytest.mark.parametrize("piece", [b"a" * 1000, b"x: 1\r\n" * 100], ids=["one header", "many headers"])
def test_a_head_that_never_ends_is_ended(tmp_path: Path, piece: bytes) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, overrides={"gateway": {"max_header_bytes": 4096, "max_headers": 1000}}) as system:
            async with dialled(system) as (reader, writer):
                writer.write(LINE + b"x-endless: ")
                ending = asyncio.create_task(to_the_end(reader))
                num_sent = 0
                async with asyncio.timeout(WAIT_S):
                    with contextlib.suppress(ConnectionError):
                        while not ending.done():
                            writer.write(piece)
                            await writer.drain()
                            num_sent += len(piece)
                            await asyncio.sleep(0.005)
                assert status_and_error(await ending)[0] == 431

    asyncio.run(scenario())


def test_slow_heads_and_bodies_are_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = HandClock(monkeypatch)

    async def scenario() -> None:
        async with stub_system(tmp_path, overrides={"gateway": {"read_timeout_s": 10, "keep_alive_timeout_s": 600}}) as system:
            for begun in (LINE, LINE + b"content-length: 100\r\n\r\n", LINE + b"content-length: 100\r\n\r\n{"):
                async with dialled(system) as (reader, writer):
                    await clock.sent(system, writer, begun)
                    clock.advance(9.9)
                    assert clock.is_last_open, begun
                    clock.advance(0.2)
                    status, error = status_and_error(await to_the_end(reader))
                    assert (status, error["code"]) == (408, "request_timeout"), begun
            async with dialled(system) as (reader, writer):  # a byte now and then is no way around it
                await clock.sent(system, writer, LINE + b"content-length: 100000\r\n\r\n")
                for _ in range(3):
                    await clock.sent(system, writer, b"{")
                    assert clock.is_last_open
                    clock.advance(4)
                assert status_and_error(await to_the_end(reader))[0] == 408
            async with dialled(system) as (reader, writer):
                writer.write(WHOLE)
                assert (await answer(reader))[0] == 200
                await clock.sent(system, writer, b"\r\n")  # no request, and no rest either: uvicorn's own timer ends with it
                clock.advance(11)
                assert await to_the_end(reader) == b""
            await system.until(lambda: not system.gateway.num_open_answers)
            system.check_nothing_is_held()

    asyncio.run(scenario())


def test_one_that_asks_for_nothing_is_told_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, overrides={"gateway": {"read_timeout_s": 0.2}}) as system, dialled(system) as (reader, _):
            assert await to_the_end(reader) == b""

    asyncio.run(scenario())


def test_what_was_answered_is_not_answered_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal before the body has come, and a request behind one that is being answered."""
    clock = HandClock(monkeypatch)

    async def scenario() -> None:
        overrides = {"gateway": {"read_timeout_s": 10, "max_header_bytes": 4096, "api_keys": [hashed("sesame", "a", ["inference"]).line()]}}
        async with stub_system(tmp_path, Script(decode_faults=deque([("hold", 1)])), overrides=overrides) as system:
            async with dialled(system) as (reader, writer):
                writer.write(LINE + b"content-length: 100\r\n\r\n{")
                said = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), WAIT_S)
                clock.advance(11)
                said += await to_the_end(reader)
                assert said.startswith(b"HTTP/1.1 401") and said.count(b"HTTP/1.1") == 1
            async with dialled(system) as (reader, writer):
                both = WHOLE.replace(b"host: x", b"authorization: Bearer sesame") + LINE + b"x-long: " + b"a" * 5000
                await clock.sent(system, writer, both)
                clock.advance(11)
                said = await to_the_end(reader)
                assert b"431" not in said and b"408" not in said, "it would be taken for the first one's answer"
            await system.until(lambda: not system.gateway.num_open_answers)

    asyncio.run(scenario())


def test_a_large_body_that_keeps_coming_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than the timeout in all, and never less than the least of a timeout's."""
    monkeypatch.setattr(client_protocol, "BODY_BYTES_PER_TIMEOUT", 10)
    clock = HandClock(monkeypatch)
    padded = CHAT[:-1] + b" " * 400 + b"}"

    async def scenario() -> None:
        async with stub_system(tmp_path, overrides={"gateway": {"read_timeout_s": 10}}) as system, dialled(system) as (reader, writer):
            writer.write(LINE + b"content-length: %d\r\n\r\n" % len(padded))
            for at in range(0, len(padded), 25):
                await clock.sent(system, writer, padded[at : at + 25])
                clock.advance(6)
            status, body = await answer(reader)
            assert status == 200 and body["usage"]["completion_tokens"] == 4

    asyncio.run(scenario())


def test_long_answers_and_requests_behind_each_other_are_not_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = HandClock(monkeypatch)

    async def scenario() -> None:
        overrides = {"gateway": {"read_timeout_s": 10, "keep_alive_timeout_s": 600}}
        script = Script(decode_faults=deque([("hold", 1)] * 2))
        async with stub_system(tmp_path, script, overrides=overrides) as system, dialled(system) as (reader, writer):
            for asked in (WHOLE, WHOLE + WHOLE):
                system.pools.go_on.clear()
                await clock.sent(system, writer, asked)
                await system.until(lambda: system.gateway.num_live_legs == 1)
                clock.advance(100)  # an answer takes longer than a request may
                system.pools.go_on.set()
                for _ in range(asked.count(LINE)):
                    assert (await answer(reader))[0] == 200
            assert not reader.at_eof()

    asyncio.run(scenario())


def test_an_idle_connection_is_closed(tmp_path: Path) -> None:
    async def scenario() -> None:
        overrides = {"gateway": {"keep_alive_timeout_s": 0.2, "read_timeout_s": 60}}
        async with stub_system(tmp_path, overrides=overrides) as system, dialled(system) as (reader, writer):
            writer.write(WHOLE)
            assert (await answer(reader))[0] == 200
            assert await to_the_end(reader) == b""

    asyncio.run(scenario())


def test_one_connection_too_many_is_told_so_and_many_too_many_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_protocol, "SPARE_CONNECTIONS", 2)

    async def scenario() -> None:
        async with stub_system(tmp_path, overrides={"gateway": {"max_connections": 2}}) as system, contextlib.AsyncExitStack() as held:
            await system.client.aclose()
            first = await held.enter_async_context(dialled(system))
            for _ in range(2):
                reader, writer = await held.enter_async_context(dialled(system))
            writer.write(WHOLE)
            said = await to_the_end(reader)
            status, error = status_and_error(said)
            assert (status, error["code"]) == (503, "too_many_connections") and b"retry-after: 1" in said
            reader, writer = await held.enter_async_context(dialled(system))
            writer.write(b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n")
            assert (await answer(reader))[0] == 200, "health is asked of a gateway that is full"
            for _ in range(2):
                reader, _ = await held.enter_async_context(dialled(system))
            assert await to_the_end(reader) == b"", "above the spare ones nobody is told anything"
            first[1].write(WHOLE)
            assert (await answer(first[0]))[0] == 503, "still too many"

    asyncio.run(scenario())
