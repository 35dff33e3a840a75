"""The directory's service: sweeps, health during an outage, and a health check that sees a hang and nothing else."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from duomo.config import RedisSection
from duomo.errors import ConfigError, EngineError
from services.kv_transfer.directory import Directory, Member
from services.kv_transfer.embedded_redis import EmbeddedRedis
from services.kv_transfer.service import DirectoryService


def test_health_through_an_outage(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path)
    server.start()
    member = Member(replica_id="d-0", boot_id="b", role="decode", address="tcp:127.0.0.1:1", model_fingerprint="f", model_name="m")

    async def run() -> None:
        directory = Directory(server.url, 60.0)
        await directory.register(member)
        service = DirectoryService(RedisSection(url=server.url, lease_s=0.3))
        await service.start()
        health = service.health()
        assert health.is_redis_reachable and health.members == (member,) and 0 < health.ping_s
        server.stop()
        while service.health().is_redis_reachable:
            await asyncio.sleep(0.02)
        health = service.health()
        assert health.members == (member,) and health.num_outages == 1 and "does not answer" in health.detail
        await asyncio.sleep(0.2)
        assert service.health().last_answer_age_s > 0.2 and service.health().num_outages == 1
        service.check_health()
        await service.stop()
        await directory.close()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_sweep_that_ended_or_hangs_fails_the_check() -> None:
    async def run() -> None:
        now_s = 0.0
        service = DirectoryService(RedisSection(url="unix:///nowhere/redis.sock", lease_s=0.3), now_s=lambda: now_s)
        await service.start()
        assert not service.health().is_redis_reachable and service.health().num_outages == 0
        now_s = 11.0
        service.check_health()
        now_s = 13.0
        with pytest.raises(EngineError, match="directory_hangs"):
            service.check_health()
        now_s = 0.0
        await service.stop()
        with pytest.raises(EngineError, match="directory_ended"):
            service.check_health()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_url_is_needed() -> None:
    with pytest.raises(ConfigError, match="redis.url"):
        DirectoryService(RedisSection())
