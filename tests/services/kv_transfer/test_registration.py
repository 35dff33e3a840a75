"""Owns the checks of until_registered, against a real embedded Redis."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from duomo.config import RedisSection
from services.kv_transfer.directory import Directory, Member
from services.kv_transfer.embedded_redis import EmbeddedRedis
from services.kv_transfer.registration import until_registered


def test_returns_when_this_replica_registers_and_not_before(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path)
    server.start()

    async def check() -> None:
        section = RedisSection(url=server.url, lease_s=100.0)
        directory = Directory(section.url, section.lease_s)

        def member(replica_id: str) -> Member:
            return Member(
                replica_id=replica_id, boot_id=replica_id, role="decode", address="unix:/x", model_fingerprint="f", model_name="tiny-moe"
            )

        await directory.register(member("decode-0"))
        await asyncio.wait_for(until_registered(section, "decode-0"), 60)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(until_registered(section, "decode-1"), 0.3)
        waiting = asyncio.create_task(until_registered(section, "decode-1"))
        await directory.register(member("decode-1"))
        await asyncio.wait_for(waiting, 60)
        await directory.close()

    try:
        asyncio.run(check())
    finally:
        server.stop()
