"""Dialling and accepting: who gets in, what is left behind."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from pathlib import Path
from typing import Any

import msgspec
import pytest

from duomo.config import WireSection
from duomo.errors import ConfigError, PeerError
from duomo.wire.codec import FrameReader, decode, encode
from duomo.wire.connection import Connection, Identity, Listener, connect
from duomo.wire.handshake import Handshake, _mac
from duomo.wire.messages import MIN_WIRE_VERSION, SINCE, WIRE_VERSION, Drain, Hello, Message, Refused, RingOffered

WIRE = WireSection(connect_timeout_s=60.0, heartbeat_s=0.05, silence_timeout_s=60.0)
WAIT_S = 30.0  # for what comes in a fraction of it: it ends a test that would hang, and times nothing
GATEWAY = Identity("router-0", "00000000000000f1", "gateway", "tiny:1", secret="s3cret")
DECODE = Identity("decode-0", "00000000000000d1", "decode", "tiny:1", secret="s3cret")
RING = RingOffered(ring_name="r", agent_metadata=b"", base_address=1, slot_bytes=64, num_slots=1, memory="cuda", device_idx=1)


async def echo(peer: Connection) -> None:
    while True:
        peer.post(await peer.receive())


def no_task_left() -> bool:
    return asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_messages_come_in_order_both_ways_and_nothing_stays_behind(kind: str, tmp_path: Path) -> None:
    async def main() -> None:
        asked = f"unix:{tmp_path}/d.sock" if kind == "unix" else "tcp:127.0.0.1:0"
        async with Listener(asked, DECODE, WIRE, echo) as listener:
            peer = await connect(listener.address, GATEWAY, WIRE)
            assert peer.peer.replica_id == "decode-0" and peer.peer.address == listener.address != "tcp:127.0.0.1:0"
            sent: list[Message] = [Refused(code=str(count), detail="x" * (count % 257)) for count in range(5000)]
            for message in sent:
                peer.post(message)
            assert [await peer.receive() for _ in sent] == sent
            await peer.close()
            assert peer.closed
        assert no_task_left()
        assert not list(tmp_path.iterdir())

    asyncio.run(main())


def test_an_older_peer_is_spoken_to_in_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("memory", "device_idx"):
        monkeypatch.setitem(SINCE, ("RingOffered", name), WIRE_VERSION)

    async def answer(peer: Connection) -> None:
        assert peer.version == MIN_WIRE_VERSION
        peer.post(RING)
        await peer.wait_closed()

    async def main() -> None:
        async with Listener(f"unix:{tmp_path}/d.sock", DECODE, WIRE, answer):
            reader, writer = await asyncio.open_unix_connection(f"{tmp_path}/d.sock")
            frames = FrameReader()
            inbox: list[bytes] = []
            older = OlderHandshake(GATEWAY, "connector")
            writer.write(encode(older.opening(), version=MIN_WIRE_VERSION))
            while not any(b"RingOffered" in payload for payload in inbox):
                for payload in frames.payloads(await reader.read(65536)):
                    inbox.append(bytes(payload))
                    message = decode(payload)
                    if isinstance(message, Hello):
                        proof = older.advance(message)
                        assert proof is not None
                        writer.write(encode(proof, version=MIN_WIRE_VERSION))
            assert not any(b"device_idx" in payload for payload in inbox)
            assert decode(inbox[-1]) == msgspec.structs.replace(RING, memory="host", device_idx=0)
            writer.close()

    asyncio.run(main())


class OlderHandshake(Handshake):
    """A peer that speaks the oldest version alone."""

    def _hello(self, peer_nonce: bytes) -> Hello:
        hello = msgspec.structs.replace(super()._hello(b""), max_version=MIN_WIRE_VERSION)
        return msgspec.structs.replace(hello, mac=_mac("s3cret", "connector", peer_nonce, hello)) if peer_nonce else hello


@pytest.mark.parametrize(
    ("change", "code"),
    [({"secret": "other"}, "bad_secret"), ({"secret": ""}, "bad_secret"), ({"model_fingerprint": "tiny:2"}, "model_mismatch")],
)
def test_a_peer_that_may_not_pair_is_refused_with_the_reason(change: dict[str, Any], code: str, tmp_path: Path) -> None:
    accepted: list[Connection] = []

    async def accept(peer: Connection) -> None:
        accepted.append(peer)

    async def main() -> None:
        async with Listener(f"unix:{tmp_path}/d.sock", DECODE, WIRE, accept) as listener:
            with pytest.raises(PeerError) as refusal:
                await connect(listener.address, dataclasses.replace(GATEWAY, **change), WIRE)
            assert (refusal.value.code, refusal.value.retryable) == (code, False)
        assert not accepted and no_task_left()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("first", "code"),
    [
        (encode(Drain(deadline_s=1.0)), "bad_hello"),
        ((1 << 20).to_bytes(4, "big"), "frame_too_large"),
        (b"GET / HTTP/1.1\r\n\r\n", "frame_too_large"),
        (b"\0\0\0\1\xc1", "not_msgpack"),
        (b"\0\0\0\1\x80", "unknown_message"),
    ],
)
def test_a_stranger_is_told_and_shut_out(first: bytes, code: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with Listener(f"unix:{tmp_path}/d.sock", DECODE, WIRE, echo):
            reader, writer = await asyncio.open_unix_connection(f"{tmp_path}/d.sock")
            writer.write(first)
            answer = await asyncio.wait_for(reader.read(), WAIT_S)
            (payload,) = FrameReader().payloads(answer)
            refused = decode(payload)
            assert isinstance(refused, Refused) and refused.code == code
            writer.close()
        assert no_task_left()

    asyncio.run(main())


def test_a_stranger_who_says_nothing_is_shut_out_in_time(tmp_path: Path) -> None:
    async def main() -> None:
        wire = WIRE.model_copy(update={"connect_timeout_s": 0.1})
        async with Listener(f"unix:{tmp_path}/d.sock", DECODE, wire, echo):
            reader, writer = await asyncio.open_unix_connection(f"{tmp_path}/d.sock")
            await asyncio.wait_for(reader.read(), WAIT_S)
            writer.close()

    asyncio.run(main())


def test_nobody_there_and_nobody_answering_are_told_apart(tmp_path: Path) -> None:
    async def main() -> None:
        for address in (f"unix:{tmp_path}/none.sock", "tcp:127.0.0.1:1"):
            with pytest.raises(PeerError) as refusal:
                await connect(address, GATEWAY, WIRE)
            assert (refusal.value.code, refusal.value.retryable) == ("unreachable", True)
        mute = await asyncio.start_unix_server(lambda reader, writer: None, f"{tmp_path}/mute.sock")
        with pytest.raises(PeerError) as refusal:
            await connect(f"unix:{tmp_path}/mute.sock", GATEWAY, WIRE.model_copy(update={"connect_timeout_s": 0.1}))
        assert refusal.value.code in ("connect_timeout", "handshake_timeout")
        mute.close()
        await asyncio.sleep(0)
        assert no_task_left()

    asyncio.run(main())


def test_a_cancelled_connect_leaves_no_socket(tmp_path: Path) -> None:
    async def main() -> None:
        came, gone = asyncio.Event(), asyncio.Event()

        async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while await reader.read(1000):
                came.set()
            gone.set()
            writer.close()

        server = await asyncio.start_unix_server(mute, f"{tmp_path}/mute.sock")
        dialling = asyncio.create_task(connect(f"unix:{tmp_path}/mute.sock", GATEWAY, WIRE))
        await asyncio.wait_for(came.wait(), WAIT_S)
        dialling.cancel()
        await asyncio.wait_for(gone.wait(), WAIT_S)
        server.close()

    asyncio.run(main())


def test_a_taken_address_names_itself_and_the_holder_goes_on(tmp_path: Path) -> None:
    async def main() -> None:
        async with Listener(f"unix:{tmp_path}/d.sock", DECODE, WIRE, echo) as first:
            second = Listener(first.address, DECODE, WIRE, echo)
            with pytest.raises(ConfigError, match="is taken"):
                await second.start()
            await second.close()
            peer = await connect(first.address, GATEWAY, WIRE)
            peer.post(Drain(deadline_s=2.0))
            assert await peer.receive() == Drain(deadline_s=2.0)
            await peer.close()

    asyncio.run(main())


def test_closing_removes_only_its_own_file(tmp_path: Path) -> None:
    async def main() -> None:
        first = Listener(f"unix:{tmp_path}/d.sock", DECODE, WIRE, echo)
        await first.start()
        (tmp_path / "d.sock").unlink()
        async with Listener(f"unix:{tmp_path}/d.sock", DECODE, WIRE, echo) as second:
            await first.close()
            peer = await connect(second.address, GATEWAY, WIRE)
            await peer.close()

    asyncio.run(main())


@pytest.mark.parametrize("failure", [ZeroDivisionError("a bug"), PeerError("a colleague is gone"), None])
def test_when_the_task_of_a_peer_ends_its_connection_does(
    failure: Exception | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def end(peer: Connection) -> None:
        await peer.receive()
        if failure is not None:
            raise failure

    async def main() -> None:
        async with Listener(f"unix:{tmp_path}/d.sock", DECODE, WIRE, end) as listener:
            peer = await connect(listener.address, GATEWAY, WIRE)
            peer.post(Drain(deadline_s=1.0))
            with pytest.raises(PeerError, match="peer_gone"):
                await peer.receive()

    with caplog.at_level(logging.INFO, logger="duomo"):
        asyncio.run(main())
    assert ("failed" in caplog.text) == isinstance(failure, ZeroDivisionError)


def test_closing_the_listener_closes_its_peers_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        listener = Listener(f"unix:{tmp_path}/d.sock", DECODE, WIRE, echo)
        await listener.start()
        peers = [await connect(listener.address, GATEWAY, WIRE) for _ in range(7)]
        await asyncio.wait_for(listener.close(), WAIT_S)
        for peer in peers:
            with pytest.raises(PeerError, match="peer_gone"):  # and not silent: that takes longer than anybody waits here
                await asyncio.wait_for(peer.receive(), WAIT_S)
        assert no_task_left()

    asyncio.run(main())


def test_a_slow_wire_shows_in_the_round_trip(tmp_path: Path) -> None:
    """20 ms planted in each direction between two ends are 40 ms of rtt_s: what the parts call wire."""

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        while data := await reader.read(65536):
            loop.call_later(0.020, writer.write, data)
        loop.call_later(0.020, writer.close)

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_unix_connection(f"{tmp_path}/d.sock")
        await asyncio.gather(carry(reader, far_writer), carry(far_reader, writer))

    async def main() -> None:
        relaying = await asyncio.start_unix_server(relay, f"{tmp_path}/slow.sock")
        async with Listener(f"unix:{tmp_path}/d.sock", DECODE, WIRE, echo):
            peer = await connect(f"unix:{tmp_path}/slow.sock", GATEWAY, WIRE)
            seen: set[float] = set()
            async with asyncio.timeout(WAIT_S):
                # What a busy machine adds comes and goes; what is planted stays, and is there once.
                while not any(rtt_s < 0.080 for rtt_s in seen):
                    await asyncio.sleep(0.01)
                    seen |= {peer.rtt_s} - {None}
            assert min(seen) >= 0.040
            await peer.close()
            await asyncio.sleep(0.1)
        relaying.close()

    asyncio.run(main())
