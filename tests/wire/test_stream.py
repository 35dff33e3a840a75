"""A connection in use: order, refusals, heartbeats, bounds, and every way to end."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import uvloop

from duomo.config import WireSection
from duomo.errors import PeerError, WireError
from duomo.wire import stream
from duomo.wire.connection import Connection, Identity, Listener, connect
from duomo.wire.messages import Drain, Heartbeat, Hello, Message, Refused

WIRE = WireSection(connect_timeout_s=60.0, heartbeat_s=0.05, silence_timeout_s=60.0)
IMPATIENT = WireSection(connect_timeout_s=60.0, heartbeat_s=0.1, silence_timeout_s=0.4)
WAIT_S = 60.0  # for what comes in a fraction of it: it ends a test that would hang, and times nothing
Runner = Callable[[Coroutine[Any, Any, None]], None]

GATEWAY = Identity("router-0", "00000000000000f1", "gateway", "tiny:1")
DECODE = Identity("decode-0", "00000000000000d1", "decode", "tiny:1")
BIG = WireSection(max_frame_bytes=8 << 20)


class Teleport(msgspec.Struct, tag=True, tag_field="type"):
    """A message of a version to come."""

    where: str


class FartherDrain(msgspec.Struct, tag="Drain", tag_field="type"):
    """Drain with a field of a version to come."""

    deadline_s: float
    how: str


@asynccontextmanager
async def pair(
    folder: Path, wire: WireSection = WIRE, their_wire: WireSection | None = None
) -> AsyncIterator[tuple[Connection, Connection]]:
    """Both ends of one connection: the dialled one and the accepted one."""
    accepted: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()

    async def accept(peer: Connection) -> None:
        accepted.set_result(peer)
        await peer.wait_closed()

    async with Listener(f"unix:{folder}/d.sock", DECODE, their_wire or wire, accept) as listener:
        dialled = await connect(listener.address, GATEWAY, wire)
        yield dialled, await accepted
        await dialled.close()


def freeze(connection: Connection) -> None:
    """What a stopped process looks like from outside: it neither reads nor beats."""
    assert connection._transport is not None and connection._timer is not None
    connection._transport.pause_reading()
    connection._timer.cancel()


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Runner:
    """Both loops that Duomo's processes run on: their transports differ in buffers and classes."""
    return uvloop.run if request.param == "uvloop" else asyncio.run


@pytest.mark.parametrize(
    ("strange", "code"), [(Teleport(where="Mars"), "unknown_message"), (FartherDrain(deadline_s=1.0, how="x"), "unknown_field")]
)
def test_an_unknown_message_is_refused_in_its_turn_and_the_connection_lives(
    run: Runner, strange: object, code: str, tmp_path: Path
) -> None:
    async def main() -> None:
        async with pair(tmp_path) as (near, far):
            near.post(Drain(deadline_s=1.0))
            near.post(cast(Message, strange))
            near.post(Drain(deadline_s=2.0))
            assert await far.receive() == Drain(deadline_s=1.0)
            with pytest.raises(WireError) as refusal:
                await far.receive()
            assert refusal.value.code == code
            assert await far.receive() == Drain(deadline_s=2.0)
            answer = await near.receive()
            assert isinstance(answer, Refused) and answer.code == code
            assert not near.closed and not far.closed

    run(main())


def test_a_second_hello_is_refused(run: Runner, tmp_path: Path) -> None:
    async def main() -> None:
        async with pair(tmp_path) as (near, far):
            near.post(
                Hello(
                    min_version=3,
                    max_version=3,
                    boot_id="",
                    replica_id="x",
                    role="decode",
                    model_fingerprint="",
                    address="",
                    nonce=b"",
                    mac=b"",
                )
            )
            with pytest.raises(WireError, match="unexpected_hello"):
                await far.receive()
            assert cast(Refused, await near.receive()).code == "unexpected_hello"

    run(main())


@pytest.mark.parametrize(("stray", "code"), [(b"\0\0\0\1\xc1", "not_msgpack"), (b"\x7f\0\0\0", "frame_too_large")])
def test_a_stream_that_is_no_messages_ends_and_says_why(run: Runner, stray: bytes, code: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with pair(tmp_path) as (near, far):
            near.post(Drain(deadline_s=1.0))
            near._out += stray
            assert await far.receive() == Drain(deadline_s=1.0)
            with pytest.raises(PeerError) as ended:
                await far.receive()
            assert ended.value.code == code
            assert cast(Refused, await near.receive()).code == code
            with pytest.raises(PeerError, match="peer_gone"):
                await near.receive()

    run(main())


def test_large_and_small_messages_keep_their_order(run: Runner, tmp_path: Path) -> None:
    async def main() -> None:
        sent = [
            Refused(code=str(count), detail="x" * size) for count, size in enumerate((0, 3 << 20, 1, 63, 257, (8 << 20) - 100, 5, 1 << 20))
        ]
        async with pair(tmp_path, BIG) as (near, far):
            for message in sent:
                near.post(message)
            assert [await far.receive() for _ in sent] == sent

    run(main())


def test_a_message_over_the_limit_is_not_sent_and_the_connection_lives(run: Runner, tmp_path: Path) -> None:
    async def main() -> None:
        async with pair(tmp_path, WIRE.model_copy(update={"max_frame_bytes": 4096})) as (near, far):
            with pytest.raises(WireError, match="frame_too_large"):
                near.post(Refused(code="c", detail="x" * 4096))
            near.post(Drain(deadline_s=1.0))
            assert await far.receive() == Drain(deadline_s=1.0)

    run(main())


def test_heartbeats_measure_the_round_trip_and_keep_quiet_peers_together(run: Runner, tmp_path: Path) -> None:
    async def main() -> None:
        async with pair(tmp_path, IMPATIENT) as (near, far):
            started_s = time.monotonic()
            await asyncio.sleep(2.5 * IMPATIENT.silence_timeout_s)
            async with asyncio.timeout(WAIT_S):
                # On a machine that is busy an answer may take any time, and not always: far less than the beats are apart.
                while not all(end.rtt_s is not None and end.rtt_s < 0.5 * IMPATIENT.heartbeat_s for end in (near, far)):
                    await asyncio.sleep(IMPATIENT.heartbeat_s)
            for end in (near, far):
                assert not end.closed
                assert end.rtt_s is not None and 0 < end.rtt_s < time.monotonic() - started_s

    run(main())


def test_one_slow_answer_is_not_the_round_trip_and_a_slower_wire_is(run: Runner, tmp_path: Path) -> None:
    async def main() -> None:
        wire = WIRE.model_copy(update={"heartbeat_s": 60.0})
        async with pair(tmp_path, wire) as (near, _):
            await asyncio.sleep(0.05)
            near._rtts_s.clear()
            seen = []
            for delay_s in (0.001, 0.050, 0.001, 0.020, 0.020, 0.020):
                near._ping = (99, time.monotonic())
                near._beat(Heartbeat(seq=99, is_reply=True), near._ping[1] + delay_s)
                seen.append(round(near.rtt_s or 0.0, 4))
            assert seen == [0.001, 0.001, 0.001, 0.001, 0.020, 0.020]
            near._beat(Heartbeat(seq=99, is_reply=True), time.monotonic() + 9)  # an answer to nothing
            assert near.rtt_s is not None and near.rtt_s < 0.021

    run(main())


def test_a_heartbeat_is_answered_at_once_and_never_received(run: Runner, tmp_path: Path) -> None:
    async def main() -> None:
        slow = WIRE.model_copy(update={"heartbeat_s": 60.0})
        async with pair(tmp_path, slow) as (near, far):
            near.post(Heartbeat(seq=99))
            near.post(Drain(deadline_s=1.0))
            assert await far.receive() == Drain(deadline_s=1.0)
            assert not far._inbox

    run(main())


def test_a_silent_peer_is_given_up_in_time(run: Runner, tmp_path: Path) -> None:
    async def main() -> None:
        async with pair(tmp_path, IMPATIENT) as (near, far):
            freeze(far)
            with pytest.raises(PeerError) as gone:
                async with asyncio.timeout(WAIT_S):
                    await near.receive()
            assert gone.value.code == "peer_silent" and gone.value.retryable
            silent_s = time.monotonic() - near._last_read_s
            assert silent_s > IMPATIENT.silence_timeout_s, "not before"

    run(main())


def test_our_own_stall_is_not_the_peers_silence(run: Runner, tmp_path: Path) -> None:
    async def main() -> None:
        async with pair(tmp_path, IMPATIENT) as (near, far):
            await asyncio.sleep(0.1)
            time.sleep(2 * IMPATIENT.silence_timeout_s)  # the loop of both ends hangs
            await asyncio.sleep(0.1)
            near.post(Drain(deadline_s=1.0))
            assert await far.receive() == Drain(deadline_s=1.0)

    run(main())


def test_a_peer_that_reads_nothing_is_given_up_at_the_bound(run: Runner, tmp_path: Path) -> None:
    limit = 1 << 20
    wire = WIRE.model_copy(update={"max_send_buffer_bytes": limit})

    async def main() -> None:
        async with pair(tmp_path, wire) as (near, far):
            freeze(far)
            num_bytes = 0
            with pytest.raises(PeerError) as behind:
                for _ in range(1000):
                    near.post(Refused(code="c", detail="x" * 65536))
                    num_bytes += 65536
                    await asyncio.sleep(0)
            assert behind.value.code == "peer_behind"
            assert limit < num_bytes < limit + (4 << 20)
            assert near.closed
            with pytest.raises(PeerError, match="peer_behind"):
                near.post(Drain(deadline_s=1.0))

    run(main())


def test_one_message_larger_than_the_bound_may_be_sent(run: Runner, tmp_path: Path) -> None:
    async def main() -> None:
        async with pair(tmp_path, WIRE.model_copy(update={"max_send_buffer_bytes": 1024})) as (near, far):
            near.post(Refused(code="c", detail="x" * 500_000))
            assert len(cast(Refused, await far.receive()).detail) == 500_000

    run(main())


def test_unread_messages_stop_the_sender_and_none_is_lost(run: Runner, tmp_path: Path) -> None:
    async def main() -> None:
        async with pair(tmp_path) as (near, far):
            num_messages = 40 << 4  # 40 MiB
            for count in range(num_messages):
                near.post(Refused(code=str(count), detail="x" * 65536))
            async with asyncio.timeout(WAIT_S):
                while not far._is_read_paused:
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            assert far._unread_bytes < 20 << 20
            for count in range(num_messages):
                assert cast(Refused, await far.receive()).code == str(count)
            near.post(Drain(deadline_s=1.0))
            assert await far.receive() == Drain(deadline_s=1.0)

    run(main())


def test_what_was_posted_before_close_arrives(run: Runner, tmp_path: Path) -> None:
    async def main() -> None:
        async with pair(tmp_path) as (near, far):
            for count in range(257):
                near.post(Drain(deadline_s=float(count)))
            closing = asyncio.create_task(near.close())
            assert [cast(Drain, await far.receive()).deadline_s for _ in range(257)] == list(range(257))
            with pytest.raises(PeerError, match="peer_gone"):
                await far.receive()
            await closing
            with pytest.raises(PeerError, match="closed"):
                near.post(Drain(deadline_s=1.0))
            with pytest.raises(PeerError, match="closed"):
                await near.receive()
            await near.close()  # a second close is nothing

    run(main())


def test_closing_takes_a_second_at_most_when_the_peer_reads_nothing(run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stream._CLOSE_WAIT_S == 1.0
    monkeypatch.setattr(stream, "_CLOSE_WAIT_S", 0.05)

    async def main() -> None:
        async with pair(tmp_path) as (near, far):
            freeze(far)
            near.post(Refused(code="c", detail="x" * (4 << 20)))
            await asyncio.sleep(0)
            async with asyncio.timeout(WAIT_S):  # nothing else ends it: neither end gives the other up for so long
                await near.close()
            assert near._lost.is_set()

    run(main())


def test_received_s_is_when_the_frame_was_read(run: Runner, tmp_path: Path) -> None:
    async def main() -> None:
        async with pair(tmp_path) as (near, far):
            posted_s = time.monotonic()
            near.post(Drain(deadline_s=1.0))
            async with asyncio.timeout(WAIT_S):
                while not far._inbox:
                    await asyncio.sleep(0.001)
            read_s = time.monotonic()
            await asyncio.sleep(0.02)
            await far.receive()
            assert posted_s <= far.received_s <= read_s

    run(main())


CHILD = """
import asyncio, sys
from duomo.config import WireSection
from duomo.wire.connection import Identity, connect

async def main():
    peer = await connect(sys.argv[1], Identity("prefill-0", "00000000000000a1", "prefill", "tiny:1"), WireSection())
    print("connected", flush=True)
    await peer.wait_closed()

asyncio.run(main())
"""


def test_the_kill_of_a_process_is_seen_at_once(run: Runner, tmp_path: Path) -> None:
    """By its socket: its silence would be noticed after a minute."""

    async def main() -> None:
        gone: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def watch(peer: Connection) -> None:
            with pytest.raises(PeerError) as ended:
                await peer.receive()
            gone.set_result(ended.value.code)

        async with Listener(f"unix:{tmp_path}/d.sock", DECODE, WIRE, watch) as listener:
            child = await asyncio.create_subprocess_exec(sys.executable, "-c", CHILD, listener.address, stdout=asyncio.subprocess.PIPE)
            assert child.stdout is not None
            assert await asyncio.wait_for(child.stdout.readline(), WAIT_S) == b"connected\n"
            child.send_signal(signal.SIGKILL)
            assert await asyncio.wait_for(gone, WAIT_S / 2) == "peer_gone"
            await child.wait()

    run(main())
