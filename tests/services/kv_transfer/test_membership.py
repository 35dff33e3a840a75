"""The replica skeleton on real sockets and a real directory: reports, lease, outage, drain, refusals, the hang watchdog."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Literal

import pytest

from duomo.config import DuomoConfig
from duomo.errors import ConfigError, DuomoError, EngineError, PeerError, WireError
from duomo.wire.connection import Connection, Identity, connect, new_boot_id
from duomo.wire.messages import CachesFlushed, Cancel, Drain, FlushCaches, Message, Refused, ReplicaReport, Undrain
from services.kv_transfer.directory import Directory
from services.kv_transfer.embedded_redis import EmbeddedRedis
from services.kv_transfer.membership import HANG_EXIT_CODE, REPORT_PERIOD_S, Membership, Progress, ReplicaCard

FINGERPRINT = "f" * 16


def configuration(folder: Path, **sections: dict[str, object]) -> DuomoConfig:
    raw: dict[str, object] = {"model": {"path": "models/tiny-moe"}, "run_dir": str(folder), "redis": {"lease_s": 0.6}}
    return DuomoConfig.model_validate(raw | sections)


class Logic:
    """A service that only counts."""

    def __init__(self) -> None:
        self.progress = Progress(30.0)
        self.events: list[str] = []
        self.live = 0
        self.is_draining = False
        self.broken: DuomoError | None = None
        self.card: ReplicaCard | None = None

    def joined(self, peer: Connection) -> None:
        self.events.append(f"joined {peer.peer.role}")

    def received(self, peer: Connection, message: Message) -> None:
        if isinstance(message, Cancel):
            raise WireError("no such request", code="stale")
        self.events.append(type(message).__name__)

    def left(self, peer: Connection) -> None:
        with pytest.raises(PeerError):
            peer.check_open()
        self.events.append(f"left {peer.peer.role}")

    def begin_drain(self) -> None:
        self.is_draining = True

    def end_drain(self) -> None:
        self.is_draining = False

    def flush_caches(self) -> int:
        self.events.append("flushed")
        return 7

    def num_live_requests(self) -> int:
        return self.live

    def failure(self) -> DuomoError | None:
        return self.broken

    def report(self) -> ReplicaReport:
        assert self.card is not None
        return ReplicaReport(
            replica_id="d",
            boot_id=self.card.boot_id,
            role="decode",
            is_draining=self.is_draining,
            num_running=0,
            num_queued=0,
            num_queued_tokens=0,
            num_blocks=1,
            num_free_blocks=1,
            num_cached_blocks=0,
            num_slots=0,
            num_free_slots=0,
            num_quarantined_slots=0,
            num_open_handles=0,
            num_open_spans=0,
            num_steps=0,
            block_tokens=16,
        )


def made(config: DuomoConfig, directory: Directory | None = None) -> tuple[Membership, Logic]:
    logic = Logic()
    logic.card = ReplicaCard.of(config, "decode", "d", FINGERPRINT)
    return Membership(logic.card, logic, directory), logic


async def gateway(membership: Membership) -> Connection:
    identity = Identity(replica_id="g", boot_id=new_boot_id(), role="gateway", model_fingerprint=FINGERPRINT)
    return await connect(membership.identity.address, identity, membership.card.config.wire)


def test_gateways_get_ten_reports_a_second(tmp_path: Path) -> None:
    async def go() -> None:
        membership, logic = made(configuration(tmp_path))
        await membership.start()
        connection = await gateway(membership)
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        for _ in range(5):
            assert isinstance(await connection.receive(), ReplicaReport)
        assert REPORT_PERIOD_S == 0.1 < loop.time() - started_s, "the first may have waited, the others come one by one"
        await connection.close()
        while "left gateway" not in logic.events:
            await asyncio.sleep(0.01)
        assert not membership.gateways
        await membership.stop()
        assert list(tmp_path.glob("*.sock")) == []

    asyncio.run(go())


@pytest.mark.parametrize("is_draining", [False, True])
def test_what_is_broken_for_good_ends_serve_though_a_request_hangs(tmp_path: Path, is_draining: bool) -> None:
    async def go() -> None:
        membership, logic = made(configuration(tmp_path))
        await membership.start()
        logic.live = 1
        stop = asyncio.Event()
        serving = asyncio.create_task(membership.serve(stop))
        if is_draining:
            stop.set()
        await asyncio.sleep(0.1)
        logic.broken = EngineError("the writer thread failed")
        async with asyncio.timeout(60):
            with pytest.raises(EngineError, match="the writer thread failed"):
                await serving
        assert logic.is_draining
        await membership.stop()

    asyncio.run(go())


def test_a_refused_message_leaves_the_connection_alive(tmp_path: Path) -> None:
    async def go() -> None:
        membership, _ = made(configuration(tmp_path))
        await membership.start()
        connection = await gateway(membership)
        for _ in range(2):
            connection.post(Cancel(request_id="r", attempt=0, traceparent="", remaining_s=1.0, reason="test"))
            message = await connection.receive()
            while isinstance(message, ReplicaReport):
                message = await connection.receive()
            assert isinstance(message, Refused) and message.code == "stale"
        await connection.close()
        await membership.stop()

    asyncio.run(go())


def test_two_replicas_may_connect_to_each_other(tmp_path: Path) -> None:
    async def go() -> None:
        config = configuration(tmp_path)
        here, _ = made(config)
        there, there_logic = made(config)
        await here.start()
        await there.start()
        connection = await here.connect(there.identity.address)
        assert connection.peer.boot_id == there.card.boot_id
        while not there_logic.events:
            await asyncio.sleep(0.01)
        assert there_logic.events == ["joined decode"]
        await here.stop()
        while "left decode" not in there_logic.events:
            await asyncio.sleep(0.01)
        await there.stop()

    asyncio.run(go())


def test_the_lease_is_held_restored_and_ended(tmp_path: Path) -> None:
    async def go() -> None:
        server = EmbeddedRedis(tmp_path / "redis")
        server.start()
        directory = Directory(server.url, 60.0)
        try:
            membership, _ = made(configuration(tmp_path), directory)
            await membership.start()
            key = f"{{duomo}}:member:{membership.card.boot_id}"
            for _ in range(2):
                while await directory.members() != [membership.member]:
                    await asyncio.sleep(0.02)
                await directory._redis.pexpire(key, 20_000)  # most of it is over: it is renewed
                while await directory._redis.pttl(key) <= 20_000:
                    await asyncio.sleep(0.02)
                await directory._redis.flushall()  # an emptied Redis: the next renewal restores the member
            await membership.stop()
            assert await directory.members() == []
        finally:
            await directory.close()
            server.stop()

    asyncio.run(go())


def test_an_absent_directory_stops_nobody(tmp_path: Path) -> None:
    async def go() -> None:
        directory = Directory(f"unix://{tmp_path}/nothing.sock", 0.6)
        membership, _ = made(configuration(tmp_path), directory)
        await membership.start()
        connection = await gateway(membership)
        assert isinstance(await connection.receive(), ReplicaReport)
        await connection.close()
        await membership.stop()
        await directory.close()

    asyncio.run(go())


@pytest.mark.parametrize("is_stopped", [True, False], ids=["stop", "drain message"])
def test_serve_ends_when_the_last_request_has(tmp_path: Path, is_stopped: bool) -> None:
    async def go() -> None:
        membership, logic = made(configuration(tmp_path))
        await membership.start()
        logic.live = 1
        stop = asyncio.Event()
        serving = asyncio.create_task(membership.serve(stop))
        connection = await gateway(membership)
        await asyncio.sleep(0.05)
        assert not logic.is_draining
        stop.set() if is_stopped else connection.post(Drain(deadline_s=100.0))
        while not logic.is_draining:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert not serving.done()
        logic.live = 0
        await serving
        await connection.close()
        await membership.stop()

    asyncio.run(go())


async def heard(connection: Connection) -> Message:
    """The next message that is no report."""
    while isinstance(message := await connection.receive(), ReplicaReport):
        pass
    return message


def test_an_operator_drains_undrains_and_flushes_a_replica_that_stays(tmp_path: Path) -> None:
    async def go() -> None:
        membership, logic = made(configuration(tmp_path))
        await membership.start()
        serving = asyncio.create_task(membership.serve(asyncio.Event()))
        connection = await gateway(membership)
        async with asyncio.timeout(60):
            for _ in range(2):
                connection.post(Drain(deadline_s=0.0, ends=False))
                connection.post(FlushCaches(flush_id=3))
                assert await heard(connection) == CachesFlushed(flush_id=3, num_blocks=7)
                assert logic.is_draining and membership.is_draining and not serving.done(), "nothing lives, and it stays"
                connection.post(Undrain())
                while logic.is_draining or membership.is_draining:
                    await asyncio.sleep(0.01)
            logic.live = 1
            connection.post(Drain(deadline_s=100.0))
            connection.post(Undrain())
            refused = await heard(connection)
            assert isinstance(refused, Refused) and refused.code == "ending"
            logic.live = 0
            await serving
        assert logic.is_draining
        await connection.close()
        await membership.stop()

    asyncio.run(go())


@pytest.mark.parametrize("message", [Drain(deadline_s=1.0), Drain(deadline_s=1.0, ends=False), Undrain(), FlushCaches(flush_id=1)])
def test_a_peer_that_is_no_gateway_brings_no_operators_word(tmp_path: Path, message: Message) -> None:
    async def go() -> None:
        membership, logic = made(configuration(tmp_path))
        await membership.start()
        serving = asyncio.create_task(membership.serve(asyncio.Event()))
        identity = Identity(replica_id="p", boot_id=new_boot_id(), role="prefill", model_fingerprint=FINGERPRINT)
        connection = await connect(membership.identity.address, identity, membership.card.config.wire)
        connection.post(message)
        async with asyncio.timeout(60):
            refused = await heard(connection)
        assert isinstance(refused, Refused) and refused.code == "unexpected_message"
        assert not logic.is_draining and "flushed" not in logic.events and not serving.done()
        serving.cancel()
        await connection.close()
        await membership.stop()

    asyncio.run(go())


def test_a_drain_has_a_deadline(tmp_path: Path) -> None:
    async def go() -> None:
        membership, logic = made(configuration(tmp_path))
        logic.live = 1
        await membership.start()
        assert not await membership.drain(0.05)
        await membership.stop()

    asyncio.run(go())


def test_tcp_addresses_are_resolved(tmp_path: Path) -> None:
    async def go() -> None:
        membership, _ = made(configuration(tmp_path, decode={"listen": "tcp", "host": "127.0.0.1"}))
        await membership.start()
        assert membership.identity.address.startswith("tcp:127.0.0.1:") and not membership.identity.address.endswith(":0")
        connection = await gateway(membership)
        assert connection.peer.address == membership.identity.address
        await connection.close()
        await membership.stop()

    asyncio.run(go())


@pytest.mark.parametrize("listen", ["unix", "tcp"])
@pytest.mark.parametrize("role", ["gateway", "prefill"])
def test_nobody_pairs_without_the_secret(tmp_path: Path, listen: str, role: Literal["gateway", "prefill"]) -> None:
    """Whichever socket a replica listens on, and whoever dials: a gateway, or a prefill replica that has KV to hand over."""

    async def go() -> None:
        membership, logic = made(configuration(tmp_path, decode={"listen": listen}, wire={"secret": "shared"}))
        await membership.start()
        wire = membership.card.config.wire
        for secret in ("", "Shared", "shared "):
            identity = Identity(replica_id="x", boot_id=new_boot_id(), role=role, model_fingerprint=FINGERPRINT, secret=secret)
            with pytest.raises(PeerError) as refusal:
                await connect(membership.identity.address, identity, wire)
            assert refusal.value.code == "bad_secret" and not refusal.value.retryable
        assert not logic.events, "no service hears of them"
        identity = Identity(replica_id="x", boot_id=new_boot_id(), role=role, model_fingerprint=FINGERPRINT, secret="shared")
        connection = await connect(membership.identity.address, identity, wire)
        while f"joined {role}" not in logic.events:
            await asyncio.sleep(0.01)
        with pytest.raises(PeerError, match="bad_secret"):  # what it dials itself, P to D
            other, _ = made(configuration(tmp_path, decode={"listen": listen}, wire={"secret": "other"}))
            await other.connect(membership.identity.address)
        await connection.close()
        await membership.stop()

    asyncio.run(go())


def test_a_run_dir_too_long_for_sockets_is_named(tmp_path: Path) -> None:
    async def go() -> None:
        membership, _ = made(configuration(tmp_path / ("x" * 120)))
        with pytest.raises(ConfigError, match="run_dir is too long"):
            await membership.start()

    asyncio.run(go())


def test_the_watchdog_ends_a_hung_process(tmp_path: Path) -> None:
    script = """
        import asyncio, sys, time
        from pathlib import Path
        sys.path[:0] = ["."]
        from tests.services.kv_transfer.test_membership import configuration, made
        async def go():
            membership, logic = made(configuration(Path(sys.argv[1])))
            logic.progress.hang_timeout_s = 0.4
            await membership.start()
            serving = asyncio.create_task(membership.serve(asyncio.Event()))
            await asyncio.sleep(0.1)
            logic.progress.pending()
            time.sleep(20)  # the event loop itself stands still
        asyncio.run(go())
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], timeout=60, capture_output=True, cwd=Path(__file__).parents[3]
    )
    assert ended.returncode == HANG_EXIT_CODE, ended.stderr.decode()
    assert list(tmp_path.glob("*.sock")) == []
