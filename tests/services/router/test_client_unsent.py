"""Clients that do not read, that send requests behind each other, silent handshakes, refused bodies, trailers and noise. Raw sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections import deque
from collections.abc import Callable, Coroutine
from pathlib import Path

import pytest
import trustme
import uvloop

from duomo.api_keys import hashed
from duomo.wire.messages import Cancel
from services.router import client_protocol
from services.router.client_protocol import ClientProtocol
from tests.services.router.hand_clock import HandClock
from tests.services.router.stub_replicas import Script, StubReplica
from tests.services.router.stub_system import StubSystem, stub_system
from tests.services.router.test_client_protocol import CHAT, LINE, WAIT_S, WHOLE, answer, dialled, status_and_error, to_the_end

Run = Callable[[Coroutine[None, None, None]], None]
LOOPS = pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
HEALTH = b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n"
DESCRIBED = b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n"


def asking(**fields: object) -> bytes:
    body = json.dumps(json.loads(CHAT) | fields).encode()
    return LINE + b"content-length: %d\r\n\r\n" % len(body) + body


def decode_of(system: StubSystem) -> StubReplica:
    return system.pools.of_role("decode")[0]


def deaf(system: StubSystem) -> socket.socket:
    """A client with little room, which reads nothing by itself."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", system.gateway.config.gateway.port))
    client.setblocking(False)
    return client


@LOOPS
@pytest.mark.parametrize("kept", [b"", b"connection: close\r\n"], ids=["kept alive", "closing"])
def test_who_does_not_read_a_whole_answer_is_cut(tmp_path: Path, run: Run, kept: bytes) -> None:
    async def scenario() -> None:
        overrides = {"gateway": {"read_timeout_s": 0.4, "keep_alive_timeout_s": 0.1}}
        async with stub_system(tmp_path, overrides=overrides) as system:
            size = len((await system.client.get("/openapi.json")).content)
            asked = [DESCRIBED] * 4 + [DESCRIBED.replace(b"\r\n\r\n", b"\r\n" + kept + b"\r\n")]
            assert size * len(asked) > 300_000, "the kernel alone would take it all"
            with deaf(system) as client:
                client.sendall(b"".join(asked))
                await system.until(lambda: client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0, WAIT_S)

    run(scenario())


@LOOPS
def test_who_does_not_read_a_stream_ends_it(tmp_path: Path, run: Run) -> None:
    async def scenario() -> None:
        overrides = {"gateway": {"read_timeout_s": 0.4, "slow_client_bytes": 1 << 30}}
        async with stub_system(tmp_path, overrides=overrides) as system:
            system.pools.script.step_s = 0.005
            with deaf(system) as client:
                client.sendall(asking(stream=True, max_tokens=1500, n=16))
                await system.until(lambda: bool(decode_of(system).of_type(Cancel)), WAIT_S)
                await system.until(lambda: not system.gateway.num_open_answers, WAIT_S)

    run(scenario())


def test_who_reads_slowly_gets_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For longer than what is allowed without progress, also where the connection is closing."""
    clock = HandClock(monkeypatch)

    async def scenario() -> None:
        async with stub_system(tmp_path, overrides={"gateway": {"read_timeout_s": 4, "keep_alive_timeout_s": 1}}) as system:
            size = len((await system.client.get("/openapi.json")).content)
            with deaf(system) as client:
                client.sendall(DESCRIBED * 5)
                num_read = num_pieces = 0
                async with asyncio.timeout(WAIT_S):
                    while piece := await asyncio.get_running_loop().sock_recv(client, 16384):
                        num_read, num_pieces = num_read + len(piece), num_pieces + 1
                        clock.advance(0.5)
            assert num_read > 5 * size and 0.5 * num_pieces > 2 * 4

    asyncio.run(scenario())


@LOOPS
@pytest.mark.parametrize("behind", [HEALTH, HEALTH * 20, WHOLE, asking(user="u" * 300_000)], ids=["one", "many", "another", "large"])
def test_an_answer_hears_that_its_client_left_whatever_was_sent_behind(tmp_path: Path, run: Run, behind: bytes) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path) as system:
            system.pools.script.step_s = 0.2
            async with dialled(system) as (_, writer):
                writer.write(asking(max_tokens=1000))
                await system.until(lambda: system.gateway.num_live_requests == 1)
                writer.write(behind)
                await writer.drain()
                await asyncio.sleep(0.1)
            await system.until(lambda: bool(decode_of(system).of_type(Cancel)), WAIT_S)
            await system.until(lambda: not system.gateway.num_open_answers, WAIT_S)

    run(scenario())


def test_a_line_behind_an_answer_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as may wait are answered, in their order; then the connection is closed, and what came behind was never taken."""
    full, take_no_more = [], ClientProtocol._take_no_more

    def noted(protocol: ClientProtocol) -> None:
        full.append(protocol)
        take_no_more(protocol)

    monkeypatch.setattr(ClientProtocol, "_take_no_more", noted)

    async def scenario() -> None:
        async with stub_system(tmp_path, Script(decode_faults=deque([("hold", 1)] * 3))) as system:
            for pieces in ([WHOLE + HEALTH * 1000], [WHOLE, *([HEALTH * 100] * 10)]):
                async with dialled(system) as (reader, writer):
                    full.clear()
                    system.pools.go_on.clear()
                    for piece in pieces:
                        writer.write(piece)
                        await asyncio.sleep(0.01)
                    await system.until(lambda: bool(full))
                    system.pools.go_on.set()
                    assert "choices" in (await answer(reader))[1]
                    said = await to_the_end(reader)
                    assert said.count(b"HTTP/1.1 200") == client_protocol.MAX_QUEUED and said.count(b"connection: close") == 1
            async with dialled(system) as (reader, writer):  # and by its bytes
                full.clear()
                system.pools.go_on.clear()
                writer.write(WHOLE + asking(user="u" * 200_000) + HEALTH)
                await system.until(lambda: bool(full))
                system.pools.go_on.set()
                assert "choices" in (await answer(reader))[1]
                assert await to_the_end(reader) == b""

    asyncio.run(scenario())


def test_a_handshake_that_never_comes_is_not_waited_for(tmp_path: Path) -> None:
    issued = trustme.CA().issue_cert("127.0.0.1")
    issued.private_key_and_cert_chain_pem.write_to_path(tmp_path / "both.pem")
    files = {"ssl_certfile": str(tmp_path / "both.pem"), "ssl_keyfile": str(tmp_path / "both.pem")}

    async def scenario() -> None:
        async with stub_system(tmp_path, overrides={"gateway": files | {"read_timeout_s": 0.4}}) as system:
            async with dialled(system) as (reader, _):
                assert await to_the_end(reader) == b""

    asyncio.run(scenario())


def test_a_refused_stranger_does_not_go_on_sending(tmp_path: Path) -> None:
    overrides = {"gateway": {"api_keys": [hashed("sesame", "a", ["admin"]).line()]}}

    async def scenario() -> None:
        async with stub_system(tmp_path, overrides=overrides) as system:
            for key, status in ((b"none", 401), (b"sesame", 403)):
                async with dialled(system) as (reader, writer):
                    writer.write(LINE + b"authorization: Bearer " + key + b"\r\ncontent-length: 100000000000\r\n\r\n{")
                    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), WAIT_S)
                    assert int(head.split()[1]) == status and b"connection: close" in head
                    ending = asyncio.create_task(to_the_end(reader))
                    async with asyncio.timeout(WAIT_S):
                        with contextlib.suppress(ConnectionError):
                            while not ending.done():
                                writer.write(b"{" * 65536)
                                await writer.drain()
                    assert b"error" in await ending
                async with dialled(system) as (reader, writer):  # a body that is there keeps nobody's connection from living on
                    for _ in range(2):
                        writer.write(WHOLE.replace(b"host: x", b"authorization: Bearer " + key))
                        assert (await answer(reader))[0] == status

    asyncio.run(scenario())


def test_a_body_has_its_own_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that took most of its time leaves the body all of its own."""
    clock = HandClock(monkeypatch)

    async def scenario() -> None:
        async with stub_system(tmp_path, overrides={"gateway": {"read_timeout_s": 15}}) as system, dialled(system) as (reader, writer):
            for piece in (WHOLE[:20], WHOLE[20 : -len(CHAT)]):
                await clock.sent(system, writer, piece)
                clock.advance(10)
            writer.write(CHAT)
            assert (await answer(reader))[0] == 200

    asyncio.run(scenario())


def test_noise_is_refused_in_words_and_never_within_an_answer(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path) as system:
            targets = (b"CONNECT x:80", b"GET http:///x", b"GET http://[::1")
            noises = [b"\x16\x03\x01\x02\x00 no HTTP at all\r\n\r\n", LINE + b"transfer-encoding: chunked\r\n\r\nzz\r\n"]
            noises += [target + b" HTTP/1.1\r\nhost: x\r\n\r\n" for target in targets]
            for noise in noises:
                async with dialled(system) as (reader, writer):
                    writer.write(noise)
                    status, error = status_and_error(await to_the_end(reader))
                    assert (status, error["code"]) == (400, "invalid_http")
            assert system.gateway.metrics.requests.labels("refused", "invalid_http")._value.get() == len(noises)
            system.pools.script.step_s = 0.05
            async with dialled(system) as (reader, writer):
                writer.write(asking(stream=True, max_tokens=1000))
                said = await asyncio.wait_for(reader.readuntil(b"data: "), WAIT_S)
                writer.write(b"\x00\x01 noise\r\n\r\n")
                said += await to_the_end(reader)
                assert said.count(b"HTTP/1.1") == 1 and b"invalid_http" not in said
            async with dialled(system) as (reader, writer):
                writer.write(asking(stream=False, max_tokens=1000) + b"CONNECT x:80 HTTP/1.1\r\nhost: x\r\n\r\n")
                assert b"invalid_http" not in await to_the_end(reader), "it is not the first one's answer"
            await system.until(lambda: bool(decode_of(system).of_type(Cancel)), WAIT_S)

    asyncio.run(scenario())


def test_trailers_are_no_headers(tmp_path: Path) -> None:
    """Sent with the head at once, before anybody has looked at it."""
    trailed = LINE + b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n%b\r\n"
    overrides = {"gateway": {"api_keys": [hashed("sesame", "a", ["inference"]).line()], "max_headers": 10}}

    async def scenario() -> None:
        async with stub_system(tmp_path, overrides=overrides) as system:
            async with dialled(system) as (reader, writer):
                writer.write(trailed % (len(CHAT), CHAT, b"authorization: Bearer sesame\r\n"))
                assert (await answer(reader))[0] == 401
            async with dialled(system) as (reader, writer):
                writer.write(trailed % (len(CHAT), CHAT, b"x: 1\r\n" * 20))
                assert status_and_error(await to_the_end(reader))[0] == 431, "they count nevertheless"

    asyncio.run(scenario())
