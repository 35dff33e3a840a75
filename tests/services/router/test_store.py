"""The answers in Redis: one owner at a time, fenced by its lease, and no more bytes than were allowed. Owns the scripts' promises."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from duomo.config import RedisSection
from duomo.errors import CapacityError
from services.kv_transfer.embedded_redis import EmbeddedRedis
from services.router.store import AnswerStore, ClaimName, RouterPresence, StoredAnswer
from tests.services.router.stub_system import PATIENCE_S


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    server = EmbeddedRedis(tmp_path)
    server.start()
    yield server
    server.stop()


def _store(server: EmbeddedRedis, *, lease_s: float = 30.0, life_s: float = 60.0, max_bytes: int = 100_000) -> AnswerStore:
    return AnswerStore(RedisSection(url=server.url, lease_s=lease_s), life_s=life_s, max_bytes=max_bytes)


def _claim(owner: str, name: str = "one", fingerprint: str = "body") -> ClaimName:
    return ClaimName(name=name, fingerprint=fingerprint, owner=owner)


def _answer(num_bytes: int = 100) -> StoredAnswer:
    return StoredAnswer(status=200, headers=[("content-type", "text/event-stream")], packed=b"\x00" * num_bytes, num_bytes=1000)


def test_one_owner_at_a_time_and_the_same_one_may_ask_twice(server: EmbeddedRedis) -> None:
    """Its first reply may have been lost on the way."""

    async def scenario() -> None:
        store = _store(server)
        assert [await store.claim(_claim(owner)) for owner in ("a", "b", "a")] == ["claimed", "in_progress", "claimed"]
        assert await store.claim(_claim("b", fingerprint="another")) == "other_body"
        assert await store.claim(_claim("b", name="two")) == "claimed"
        await store.free(_claim("b"))  # not its own
        assert await store.claim(_claim("b")) == "in_progress"
        await store.free(_claim("a"))
        assert await store.claim(_claim("b", fingerprint="another")) == "claimed"
        await store.close()

    asyncio.run(scenario())


def test_a_kept_answer_is_everybodys_and_stays(server: EmbeddedRedis) -> None:
    async def scenario() -> None:
        store = _store(server)
        await store.claim(_claim("a"))
        num_evicted, num_bytes = await store.keep(_claim("a"), _answer())  # type: ignore[misc]  # a pair where it is kept
        assert num_evicted == 0 and 100 < num_bytes < 250
        assert await store.claim(_claim("b")) == _answer()
        await store.free(_claim("a"))
        assert await store.renew([_claim("a")]) == []
        assert await store.claim(_claim("a")) == _answer()
        assert await store.claim(_claim("a", fingerprint="another")) == "other_body"
        await store.close()

    asyncio.run(scenario())


def test_whoever_slept_through_its_lease_keeps_and_frees_nothing(server: EmbeddedRedis) -> None:
    async def scenario() -> None:
        store, sleeping = _store(server), _store(server, lease_s=0.05)
        await sleeping.claim(_claim("sleeper"))
        client = redis.Redis.from_url(server.url)
        async with asyncio.timeout(PATIENCE_S):
            while list(client.scan_iter()):
                await asyncio.sleep(0.01)
        assert await store.claim(_claim("other")) == "claimed"
        assert await store.keep(_claim("sleeper"), _answer()) == "lost"
        await store.free(_claim("sleeper"))
        assert await store.renew([_claim("sleeper"), _claim("other")]) == [_claim("sleeper")]
        assert await store.keep(_claim("other"), _answer(7)) != "lost"
        assert await store.keep(_claim("sleeper"), _answer()) == "lost"
        assert await store.claim(_claim("third")) == _answer(7)
        await store.close()
        await sleeping.close()

    asyncio.run(scenario())


def test_renewing_keeps_a_claim_and_restores_what_redis_forgot(server: EmbeddedRedis) -> None:
    async def scenario() -> None:
        store, client = _store(server, lease_s=300.0), redis.Redis.from_url(server.url)
        mine = [_claim("a", name=f"claim {number}") for number in range(600)]
        for claim in mine:
            await store.claim(claim)
        keys = list(client.scan_iter())
        assert len(keys) == 600
        for _ in range(2):
            for key in keys:
                client.pexpire(key, 100_000)  # as after most of the lease
            assert await store.renew(mine) == []
            assert all(100_000 < client.pttl(key) <= 300_000 for key in keys)
        assert await store.claim(_claim("b", name="claim 599")) == "in_progress"
        client.flushall()
        assert await store.renew(mine) == []
        assert await store.claim(_claim("b", name="claim 0")) == "in_progress"
        assert await store.claim(_claim("b", name="claim 599", fingerprint="another")) == "other_body"
        await store.close()

    asyncio.run(scenario())


def test_all_answers_together_are_bounded_and_the_oldest_go_first(server: EmbeddedRedis) -> None:
    async def scenario() -> None:
        store = _store(server, max_bytes=10_000)
        totals = []
        for number in range(20):
            await store.claim(_claim("a", name=f"{number}"))
            kept = await store.keep(_claim("a", name=f"{number}"), _answer(1_900))
            assert isinstance(kept, tuple)
            assert kept[0] == (1 if number >= 5 else 0)
            totals.append(kept[1])
        assert max(totals) <= 10_000 and totals[-1] > 9_000
        found = [await store.claim(_claim("b", name=f"{number}")) for number in range(20)]
        assert found == ["claimed"] * 15 + [_answer(1_900)] * 5
        assert await store.keep(_claim("b", name="0"), _answer(10_001)) == "too_large"
        assert await store.claim(_claim("c", name="19")) == _answer(1_900)
        await store.close()

    asyncio.run(scenario())


def test_answers_that_ran_out_count_no_more(server: EmbeddedRedis) -> None:
    async def scenario() -> None:
        store = _store(server, life_s=0.2, max_bytes=10_000)
        for number in range(4):
            await store.keep(_claim("a", name=f"{number}"), _answer(2_000))
        await asyncio.sleep(0.3)
        longer = _store(server, life_s=60.0, max_bytes=10_000)
        assert await store.claim(_claim("b", name="0")) == "claimed"
        kept = await longer.keep(_claim("a", name="5"), _answer(2_000))
        assert isinstance(kept, tuple) and kept[0] == 0 and kept[1] < 2_200
        again = await store.keep(_claim("a", name="5"), _answer(2_000))  # as where the first reply was lost: it counts once
        assert again == kept
        client = redis.Redis.from_url(server.url)
        assert all(client.pttl(key) != -1 for key in client.scan_iter()), "each has an end"
        assert client.pttl("{duomo}:idempotency:sizes") > 50_000  # not cut by a gateway that keeps answers for less long
        await store.close()
        await longer.close()

    asyncio.run(scenario())


def test_an_answer_that_is_refused_for_its_size_leaves_the_count_right(server: EmbeddedRedis) -> None:
    """Those that had run out by then are counted off once, with the next answer that is kept."""

    async def scenario() -> None:
        store = _store(server, life_s=0.2, max_bytes=10_000)
        await store.keep(_claim("a", name="short"), _answer(2_000))
        longer = _store(server, max_bytes=10_000)
        await longer.keep(_claim("a", name="long"), _answer(2_000))
        await asyncio.sleep(0.3)
        assert await store.keep(_claim("a", name="large"), _answer(10_001)) == "too_large"
        kept = await longer.keep(_claim("a", name="next"), _answer(2_000))
        assert isinstance(kept, tuple) and kept[0] == 0 and 4_000 < kept[1] < 4_400
        await store.close()
        await longer.close()

    asyncio.run(scenario())


def test_a_gateway_that_leaves_takes_its_own_presence_and_not_its_successors(server: EmbeddedRedis) -> None:
    async def scenario() -> None:
        section, client = RedisSection(url=server.url, lease_s=30.0), redis.Redis.from_url(server.url)
        old, new = (RouterPresence(section, "router-0", boot_id, "http://x") for boot_id in ("old", "new"))
        for presence in (old, new):
            await presence.start()
            while f'"{presence.boot_id}"'.encode() not in (client.get(presence.key) or b""):
                await asyncio.sleep(0.01)
        await old.stop()
        assert b'"new"' in client.get(new.key)
        await new.stop()
        assert client.get(new.key) is None

    asyncio.run(scenario())


def test_a_redis_that_is_gone_is_a_typed_error(server: EmbeddedRedis) -> None:
    async def scenario() -> None:
        store = _store(server)
        server.stop()
        for asked in (store.claim(_claim("a")), store.renew([_claim("a")]), store.keep(_claim("a"), _answer()), store.free(_claim("a"))):
            with pytest.raises(CapacityError) as refused:
                await asked
            assert refused.value.code == "idempotency_unavailable" and refused.value.retryable
        await store.close()

    asyncio.run(scenario())
