"""The router's own presence in Redis: which gateways exist, for operators and for invariants read from outside. Holds no request.

One key with an expiry for each gateway process, renewed while it lives and deleted when it stops. Redis being away changes nothing else.
The only file of this service that knows redis.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Final

import msgspec
import redis.asyncio
from redis.exceptions import RedisError

from duomo.config import RedisSection
from services.kv_transfer.ending import end_tasks

PREFIX: Final = "duomo:gateway:"
_RENEWALS_PER_LEASE: Final = 3
_OPERATION_TIMEOUT_S: Final = 1.0

log = logging.getLogger(__name__)


class RouterPresence:
    """Owns a connection to Redis and the task that renews the key; stop() ends both and deletes the key."""

    def __init__(self, section: RedisSection, replica_id: str, boot_id: str, address: str) -> None:
        self.key = f"{PREFIX}{replica_id}"
        self._value = msgspec.json.encode({"boot_id": boot_id, "address": address, "started_at": int(time.time())})
        self._lease_s = section.lease_s
        self._client = redis.asyncio.Redis.from_url(
            section.url, socket_timeout=_OPERATION_TIMEOUT_S, socket_connect_timeout=_OPERATION_TIMEOUT_S
        )
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._renew())

    async def stop(self) -> None:
        if self._task is not None:
            await end_tasks([self._task])
        with contextlib.suppress(RedisError, OSError):  # it expires by itself
            await self._client.delete(self.key)
        await self._client.aclose()

    async def _renew(self) -> None:
        is_reachable = True
        while True:
            try:
                await self._client.set(self.key, self._value, px=int(self._lease_s * 1000))
                is_reachable = True
            except (RedisError, OSError) as error:
                if is_reachable:
                    log.warning("the gateway's presence cannot be written to Redis: %s", error)
                is_reachable = False
            await asyncio.sleep(self._lease_s / _RENEWALS_PER_LEASE)
