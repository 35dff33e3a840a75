"""Owns what the directory deployment does: sweeps expired members and watches Redis' health. Ray-free; knows no KV and no request.

Redis gone means degraded, never dead: the service lives on, and says what it last saw. Restarting it would help nobody.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from duomo.config import DuomoConfig, RedisSection
from duomo.errors import ConfigError, EngineError, PeerError
from services.kv_transfer.directory import Directory, Member
from services.kv_transfer.ending import end_tasks

log = logging.getLogger(__name__)

# A sweep a lease keeps the index short; without it members() is still right, since it filters by lease.
_MIN_PERIOD_S = 0.05
# A loop that has not turned for this many periods hangs.
_HANG_PERIODS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectoryHealth:
    """What the service saw last. last_answer_age_s: seconds since Redis answered; ping_s: that answer's round trip."""

    is_redis_reachable: bool
    last_answer_age_s: float
    ping_s: float
    num_swept: int
    num_outages: int
    detail: str
    members: tuple[Member, ...]


class DirectoryService:
    """Sweeps once a third of a lease. async start(), stop(); health() and check_health() at any time."""

    def __init__(self, section: RedisSection, now_s: Callable[[], float] = time.monotonic) -> None:
        if not section.url:
            raise ConfigError("redis.url (DUOMO_REDIS_URL): the directory needs a Redis server")
        self._directory = Directory(section.url, section.lease_s)
        self._period_s = max(_MIN_PERIOD_S, section.lease_s / 3)
        self._now_s = now_s
        self._task: asyncio.Task[None] | None = None
        self._answered_s = self._turned_s = now_s()
        self._health = DirectoryHealth(
            is_redis_reachable=False, last_answer_age_s=0.0, ping_s=0.0, num_swept=0, num_outages=0, detail="not asked yet", members=()
        )

    async def start(self) -> None:
        """Ask Redis once, whatever it answers, then go on in the background."""
        await self._turn()
        self._task = asyncio.get_running_loop().create_task(self._loop())

    async def stop(self) -> None:
        """End the background task and the connections."""
        if self._task is not None:
            await end_tasks((self._task,))
        await self._directory.close()

    def health(self) -> DirectoryHealth:
        """The last look at Redis; members are the last that were known, also during an outage."""
        last = self._health
        return DirectoryHealth(
            is_redis_reachable=last.is_redis_reachable,
            last_answer_age_s=self._now_s() - self._answered_s,
            ping_s=last.ping_s,
            num_swept=last.num_swept,
            num_outages=last.num_outages,
            detail=last.detail,
            members=last.members,
        )

    def check_health(self) -> None:
        """Raises EngineError where the service itself hangs or ended; an unreachable Redis is only degraded (health())."""
        if self._task is not None and self._task.done():
            raise EngineError("the directory's sweep has ended", code="directory_ended", phase="start")
        silent_s = self._now_s() - self._turned_s
        if silent_s > _HANG_PERIODS * self._period_s + 10.0:
            raise EngineError(f"the directory has not swept for {silent_s:.1f} s", code="directory_hangs", phase="start")

    async def _loop(self) -> None:
        while True:
            await asyncio.sleep(self._period_s)
            await self._turn()

    async def _turn(self) -> None:
        last = self._health
        try:
            ping_s = await self._directory.ping_s()
            num_swept = await self._directory.sweep()
            members = tuple(await self._directory.members())
        except PeerError as error:
            was_reachable = last.is_redis_reachable
            if was_reachable:
                log.warning("Redis is gone, the last known membership of %d stands: %s", len(last.members), error.detail)
            self._health = DirectoryHealth(
                is_redis_reachable=False,
                last_answer_age_s=0.0,
                ping_s=last.ping_s,
                num_swept=last.num_swept,
                num_outages=last.num_outages + was_reachable,
                detail=error.detail,
                members=last.members,
            )
        else:
            self._answered_s = self._now_s()
            self._health = DirectoryHealth(
                is_redis_reachable=True,
                last_answer_age_s=0.0,
                ping_s=ping_s,
                num_swept=last.num_swept + num_swept,
                num_outages=last.num_outages,
                detail="",
                members=members,
            )
        self._turned_s = self._now_s()


async def run_directory(config: DuomoConfig, stop: asyncio.Event) -> None:
    """The directory on its own, until `stop`."""
    service = DirectoryService(config.redis)
    await service.start()
    try:
        await stop.wait()
    finally:
        await service.stop()
