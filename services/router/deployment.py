"""Owns the router's place in Ray Serve: construction, health and draining of the gateway. Knows no request.

The replica listens on gateway.host and gateway.port itself, without Serve's proxy (docs/decisions/0003-ingress.md).
"""

from __future__ import annotations

import asyncio
import contextlib

from ray import serve
from ray.serve.handle import DeploymentHandle

from duomo.config import DuomoConfig
from duomo.config_gateway import GatewaySection
from services.kv_transfer.service_thread import ServiceThread


class RouterDeployment:
    """The gateway: its service in a thread and loop of its own. The constructor returns when its port answers."""

    def __init__(self, config_json: str, *pools: DeploymentHandle[object]) -> None:
        """pools: the other deployments; naming them here makes them parts of one application. They are never called."""
        # Here, not on top: whoever binds the application needs neither FastAPI nor tokenizers.
        from duomo.telemetry import logging as telemetry_logging
        from services.router.service import serve_gateway

        config = DuomoConfig.model_validate_json(config_json)
        replica_id = f"router-{serve.get_replica_context().replica_tag[:8]}"
        telemetry_logging.configure("router", replica_id)

        async def run(stop: asyncio.Event) -> None:
            await serve_gateway(config, replica_id, stop)

        self._drain_s = config.gateway.request_deadline_s
        self._thread = ServiceThread(replica_id, run, lambda: _until_listening(config.gateway))
        self._thread.start(config.ray.start_timeout_s)

    async def check_health(self) -> None:
        """Serve's health check. A peer's failure never fails it: only the gateway's own end or stand-still does."""
        self._thread.check()

    async def __del__(self) -> None:
        """Serve's shutdown hook (it has no other): finish the open streams, then close the port."""
        await self._thread.stop(self._drain_s)


async def _until_listening(gateway: GatewaySection) -> None:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(gateway.host, gateway.host)
    while True:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(host, gateway.port)
            writer.close()
            return
        await asyncio.sleep(0.05)
