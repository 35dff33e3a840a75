"""One layout a model and Redis: who is refused, and that leases which run out refuse nobody."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from duomo.config import RedisSection
from duomo.errors import ConfigError
from duomo.wire.messages import Role
from services.kv_transfer.directory import Directory, Member
from services.kv_transfer.embedded_redis import EmbeddedRedis
from services.neighbours import refuse_mixed, strangers

LEASE_S = 0.5


def member(replica_id: str, role: Role, fingerprint: str = "tiny:1") -> Member:
    return Member(
        replica_id=replica_id, boot_id=replica_id, role=role, address="unix:/x", model_fingerprint=fingerprint, model_name="tiny-moe"
    )


ENGINE = [member("e0.prefill", "prefill"), member("e0.decode", "decode")]
SPLIT = [member("prefill-0", "prefill"), member("decode-0", "decode")]


@pytest.mark.parametrize(
    ("members", "layout", "own_id", "found"),
    [
        (SPLIT, "colocated", "e0", ["prefill-0", "decode-0"]),
        (SPLIT, "split", "prefill-1", []),
        (ENGINE, "split", "decode-0", ["e0.prefill", "e0.decode"]),
        (ENGINE, "colocated", "e1", []),
        (ENGINE[1:], "colocated", "e0", []),
        (ENGINE[1:], "colocated", "e1", ["e0.decode"]),
        (SPLIT[:1], "colocated", "prefill-0", []),
        ([member("a.prefill", "prefill")], "colocated", "e0", ["a.prefill"]),
        ([member("prefill-0", "prefill", "other:2"), member("router-0", "gateway")], "colocated", "e0", []),
    ],
)
def test_who_is_of_another_layout(members: list[Member], layout: Literal["split", "colocated"], own_id: str, found: list[str]) -> None:
    assert strangers(members, layout, "tiny:1", own_id) == found


@pytest.fixture
def redis() -> Iterator[RedisSection]:
    with tempfile.TemporaryDirectory(prefix="duomo-t-") as folder:
        server = EmbeddedRedis(Path(folder))
        server.start()
        yield RedisSection(url=server.url, lease_s=LEASE_S)
        server.stop()


def test_a_lease_that_runs_out_is_waited_for_and_one_that_is_held_refuses(redis: RedisSection) -> None:
    async def main() -> None:
        directory, held = Directory(redis.url, redis.lease_s), Directory(redis.url, 100.0)
        try:
            await directory.register(SPLIT[0])
            await refuse_mixed(redis, "split", "tiny:1")
            await refuse_mixed(redis, "colocated", "tiny:1", "e0")
            assert not await directory.members(), "it waited for a replica that is dead"
            await held.register(SPLIT[0])
            with pytest.raises(ConfigError, match=r"prefill-0 of the same model serve there in layout split.*DUOMO|DUOMO.*prefill-0"):
                await refuse_mixed(redis, "colocated", "tiny:1", "e0")
        finally:
            await directory.close()
            await held.close()

    asyncio.run(main())


def test_a_directory_that_does_not_answer_refuses_nobody() -> None:
    asyncio.run(refuse_mixed(RedisSection(url="redis://127.0.0.1:1", lease_s=LEASE_S), "colocated", "tiny:1"))
