"""Owns the question whether a replica has registered: what "warm and usable" looks like from outside. Knows no socket of the replica."""

from __future__ import annotations

import asyncio
import contextlib

from duomo.config import RedisSection
from duomo.errors import PeerError
from services.kv_transfer.directory import Directory

POLL_S = 0.05


async def until_registered(section: RedisSection, replica_id: str) -> None:
    """Return once the directory lists replica_id; a directory that does not answer is asked again. The caller bounds the wait."""
    directory = Directory(section.url, section.lease_s)
    try:
        while True:
            with contextlib.suppress(PeerError):
                if any(member.replica_id == replica_id for member in await directory.members()):
                    return
            await asyncio.sleep(POLL_S)
    finally:
        await directory.close()
