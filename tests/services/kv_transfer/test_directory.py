"""The directory on a real server: leases, expiry, races, an emptied and an absent Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from duomo.errors import ConfigError, PeerError
from services.kv_transfer.directory import Directory, Member
from services.kv_transfer.embedded_redis import EmbeddedRedis


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = EmbeddedRedis(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server.url
    server.stop()


def member(replica_id: str = "p-0", boot_id: str = "boot0") -> Member:
    return Member(
        replica_id=replica_id, boot_id=boot_id, role="prefill", address="unix:/x/p-0", model_fingerprint="f1", model_name="tiny-moe"
    )


def with_directory(url: str, lease_s: float, act: Callable[[Directory], Awaitable[None]]) -> None:
    async def run() -> None:
        directory = Directory(url, lease_s)
        try:
            await directory._redis.flushall()
            await act(directory)
        finally:
            await directory.close()

    asyncio.run(run())


def test_members_are_what_registered_and_was_not_removed(url: str) -> None:
    async def act(directory: Directory) -> None:
        assert await directory.members() == []
        one, two, again = member("p-1", "b1"), member("p-0", "b2"), member("p-1", "b3")
        for each in (one, two, again, one):
            await directory.register(each)
        assert await directory.members() == [two, one, again]
        await directory.remove(one)
        await directory.remove(one)
        assert await directory.members() == [two, again]

    with_directory(url, 60.0, act)


@pytest.mark.parametrize("num_turns", range(12))
def test_a_call_that_is_cancelled_ends_in_whatever_turn_of_the_loop_it_is(url: str, num_turns: int) -> None:
    """asyncio.wait_for of Python 3.11, in redis-py, loses a cancellation in some: a task that its owner waited for went on for ever."""

    async def act(directory: Directory) -> None:
        await directory.register(member())
        for call in (directory.members, lambda: directory.register(member())):
            task = asyncio.create_task(call())
            for _ in range(num_turns):
                await asyncio.sleep(0)
            if not task.done():
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
        assert await directory.members() == [member()], "and the next call is answered"

    with_directory(url, 60.0, act)


def test_a_renewed_lease_is_a_whole_one(url: str) -> None:
    async def act(directory: Directory) -> None:
        await directory.register(member())
        keys = ("{duomo}:member:boot0", "{duomo}:members")
        for key in keys:
            assert await directory._redis.pexpire(key, 20_000), "most of it is over"
        assert await directory.renew(member())
        assert all([await directory._redis.pttl(key) > 20_000 for key in keys])
        assert await directory.members() == [member()]

    with_directory(url, 60.0, act)


def test_a_lease_runs_out_and_leaves_no_key(url: str) -> None:
    async def act(directory: Directory) -> None:
        await directory.register(member())
        while await directory.members():
            await asyncio.sleep(0.02)
        assert not await directory.renew(member())
        while await directory._redis.keys("*"):  # the index may be forgotten in Redis' next look at it
            await asyncio.sleep(0.02)

    with_directory(url, 0.3, act)


def test_every_key_expires(url: str) -> None:
    async def act(directory: Directory) -> None:
        for i in range(5):
            await directory.register(member(f"p-{i}", f"b{i}"))
        await directory.renew(member("p-0", "b0"))
        keys = await directory._redis.keys("*")
        assert len(keys) == 6
        assert all([0 < await directory._redis.pttl(key) <= 60_000 for key in keys])

    with_directory(url, 60.0, act)


def test_sweep_drops_entries_whose_member_is_gone(url: str) -> None:
    async def act(directory: Directory) -> None:
        patient = Directory(url, 60.0)
        await patient.register(member("d-0", "long"))
        await directory.register(member("p-0", "short"))
        while [each.boot_id for each in await directory.members()] != ["long"]:
            await asyncio.sleep(0.02)
        assert await directory.sweep() == 1 and await directory.sweep() == 0
        assert await directory._redis.pttl("{duomo}:members") > 20_000, "a short lease does not shorten the index"
        await patient.close()

    with_directory(url, 0.1, act)


def test_an_emptied_redis_is_repaired_by_the_next_registration(url: str) -> None:
    async def act(directory: Directory) -> None:
        await directory.register(member())
        await directory._redis.flushall()
        assert not await directory.renew(member()) and await directory.members() == []
        await directory.register(member())
        assert await directory.members() == [member()]

    with_directory(url, 60.0, act)


def test_a_hundred_members_and_many_callers_share_few_connections(url: str) -> None:
    async def act(directory: Directory) -> None:
        await asyncio.gather(*(directory.register(member(f"p-{i:03}", f"b{i}")) for i in range(150)))
        answers = await asyncio.gather(*(directory.members() for _ in range(30)))
        assert all(len(members) == 150 for members in answers)
        assert len(await directory._redis.client_list()) <= 9

    with_directory(url, 60.0, act)


def test_an_entry_of_another_version_is_left_out(url: str) -> None:
    async def act(directory: Directory) -> None:
        await directory.register(member("p-0", "b0"))
        await directory.register(member("p-1", "b1"))
        await directory._redis.set("{duomo}:member:b1", b'{"replica_id": 7}', px=1000)
        assert await directory.members() == [member("p-0", "b0")]

    with_directory(url, 60.0, act)


def test_an_outage_is_a_typed_error_in_time_and_ends_by_itself(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path)
    server.start()

    async def run() -> None:
        directory = Directory(server.url, 5.0)
        await directory.register(member())
        socket = Path(server.url.removeprefix("unix://"))
        server.stop()
        for call in (directory.members, directory.ping_s, lambda: directory.register(member()), lambda: directory.remove(member())):
            with pytest.raises(PeerError) as caught:
                await call()
            assert caught.value.code == "directory_unavailable" and caught.value.retryable
        again = EmbeddedRedis(tmp_path)
        again.start()
        # The new server's socket takes the old one's place, as a restarted server's would.
        socket.parent.mkdir()
        socket.symlink_to(again.url.removeprefix("unix://"))
        await directory.register(member())
        assert await directory.members() == [member()]
        await directory.close()
        again.stop()

    asyncio.run(run())


def test_a_silent_redis_is_given_up_in_time(tmp_path: Path) -> None:
    """A server that accepts and says nothing."""

    async def run() -> None:
        path, num_asked = str(tmp_path / "silent.sock"), 0

        async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal num_asked
            num_asked += 1
            await reader.read()
            writer.close()

        listener = await asyncio.start_unix_server(say_nothing, path)
        directory = Directory(f"unix://{path}", 5.0)
        with pytest.raises(PeerError):
            await directory.members()
        assert num_asked <= 2, "once more, each time for directory.TIMEOUT_S"
        await directory.close()
        listener.close()

    asyncio.run(run())


def test_a_wrong_url_names_the_option() -> None:
    with pytest.raises(ConfigError, match="redis.url"):
        Directory("http://localhost:1", 5.0)
