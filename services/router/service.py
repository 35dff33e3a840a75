"""The gateway as a process: builds every part from the configuration, serves until told to stop, drains, takes everything down.

Knows no request; runs without Ray (deployment.py wraps it).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from duomo.config import DuomoConfig
from duomo.errors import ConfigError
from duomo.telemetry.metrics import Metrics
from duomo.telemetry.tracing import configure
from services.kv_transfer.directory import Directory
from services.kv_transfer.started_heap import freeze_started
from services.router.admin_api import build_admin_app
from services.router.app import build_app
from services.router.audit import Audit
from services.router.edge import allow_connections, bind_admin_port, bind_port, serving
from services.router.gateway import Gateway
from services.router.idempotency import Idempotency
from services.router.keys import Keys, open_door
from services.router.model_card import read_model_card
from services.router.store import AnswerStore, RouterPresence
from services.router.text import ModelText

__all__ = ["Gateway", "serve_gateway"]

log = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def serving_admin(gateway: Gateway, keys: Keys) -> AsyncIterator[None]:
    """Serve the admin API, where it has a port, while the block runs. Raises ConfigError for a port or an audit file it cannot have."""
    section = gateway.config.gateway
    bound = bind_admin_port(section)
    if bound is None:
        yield
        return
    with bound, contextlib.closing(Audit(section.audit_file, gateway.metrics)) as audit:
        async with serving(build_admin_app(gateway, keys, audit), bound, section, gateway.count_refused):
            log.info("the admin API listens on %s:%s", section.admin_host, section.admin_port)
            yield


async def serve_gateway(config: DuomoConfig, replica_id: str, stop: asyncio.Event) -> None:
    """Serve until `stop` is set; then finish the live requests within their deadline.

    Raises ConfigError naming the option (a taken port: --port; no Redis: redis.url) and ModelError before anything is served.
    """
    if not config.redis.url:
        raise ConfigError("redis.url (DUOMO_REDIS_URL) is empty: the gateway finds its replicas there")
    keys = Keys(config.gateway)
    allow_connections(config.gateway)
    bound = bind_port(config.gateway)
    try:
        card = read_model_card(config.model)
        text = ModelText.of(config.model, card.vocab_size, config.gateway)
        if text.note:
            log.warning("%s", text.note)
        tracing = configure(config.tracing, "duomo-gateway", "gateway", replica_id)
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(tracing.shutdown)
            directory = Directory(config.redis.url, config.redis.lease_s)
            stack.push_async_callback(directory.close)
            gateway = Gateway(config, replica_id, card, text, directory, tracing=tracing, metrics=Metrics())
            scheme = "https" if config.gateway.ssl_certfile else "http"
            address = f"{scheme}://{config.gateway.host}:{config.gateway.port}"
            presence = RouterPresence(config.redis, replica_id, gateway.boot_id, address)
            store = AnswerStore(config.redis, life_s=config.gateway.idempotency_ttl_s, max_bytes=config.gateway.idempotency_total_bytes)
            idempotency = Idempotency(store, config.gateway, gateway.metrics)
            stack.push_async_callback(idempotency.stop)
            await idempotency.start()
            stack.push_async_callback(gateway.stop)
            await gateway.start()
            stack.push_async_callback(presence.stop)
            await presence.start()
            await stack.enter_async_context(serving_admin(gateway, keys))
            if warning := open_door(config.gateway):
                log.warning("%s", warning)
            async with serving(build_app(gateway, keys, idempotency), bound, config.gateway, gateway.count_refused):
                freeze_started()
                log.info("the gateway %s listens on %s", replica_id, address)
                await stop.wait()
                await gateway.drain(config.gateway.request_deadline_s)
    finally:
        bound.close()
