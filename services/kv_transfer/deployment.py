"""Owns the directory's place in Ray Serve: construction, health and end of its replica. Knows no member and no lease."""

from __future__ import annotations

import asyncio

from duomo.config import DuomoConfig
from duomo.telemetry import logging as telemetry_logging
from services.kv_transfer.service import DirectoryService
from services.kv_transfer.service_thread import ServiceThread

STOP_S = 10.0


class DirectoryDeployment:
    """The directory's sweep and its watch over Redis, in a thread and loop of its own."""

    def __init__(self, config_json: str) -> None:
        telemetry_logging.configure("directory", "directory")
        config = DuomoConfig.model_validate_json(config_json)
        self._service = DirectoryService(config.redis)
        started = asyncio.Event()

        async def run(stop: asyncio.Event) -> None:
            await self._service.start()
            started.set()
            try:
                await stop.wait()
            finally:
                await self._service.stop()

        async def ready() -> None:
            await started.wait()

        self._thread = ServiceThread("directory", run, ready)
        self._thread.start(config.ray.start_timeout_s)

    async def check_health(self) -> None:
        """Serve's health check. Redis gone is degraded, not ill: a new directory would find it gone as well."""
        self._thread.check()
        self._service.check_health()

    async def __del__(self) -> None:
        """Serve's shutdown hook (it has no other)."""
        await self._thread.stop(STOP_S)
