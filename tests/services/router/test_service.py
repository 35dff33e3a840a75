"""The gateway as a process: what it needs, what it takes down, its port and its presence in Redis."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import httpx
import pytest
import redis

from duomo.config import DuomoConfig
from duomo.errors import ConfigError, ModelError
from services.kv_transfer.embedded_redis import EmbeddedRedis
from services.router.service import serve_gateway
from services.router.store import PREFIX
from tests.ports import free_port
from tests.services.router.stub_replicas import MODEL
from tests.services.router.stub_system import PATIENCE_S


def _config(port: int, url: str, model: Path = MODEL) -> DuomoConfig:
    return DuomoConfig.model_validate({"model": {"path": str(model)}, "gateway": {"port": port}, "redis": {"url": url, "lease_s": 30.0}})


def test_it_serves_is_present_in_redis_and_leaves_nothing(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path)
    server.start()
    port = free_port()

    async def scenario() -> None:
        stop = asyncio.Event()
        serving = asyncio.create_task(serve_gateway(_config(port, server.url), "router-7", stop))
        keys = redis.Redis.from_url(server.url)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as client:
            async with asyncio.timeout(PATIENCE_S):
                while not keys.exists(PREFIX + "router-7"):
                    await asyncio.sleep(0.02)
            assert 0 < keys.pttl(PREFIX + "router-7") <= 30_000, "the key expires by itself"
            assert (await client.get("/health/live")).status_code == 200
            assert (await client.get("/health/ready")).status_code == 503
        stop.set()
        await asyncio.wait_for(serving, PATIENCE_S)
        assert keys.keys("*") == []
        keys.close()
        assert len(asyncio.all_tasks()) == 1

    try:
        asyncio.run(scenario())
    finally:
        server.stop()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_taken_port_names_the_option(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        config = _config(holder.getsockname()[1], "redis://127.0.0.1:1")
        with pytest.raises(ConfigError, match="--port.*gateway.port"):
            asyncio.run(serve_gateway(config, "router-0", asyncio.Event()))


def test_no_redis_and_no_model_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="DUOMO_REDIS_URL"):
        asyncio.run(serve_gateway(_config(free_port(), ""), "router-0", asyncio.Event()))
    with pytest.raises(ModelError, match="config.json"):
        asyncio.run(serve_gateway(_config(free_port(), "redis://127.0.0.1:1", tmp_path), "router-0", asyncio.Event()))
