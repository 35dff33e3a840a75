"""A whole decode replica as the command runs it: real NIXL, a real directory, from its model folder to its end."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from duomo.config import DuomoConfig
from duomo.errors import ConfigError
from services.decode.replica import run_replica
from services.kv_transfer.directory import Directory
from services.kv_transfer.embedded_redis import EmbeddedRedis
from tests.services.decode.rig import configuration
from tests.services.decode.scripted_gateway import ScriptedGateway
from tests.services.decode.scripted_peers import until


def told(folder: Path, url: str, transport: str = "nixl") -> DuomoConfig:
    return configuration(folder, {"redis": {"url": url}, "kv_transfer": {"transport": transport, "ucx_net_devices": "lo"}})


def test_a_replica_registers_reports_its_transport_and_leaves_nothing(tmp_path: Path) -> None:
    async def go() -> None:
        server = EmbeddedRedis(tmp_path)
        server.start()
        config = told(tmp_path, server.url)
        directory = Directory(server.url, config.redis.lease_s)
        stop = asyncio.Event()
        serving = asyncio.create_task(run_replica(config, "d0", stop))
        try:
            while not (members := await directory.members()):
                assert not serving.done(), serving.result()
                await asyncio.sleep(0.05)
            gateway = ScriptedGateway(config)
            await gateway.connect(members[0].address)
            await until(lambda: gateway.report is not None)
            assert gateway.report is not None and gateway.report.transport == "nixl/UCX"
            stop.set()
            async with asyncio.timeout(30):
                await serving
            assert await directory.members() == []
            assert list(tmp_path.glob("*.sock")) == []
            await gateway.close()
        finally:
            serving.cancel()
            await directory.close()
            server.stop()

    asyncio.run(go())


@pytest.mark.parametrize(
    ("url", "transport", "named"), [("", "nixl", "redis.url"), ("unix:///nowhere", "loopback", "kv_transfer.transport")]
)
def test_what_a_lone_replica_lacks_is_named(tmp_path: Path, url: str, transport: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        asyncio.run(run_replica(told(tmp_path, url, transport), "d0", asyncio.Event()))
