"""Owns the question whether a replica may start beside those that its Redis knows: a model has one layout. Knows no socket.

A prefill replica of the layout split hands nothing to an engine's decode side, nor an engine anything to a decode replica of another
process: a router that finds both pairs them, and every such request fails.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final, Literal

from duomo.config import RedisSection
from duomo.errors import ConfigError, PeerError
from services.kv_transfer.directory import Directory, Member

POLL_S: Final = 0.2
_OTHER: Final = {"prefill": "decode", "decode": "prefill"}


def strangers(members: Sequence[Member], layout: Literal["split", "colocated"], fingerprint: str, own_id: str) -> list[str]:
    """Replica ids of this model and another layout. own_id: an earlier start of the same replica may still have its lease.

    An engine registers "x.prefill" and "x.decode"; whoever lacks the other half is a replica of the layout split.
    """
    ids = {member.replica_id for member in members}
    found = []
    for member in members:
        name, _, half = member.replica_id.rpartition(".")
        is_engine = half == member.role and f"{name}.{_OTHER.get(half, '')}" in ids
        is_own = member.replica_id == own_id or name == own_id
        if member.role in _OTHER and member.model_fingerprint == fingerprint and not is_own and is_engine != (layout == "colocated"):
            found.append(member.replica_id)
    return found


async def refuse_mixed(redis: RedisSection, layout: Literal["split", "colocated"], fingerprint: str, own_id: str = "") -> None:
    """Raises ConfigError where replicas of another layout stay in the directory for longer than a lease that nobody renews.

    A directory that does not answer refuses nothing: whoever needs it says so.
    """
    directory = Directory(redis.url, redis.lease_s)
    end_s = asyncio.get_running_loop().time() + redis.lease_s + 1.0
    try:
        while found := strangers(await directory.members(), layout, fingerprint, own_id):
            if asyncio.get_running_loop().time() > end_s:
                other = "split" if layout == "colocated" else "colocated"
                raise ConfigError(
                    f"redis.url (DUOMO_REDIS_URL): {', '.join(found)} of the same model serve there in layout {other}, "
                    f"and this one would be {layout}: stop them first, or name another Redis server"
                )
            await asyncio.sleep(POLL_S)
    except PeerError:
        return
    finally:
        await directory.close()
