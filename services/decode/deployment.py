"""Owns decode's place in Ray Serve: construction, health and draining of one replica. Knows no request: none passes through Ray."""

from __future__ import annotations

import asyncio

from ray import serve

from duomo.config import DuomoConfig
from services.kv_transfer.registration import until_registered
from services.kv_transfer.service_thread import ServiceThread


class DecodeDeployment:
    """One decode replica: its service in a thread and loop of its own. The constructor returns when it is warm and registered."""

    def __init__(self, config_json: str) -> None:
        # Here, not on top: whoever binds the application imports this file, and needs no torch.
        from duomo.telemetry import logging as telemetry_logging
        from services.decode.replica import run_replica

        config = DuomoConfig.model_validate_json(config_json)
        replica_id = f"decode-{serve.get_replica_context().replica_tag[:8]}"
        telemetry_logging.configure("decode", replica_id)

        async def run(stop: asyncio.Event) -> None:
            await run_replica(config, replica_id, stop)

        self._drain_s = config.gateway.request_deadline_s
        self._thread = ServiceThread(replica_id, run, lambda: until_registered(config.redis, replica_id))
        self._thread.start(config.ray.start_timeout_s)

    async def check_health(self) -> None:
        """Serve's health check: raises, and so has this replica replaced, when the service has ended or stands still."""
        self._thread.check()

    async def __del__(self) -> None:
        """Serve's shutdown hook (it has no other): take no new request, finish the live ones, unregister."""
        await self._thread.stop(self._drain_s)
