"""What gateways keep in Redis: their presence, and answers to requests with an idempotency key. The only file here that knows redis.

Presence: one key with an expiry for each gateway process, for operators and for invariants read from outside, renewed while it lives and
deleted when it stops. Redis being away changes nothing else.

Answers: one hash for each key of a client, claimed by one call of one gateway process (`owner`) for a lease that it renews, until it keeps
an answer there or frees it. Every change is one script and looks at the owner first, so that two gateways agree, a dead one's claims end
with their lease, and one that slept through its lease keeps nothing. All answers of all gateways are bounded in bytes: the oldest go first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Sequence
from typing import Any, Final, Literal, cast

import msgspec
import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from duomo.config import RedisSection
from duomo.errors import CapacityError
from services.kv_transfer.ending import end_tasks, heeding_cancellation

PREFIX: Final = "duomo:gateway:"
# One hash tag, so that a script's keys lie on one node of a Redis cluster.
ANSWERS: Final = "{duomo}:idempotency:answer:"
_AGES: Final = "{duomo}:idempotency:ages"
_SIZES: Final = "{duomo}:idempotency:sizes"
_RENEWALS_PER_LEASE: Final = 3
_OPERATION_TIMEOUT_S: Final = 1.0
_MAX_CONNECTIONS: Final = 8
_KEYS_A_SCRIPT: Final = 256  # a script holds Redis up while it runs

# KEYS presence; ARGV its value. Deletes what is still our own: a gateway may have been started anew under its name.
_LEAVE: Final = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"
# KEYS answer; ARGV fingerprint, owner, lease in ms. Claims what nobody has; its owner may ask twice (a reply can get lost).
_CLAIM: Final = """
local found = redis.call('HMGET', KEYS[1], 'fingerprint', 'owner', 'answer')
if found[1] and found[1] ~= ARGV[1] then return {'other_body'} end
if found[3] then return {'answered', found[3]} end
if found[2] and found[2] ~= ARGV[2] then return {'in_progress'} end
redis.call('HSET', KEYS[1], 'fingerprint', ARGV[1], 'owner', ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return {'claimed'}
"""
# KEYS answers; ARGV lease in ms, then owner and fingerprint of each. Renews, and restores what Redis forgot; which others hold by now.
_RENEW: Final = """
local lost = {}
for idx, key in ipairs(KEYS) do
  local owner, fingerprint = ARGV[2 * idx], ARGV[2 * idx + 1]
  local found = redis.call('HMGET', key, 'owner', 'answer')
  if found[1] and found[1] ~= owner then
    lost[#lost + 1] = idx
  elseif not found[2] then
    redis.call('HSET', key, 'fingerprint', fingerprint, 'owner', owner)
    redis.call('PEXPIRE', key, ARGV[1])
  end
end
return lost
"""
# KEYS answer; ARGV owner. Gives a claim back.
_FREE: Final = """
local found = redis.call('HMGET', KEYS[1], 'owner', 'answer')
if found[1] == ARGV[1] and not found[2] then return redis.call('DEL', KEYS[1]) end
return 0
"""
# KEYS answer, ages, sizes; ARGV name, owner, fingerprint, answer, its life in ms, limit of all answers in bytes, prefix of answers.
# {-1} where another holds the key by now, {-2} where it is larger than all may be, else {how many went for it, bytes of all answers now}.
_KEEP: Final = """
local owner = redis.call('HGET', KEYS[1], 'owner')
if owner and owner ~= ARGV[2] then return {-1} end
local size, evicted = #ARGV[4], 0
if size > tonumber(ARGV[6]) then return {-2} end
local now = redis.call('TIME'); local now_ms = now[1] * 1000 + math.floor(now[2] / 1000)
local total = tonumber(redis.call('HGET', KEYS[3], 'total') or '0')
local function forget(name)
  total = total - tonumber(redis.call('HGET', KEYS[3], name) or '0')
  redis.call('HDEL', KEYS[3], name); redis.call('ZREM', KEYS[2], name)
end
for _, name in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now_ms)) do forget(name) end
forget(ARGV[1])
while total + size > tonumber(ARGV[6]) do
  local oldest = redis.call('ZRANGE', KEYS[2], 0, 0)[1]
  if not oldest then break end
  redis.call('DEL', ARGV[7] .. oldest); forget(oldest); evicted = evicted + 1
end
redis.call('HSET', KEYS[1], 'fingerprint', ARGV[3], 'owner', ARGV[2], 'answer', ARGV[4])
redis.call('PEXPIRE', KEYS[1], ARGV[5])
redis.call('ZADD', KEYS[2], now_ms + ARGV[5], ARGV[1])
redis.call('HSET', KEYS[3], ARGV[1], size, 'total', total + size)
for _, key in ipairs({KEYS[2], KEYS[3]}) do
  if redis.call('PTTL', key) < tonumber(ARGV[5]) then redis.call('PEXPIRE', key, ARGV[5]) end
end
return {evicted, total + size}
"""

log = logging.getLogger(__name__)


class RouterPresence:
    """Owns a connection to Redis and the task that renews the key; stop() ends both and deletes the key, if it is still its own."""

    def __init__(self, section: RedisSection, replica_id: str, boot_id: str, address: str) -> None:
        self.key = f"{PREFIX}{replica_id}"
        self.boot_id = boot_id
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
            await cast(Awaitable[object], self._client.eval(_LEAVE, 1, self.key, self._value))
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


class StoredAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """One answer as its client was given it. packed: the body by zlib, num_bytes of it when unpacked."""

    status: int
    headers: list[tuple[str, str]]
    packed: bytes
    num_bytes: int


class ClaimName(msgspec.Struct, frozen=True, kw_only=True):
    """name: of one client's key at one endpoint; fingerprint: of the body; owner: one call of one start of a gateway."""

    name: str
    fingerprint: str
    owner: str


class AnswerStore:
    """The answers in Redis. Used within one event loop; the creator calls close().

    Everything raises CapacityError `idempotency_unavailable` where Redis does not answer within three seconds.
    """

    def __init__(self, section: RedisSection, *, life_s: float, max_bytes: int) -> None:
        """life_s: of an answer; max_bytes: of all answers of all gateways."""
        self.lease_s = section.lease_s
        self._lease_ms = max(1, round(section.lease_s * 1000))
        self._life_ms = max(1, round(life_s * 1000))
        self._max_bytes = max_bytes
        pool = redis.asyncio.BlockingConnectionPool.from_url(
            section.url,
            max_connections=_MAX_CONNECTIONS,
            timeout=_OPERATION_TIMEOUT_S,
            socket_timeout=_OPERATION_TIMEOUT_S,
            socket_connect_timeout=_OPERATION_TIMEOUT_S,
            retry=Retry(NoBackoff(), 1),
        )
        self._client = redis.asyncio.Redis(connection_pool=pool)

    async def claim(self, claim: ClaimName) -> StoredAnswer | Literal["claimed", "in_progress", "other_body"]:
        """The answer that is there, or whether the claim is ours now: it is until keep(), free(), or the lease's end."""
        arguments = [claim.fingerprint, claim.owner, self._lease_ms]
        said = cast(Sequence[bytes], await self._run(_CLAIM, [ANSWERS + claim.name], arguments))
        if said[0] == b"answered":
            return msgspec.msgpack.decode(said[1], type=StoredAnswer)
        return cast(Literal["claimed", "in_progress", "other_body"], said[0].decode())

    async def renew(self, claims: Sequence[ClaimName]) -> list[ClaimName]:
        """Another lease for each; those that others have claimed meanwhile."""
        lost = []
        for first in range(0, len(claims), _KEYS_A_SCRIPT):
            some = claims[first : first + _KEYS_A_SCRIPT]
            pairs = [told for claim in some for told in (claim.owner, claim.fingerprint)]
            said = await self._run(_RENEW, [ANSWERS + claim.name for claim in some], [self._lease_ms, *pairs])
            lost += [some[idx - 1] for idx in cast(Sequence[int], said)]
        return lost

    async def keep(self, claim: ClaimName, answer: StoredAnswer) -> tuple[int, int] | Literal["lost", "too_large"]:
        """How many older answers had to go for it, and the bytes of all now. Nothing is kept where another claimed the name ("lost")."""
        keys = [ANSWERS + claim.name, _AGES, _SIZES]
        written = msgspec.msgpack.encode(answer)
        arguments = [claim.name, claim.owner, claim.fingerprint, written, self._life_ms, self._max_bytes, ANSWERS]
        said = cast(Sequence[int], await self._run(_KEEP, keys, arguments))
        if said[0] < 0:
            return "lost" if said[0] == -1 else "too_large"
        return said[0], said[1]

    async def free(self, claim: ClaimName) -> None:
        """A claim that is not ours, or was answered, is let be."""
        await self._run(_FREE, [ANSWERS + claim.name], [claim.owner])

    async def close(self) -> None:
        await self._client.aclose()
        await self._client.connection_pool.disconnect()

    async def _run(self, script: str, keys: list[str], arguments: list[Any]) -> object:
        with heeding_cancellation():
            try:
                async with asyncio.timeout(3 * _OPERATION_TIMEOUT_S):
                    return await cast(Awaitable[object], self._client.eval(script, len(keys), *keys, *arguments))
            except (RedisError, OSError, TimeoutError) as error:
                detail = "Redis does not answer, so that a request with an 'Idempotency-Key' cannot be told from its repeat."
                raise CapacityError(detail, code="idempotency_unavailable", phase="gateway") from error
