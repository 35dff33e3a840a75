"""Connections to the pools: who is connected to, who is not, and what happens when a replica starts anew."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec

from duomo.wire.connection import new_boot_id
from tests.services.router.stub_system import stub_system


def test_strangers_are_not_connected_to(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path) as system:
            known = system.pools.replicas[0].member
            change = msgspec.structs.replace
            await system.directory.register(change(known, boot_id=new_boot_id(), model_fingerprint="another model"))
            await system.directory.register(change(known, boot_id=new_boot_id(), role="directory"))
            await system.directory.register(change(known, boot_id=new_boot_id(), address=f"unix:{tmp_path}/nobody.sock"))
            await system.directory.register(change(known, boot_id=new_boot_id()))  # an address that another start took over
            await asyncio.sleep(0.8)
            assert sorted(link.member.boot_id for link in system.gateway.pools.links.values()) == sorted(
                replica.boot_id for replica in system.pools.replicas
            )
            assert system.gateway.why_not_ready() is None

    asyncio.run(scenario())


def test_a_replica_that_starts_anew_is_found_and_the_old_one_forgotten(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path) as system:
            old = system.pools.of_role("decode")[0]
            await old.die()
            await system.until(lambda: not system.gateway.pools.decodes())
            assert "decode" in str(system.gateway.why_not_ready())
            assert f'replica="{old.replica_id}"'.encode() not in system.gateway.metrics.render(), "no gauge of a replica that is gone"
            new = await system.pools.add("decode", system.directory)
            await system.until(lambda: system.gateway.why_not_ready() is None)
            assert set(system.gateway.pools.links) == {system.pools.of_role("prefill")[0].boot_id, new.boot_id}

    asyncio.run(scenario())
