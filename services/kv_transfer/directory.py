"""Owns the registry of replicas in Redis: who is a member, for how long its lease runs. Knows no socket of theirs and no KV.

Every key expires: a member's with its lease, the index with the last lease. Scripts are atomic and use the server's clock, so that no
two machines' clocks are compared. During an outage every call raises PeerError("directory_unavailable") within 3 * TIMEOUT_S; whoever asks
keeps the last membership it knew, and an empty Redis removes nobody whose socket lives: members register again at their next renewal.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Sequence
from typing import Any, cast

import msgspec
import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from duomo.errors import ConfigError, PeerError
from duomo.wire.messages import Role
from services.kv_transfer.ending import heeding_cancellation

TIMEOUT_S = 1.0
_MAX_CONNECTIONS = 8
# One hash tag, so that a script's keys lie on one node of a Redis cluster.
_INDEX = "{duomo}:members"
_MEMBER = "{duomo}:member:"

# KEYS index, member; ARGV boot id, value, lease in ms. Registers, or renews and repairs.
_REGISTER = """
local now = redis.call('TIME'); local now_ms = now[1] * 1000 + math.floor(now[2] / 1000)
redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3])
redis.call('ZADD', KEYS[1], now_ms + ARGV[3], ARGV[1])
if redis.call('PTTL', KEYS[1]) < tonumber(ARGV[3]) then redis.call('PEXPIRE', KEYS[1], ARGV[3]) end
return 1
"""
# KEYS index, member; ARGV boot id, lease in ms. 0 where the lease had run out.
_RENEW = """
if redis.call('EXISTS', KEYS[2]) == 0 then return 0 end
local now = redis.call('TIME'); local now_ms = now[1] * 1000 + math.floor(now[2] / 1000)
redis.call('PEXPIRE', KEYS[2], ARGV[2])
redis.call('ZADD', KEYS[1], now_ms + ARGV[2], ARGV[1])
if redis.call('PTTL', KEYS[1]) < tonumber(ARGV[2]) then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
return 1
"""
# KEYS index, member; ARGV boot id.
_REMOVE = "redis.call('ZREM', KEYS[1], ARGV[1]); return redis.call('DEL', KEYS[2])"
# KEYS index. How many index entries had outlived their lease.
_SWEEP = """
local now = redis.call('TIME'); local now_ms = now[1] * 1000 + math.floor(now[2] / 1000)
return redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now_ms)
"""
# KEYS index; ARGV prefix of member keys. The values of all members whose lease runs.
_MEMBERS = """
local now = redis.call('TIME'); local now_ms = now[1] * 1000 + math.floor(now[2] / 1000)
local found = {}
for _, boot_id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. now_ms, '+inf')) do
  local value = redis.call('GET', ARGV[1] .. boot_id)
  if value then found[#found + 1] = value end
end
return found
"""


class Member(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """One start of one replica: where it listens and what it serves."""

    replica_id: str
    boot_id: str
    role: Role
    address: str
    model_fingerprint: str
    model_name: str


class Directory:
    """The registry as one process sees it. Used within one event loop; the creator calls close()."""

    def __init__(self, url: str, lease_s: float) -> None:
        assert lease_s > 0, lease_s
        self.lease_s = lease_s
        self._lease_ms = max(1, round(lease_s * 1000))
        try:
            pool = aioredis.BlockingConnectionPool.from_url(
                url,
                max_connections=_MAX_CONNECTIONS,
                timeout=TIMEOUT_S,
                socket_timeout=TIMEOUT_S,
                socket_connect_timeout=TIMEOUT_S,
                retry=Retry(NoBackoff(), 1),
            )
        except ValueError as error:
            raise ConfigError(f"redis.url (DUOMO_REDIS_URL) {_shown(url)!r}: {error}; use redis://host:port/0 or unix:///path") from error
        self._redis = aioredis.Redis(connection_pool=pool)

    async def register(self, member: Member) -> None:
        """Start or renew a member's lease; also restores it where Redis forgot it."""
        value = msgspec.json.encode(member)
        await self._run(_REGISTER, [_INDEX, _MEMBER + member.boot_id], [member.boot_id, value, self._lease_ms])

    async def renew(self, member: Member) -> bool:
        """Renew a lease; False where it had run out or Redis forgot it (then register())."""
        return bool(await self._run(_RENEW, [_INDEX, _MEMBER + member.boot_id], [member.boot_id, self._lease_ms]))

    async def remove(self, member: Member) -> None:
        """End a lease at once. A member that is not there is fine."""
        await self._run(_REMOVE, [_INDEX, _MEMBER + member.boot_id], [member.boot_id])

    async def members(self) -> list[Member]:
        """Everyone whose lease runs, ordered by replica and boot id. Entries of a newer version that cannot be read are left out."""
        values = cast(Sequence[bytes], await self._run(_MEMBERS, [_INDEX], [_MEMBER]))
        members = [member for member in map(_decode, values) if member is not None]
        return sorted(members, key=lambda member: (member.replica_id, member.boot_id))

    async def sweep(self) -> int:
        """Drop index entries whose lease ran out; how many there were."""
        return cast(int, await self._run(_SWEEP, [_INDEX], []))

    async def ping_s(self) -> float:
        """Seconds of a round trip to Redis."""
        started_s = time.monotonic()
        await self._answer(cast(Awaitable[object], self._redis.ping()))
        return time.monotonic() - started_s

    async def close(self) -> None:
        """Close every connection."""
        await self._redis.aclose()
        await self._redis.connection_pool.disconnect()

    async def _run(self, script: str, keys: list[str], arguments: list[Any]) -> object:
        return await self._answer(cast(Awaitable[object], self._redis.eval(script, len(keys), *keys, *arguments)))

    async def _answer(self, asked: Awaitable[object]) -> object:
        with heeding_cancellation():
            try:
                async with asyncio.timeout(3 * TIMEOUT_S):
                    return await asked
            except (RedisError, OSError, TimeoutError) as error:
                raise PeerError(f"the directory (Redis) does not answer: {error!r}", code="directory_unavailable", phase="start") from error


def _decode(value: bytes) -> Member | None:
    try:
        return msgspec.json.decode(value, type=Member)
    except msgspec.DecodeError:
        return None


def _shown(url: str) -> str:
    """Without a user's name and password."""
    before, _, behind = url.rpartition("@")
    return f"{before.partition('//')[0]}//***@{behind}" if before else url
