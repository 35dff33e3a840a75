"""Bodies that a parser may lose or misread: of requests that offer an upgrade, in chunks that hold next to nothing, behind their answer."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from duomo.api_keys import hashed
from services.router import client_protocol
from tests.services.router.hand_clock import HandClock
from tests.services.router.stub_system import stub_system
from tests.services.router.test_client_protocol import CHAT, LINE, WAIT_S, answer, dialled, status_and_error, to_the_end

INNER = b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n"
TOKENS = json.dumps({"prompt": "Once upon"}).encode()


def _offering(protocol: bytes, framing: bytes) -> bytes:
    return b"POST /tokenize HTTP/1.1\r\nhost: x\r\nconnection: Upgrade, HTTP2-Settings\r\nupgrade: %b\r\n%b\r\n" % (protocol, framing)


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket", b"anything"])
@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_request_that_offers_an_upgrade_is_read_like_any_other(tmp_path: Path, protocol: bytes, is_chunked: bool) -> None:
    framing = b"transfer-encoding: chunked\r\n" if is_chunked else b"content-length: %d\r\n" % len(TOKENS)
    body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(TOKENS), TOKENS) if is_chunked else TOKENS
    head = _offering(protocol, framing)

    async def scenario() -> None:
        async with stub_system(tmp_path) as system, dialled(system) as (reader, writer):
            whole = head + body
            for cuts in ((len(whole),), (len(head),), (len(head) + 3,), (20, len(head) + 3, len(head) + 9)):
                at = 0
                for cut in (*cuts, len(whole)):
                    writer.write(whole[at:cut])
                    await writer.drain()
                    await asyncio.sleep(0.02)  # so that it is a packet of its own
                    at = cut
                status, told = await answer(reader)
                assert (status, told["count"]) == (200, len(system.gateway.text.encode("Once upon", add_special_tokens=True))), told
            writer.write(whole + INNER + whole)
            assert [(await answer(reader))[0] for _ in range(3)] == [200, 200, 200], "what comes behind is read as what it is"

    asyncio.run(scenario())


def test_a_body_is_never_read_as_a_request(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path) as system, dialled(system) as (reader, writer):
            writer.write(_offering(b"h2c", b"content-length: %d\r\n" % len(INNER)))
            await writer.drain()
            await asyncio.sleep(0.05)
            writer.write(INNER)
            status, told = await answer(reader)
            assert (status, told["error"]["code"]) == (400, "invalid_json")
            writer.write(INNER)
            assert (await answer(reader))[0] == 200, "one answer to each"

    asyncio.run(scenario())


@pytest.mark.parametrize("length", [b"0", b"00", b"0000"])
def test_a_body_of_no_bytes_ends_with_its_head(tmp_path: Path, length: bytes) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path) as system, dialled(system) as (reader, writer):
            writer.write(_offering(b"h2c", b"content-length: %b\r\n" % length) + INNER)
            status, told = await answer(reader)
            assert (status, told["error"]["code"]) == (400, "invalid_json")
            assert (await answer(reader))[0] == 200

    asyncio.run(scenario())


def test_an_upgrade_without_a_body_is_ignored(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path) as system, dialled(system) as (reader, writer):
            offered = INNER.replace(b"\r\n\r\n", b"\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n")
            writer.write(offered + INNER + offered)
            for _ in range(3):
                assert (await answer(reader))[0] == 200

    asyncio.run(scenario())


def test_chunks_that_hold_next_to_nothing_are_cut_and_small_ones_are_read(tmp_path: Path) -> None:
    chunked = LINE + b"transfer-encoding: chunked\r\n\r\n"

    async def scenario() -> None:
        async with stub_system(tmp_path) as system:
            async with dialled(system) as (reader, writer):
                writer.write(chunked + b"".join(b"1\r\n%c\r\n" % byte for byte in CHAT + b" " * 40_000) + b"0\r\n\r\n")
                assert (await answer(reader))[0] == 200, "chunks of one byte"
            async with dialled(system) as (reader, writer):
                writer.write(chunked + b"1;")
                ending = asyncio.create_task(to_the_end(reader))
                num_sent = 0
                while not ending.done() and num_sent < 8 << 20:
                    writer.write(b"a" * 16384)
                    num_sent += 16384
                    await asyncio.sleep(0.001)
                status, error = status_and_error(await ending)
                assert (status, error["code"]) == (400, "invalid_http") and num_sent < 8 << 20

    asyncio.run(scenario())


@pytest.mark.parametrize("path", [b"/health/live", b"/metrics", b"/health/nothing"])
def test_a_body_that_comes_behind_its_answer_is_dropped_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: bytes) -> None:
    monkeypatch.setattr(client_protocol, "MAX_DROPPED_BYTES", 1024 * 1024)
    overrides = {"gateway": {"api_keys": [hashed("sesame", "a", ["inference"]).line()]}}

    async def scenario() -> None:
        async with stub_system(tmp_path, overrides=overrides) as system, dialled(system) as (reader, writer):
            writer.write(b"POST " + path + b" HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
            assert int((await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), WAIT_S)).split()[1]) in (404, 405)
            ending = asyncio.create_task(to_the_end(reader))
            num_sent = 0
            while not ending.done() and num_sent < 16 << 20:
                writer.write(b"4000\r\n" + b"a" * 16384 + b"\r\n")
                num_sent += 16384
                await asyncio.sleep(0.001)
            await ending
            assert num_sent < 16 << 20

    asyncio.run(scenario())


def test_no_slash_is_added_or_taken_away(tmp_path: Path) -> None:
    """A redirection would name whatever host the client wrote, by plain HTTP behind a proxy that ends TLS."""

    async def scenario() -> None:
        async with stub_system(tmp_path) as system:
            for path in ("/health/live/", "/v1/models/", "/v1/chat/completions/"):
                told = await system.client.get(path, headers={"host": "evil.example"})
                assert told.status_code == 404 and "location" not in told.headers

    asyncio.run(scenario())


def test_a_body_behind_its_answer_is_waited_for_no_longer_than_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much of it comes."""
    clock = HandClock(monkeypatch)

    async def scenario() -> None:
        async with stub_system(tmp_path, overrides={"gateway": {"read_timeout_s": 10, "keep_alive_timeout_s": 600}}) as system:
            async with dialled(system) as (reader, writer):
                writer.write(b"POST /health/live HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
                assert (await answer(reader))[0] == 405
                for _ in range(2):
                    await clock.sent(system, writer, b"8000\r\n" + b"a" * 32768 + b"\r\n")
                    assert clock.is_last_open
                    clock.advance(5.1)
                assert await to_the_end(reader) == b""

    asyncio.run(scenario())
