"""A whole gateway for a test: real uvicorn, real directory on a real Redis, stub replicas behind it; its books are checked at the end."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from duomo.config import DuomoConfig
from duomo.telemetry.metrics import Metrics
from duomo.telemetry.tracing import Tracing, configure
from services.kv_transfer.directory import Directory
from services.kv_transfer.embedded_redis import EmbeddedRedis
from services.router.app import build_app
from services.router.edge import bind_port, serving
from services.router.flight import Flight
from services.router.gateway import Gateway
from services.router.idempotency import Idempotency
from services.router.keys import Keys
from services.router.model_card import read_model_card
from services.router.store import AnswerStore
from services.router.text import ModelText
from tests.ports import free_port
from tests.services.router.stub_replicas import MODEL, Script, Story, StubPools

PATIENCE_S = 60.0  # for what comes in a fraction of it: it ends a test that would hang, and times nothing


@dataclass
class StubSystem:
    """A real gateway under a real uvicorn, connected to stub replicas through a real directory."""

    gateway: Gateway
    pools: StubPools
    directory: Directory
    redis: EmbeddedRedis
    client: httpx.AsyncClient
    base_url: str
    story: Story

    async def until(self, condition: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
        until_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < until_s, "the condition did not come true in time"
            await asyncio.sleep(0.005)

    def check_nothing_is_held(self) -> None:
        """Every book of the gateway is empty."""
        gateway = self.gateway
        assert (gateway.num_live_requests, gateway.num_open_answers, gateway.num_waiting, gateway.num_live_legs) == (0, 0, 0, 0)
        assert gateway.tracing.num_open_spans() == 0
        for link in gateway.pools.links.values():
            assert not link.legs
            assert link.book.is_empty


@asynccontextmanager
async def stub_system(
    folder: Path,
    script: Script | None = None,
    *,
    num_prefills: int = 1,
    num_decodes: int = 1,
    num_blocks: int = 4096,
    overrides: dict | None = None,
    told: str | None = None,
) -> AsyncIterator[StubSystem]:
    """Everything up and ready; torn down in order, with the gateway's books checked. told: what every choice says, then EOS."""
    # Clients keep a connection for as long as a gateway does by default: one that is closed as it is used again would be a failure.
    raw: dict = {"model": {"path": str(MODEL)}, "gateway": {"port": free_port(), "keep_alive_timeout_s": 600.0}}
    for section, values in (overrides or {}).items():
        raw[section] = raw.get(section, {}) | values
    config = DuomoConfig.model_validate(raw)
    card = read_model_card(config.model)
    text = ModelText.of(config.model, card.vocab_size, config.gateway) if config.gateway.chat_template else loaded_text()
    tracing: Tracing = configure(config.tracing, "duomo-gateway", "gateway", "gateway-0")
    redis = EmbeddedRedis(folder)
    redis.start()
    directory = Directory(redis.url, 30.0)
    story = Story(text, told)
    pools = StubPools(script or Script(), story, card.fingerprint, folder, num_blocks)
    gateway = Gateway(config, "gateway-0", card, text, directory, tracing=tracing, metrics=Metrics())
    kept_at = config.redis.model_copy(update={"url": redis.url})
    limits = config.gateway
    store = AnswerStore(kept_at, life_s=limits.idempotency_ttl_s, max_bytes=limits.idempotency_total_bytes)
    idempotency = Idempotency(store, limits, gateway.metrics)
    base_url = f"http://127.0.0.1:{config.gateway.port}"
    try:
        for _ in range(num_prefills):
            await pools.add("prefill", directory)
        for _ in range(num_decodes):
            await pools.add("decode", directory)
        await gateway.start()
        await idempotency.start()
        app, bound = build_app(gateway, Keys(config.gateway), idempotency), bind_port(config.gateway)
        edge = serving(app, bound, config.gateway, gateway.count_refused)
        async with edge, httpx.AsyncClient(base_url=base_url, timeout=PATIENCE_S) as client:
            system = StubSystem(gateway, pools, directory, redis, client, base_url, story)
            if num_prefills and num_decodes:
                await system.until(lambda: gateway.why_not_ready() is None)
                await system.until(lambda: len(gateway.pools.links) == num_prefills + num_decodes)
            yield system
            await system.until(lambda: gateway.num_open_answers == 0)
            system.check_nothing_is_held()
    finally:
        await gateway.stop()
        await idempotency.stop()
        await pools.close()
        await directory.close()
        redis.stop()
        tracing.shutdown()


async def expire(system: StubSystem, num_requests: int) -> None:
    """Once so many requests are known to both their replicas, their time is over: their timers are due, however far they were set."""
    sides = [*system.pools.of_role("prefill"), *system.pools.of_role("decode")]
    await system.until(lambda: len(system.gateway._flights) == num_requests)
    flights = list(system.gateway._flights)
    ids = {flight.request.request_id for flight in flights}
    await system.until(lambda: sum(start.request_id in ids for side in sides for start in side.seen_starts) == 2 * num_requests)
    for flight in flights:
        overdue(system, flight)


def overdue(system: StubSystem, flight: Flight) -> None:
    assert flight.timer is not None and not flight.timer.cancelled()
    flight.timer.cancel()
    system.gateway._expire(flight)


@functools.cache
def loaded_text() -> ModelText:
    """Read once for all tests of a process: it is immutable."""
    return ModelText.load(MODEL)
