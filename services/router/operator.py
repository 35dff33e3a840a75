"""What replicas are asked at an operator's word: to drain, to take requests again, to forget every prefix. Knows no HTTP and no key.

A word counts as done when the replica has said so: by a report that shows it, or by its answer.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from duomo.errors import PeerError, RequestError
from duomo.wire.codec import UNKNOWN_MESSAGE
from duomo.wire.messages import CachesFlushed, Drain, FlushCaches, Message, Refused, ReplicaReport, Undrain

if TYPE_CHECKING:
    from services.router.pools import Pools, ReplicaLink

CONFIRMED_WITHIN_S: Final = 5.0  # reports come ten a second
_POLL_S: Final = 0.02
_NEEDED_VERSION: Final = 5
# How a replica refuses such a word (it comes too late; it is none that it takes). Other codes are about other messages.
_REFUSALS: Final = ("ending", "unexpected_message", UNKNOWN_MESSAGE)


@dataclass(slots=True)
class Heard:
    """What one replica has said that an operator's word waits for."""

    num_reports: int = 0
    is_draining: bool = False
    refused: Refused | None = None
    flushed: dict[int, int] = field(default_factory=dict)  # blocks by flush_id
    # A refusal does not say which word it is of: one waits at a time.
    one_word: asyncio.Lock = field(default_factory=asyncio.Lock)

    def reported(self, report: ReplicaReport) -> None:
        self.num_reports += 1
        self.is_draining = report.is_draining

    def was_refused(self, message: Refused) -> None:
        if message.code in _REFUSALS:
            self.refused = message

    def answered(self, message: Message) -> bool:
        """Whether the message is an answer to such a word."""
        if isinstance(message, CachesFlushed):
            self.flushed[message.flush_id] = message.num_blocks
        return isinstance(message, CachesFlushed)


class Operator:
    """The replicas of one gateway. All methods raise RequestError with a status and a code that say why a word is not done.

    Several gateways may ask the same replicas: each hears of it in their reports.
    """

    def __init__(self, pools: Pools, confirmed_within_s: float = CONFIRMED_WITHIN_S) -> None:
        self._pools = pools
        self._confirmed_within_s = confirmed_within_s
        self._flush_ids = itertools.count(1)

    def replica(self, replica_id: str) -> ReplicaLink:
        """By its replica_id; of one that was restarted, the start that this gateway is connected to."""
        for link in self._pools.links.values():
            if link.member.replica_id == replica_id:
                return link
        raise RequestError(f"No replica '{replica_id}' is connected.", param="replica", status=404, code="replica_not_found")

    def pool(self, name: str) -> Sequence[ReplicaLink]:
        """The replicas of prefill, decode, or all."""
        if name not in ("prefill", "decode", "all"):
            raise RequestError(f"There is no pool '{name}': prefill, decode, or all.", param="pool", status=404, code="pool_not_found")
        return [link for link in self._pools.links.values() if name in (link.role, "all")]

    async def set_draining(self, link: ReplicaLink, is_draining: bool) -> None:
        """Until it reports that it takes no new request, and stays; or that it takes them again."""
        heard = link.heard
        async with heard.one_word:
            before = heard.num_reports
            self._post(link, Drain(deadline_s=0.0, ends=False) if is_draining else Undrain())
            await self._until(link, lambda: heard.num_reports > before and heard.is_draining is is_draining)

    async def flush(self, link: ReplicaLink) -> int:
        """How many blocks' prefixes it has forgotten."""
        flush_id, flushed = next(self._flush_ids), link.heard.flushed
        async with link.heard.one_word:
            self._post(link, FlushCaches(flush_id=flush_id))
            await self._until(link, lambda: flush_id in flushed)
        return flushed.pop(flush_id)

    async def flush_all(self, links: Sequence[ReplicaLink]) -> dict[str, int | RequestError]:
        """By replica_id: how many blocks' prefixes each has forgotten, or why that is not known.

        Decodes are asked when every prefill has answered: before that a prefill may still hand on what it found by prefix.
        """
        done: dict[str, int | RequestError] = {}
        for role in ("prefill", "decode"):
            asked = [link for link in links if link.role == role]
            told = await asyncio.gather(*(self.flush(link) for link in asked), return_exceptions=True)
            for link, said in zip(asked, told, strict=True):
                if isinstance(said, BaseException) and not isinstance(said, RequestError):
                    raise said
                done[link.member.replica_id] = said
        return done

    def _post(self, link: ReplicaLink, message: Drain | Undrain | FlushCaches) -> None:
        if link.connection.version < _NEEDED_VERSION:
            detail = f"{link.member.replica_id} speaks wire version {link.connection.version}, which knows no such word: upgrade it."
            raise RequestError(detail, param="replica", status=409, code="peer_too_old")
        link.heard.refused = None
        try:
            link.connection.post(message)
        except PeerError as error:
            raise _gone(link) from error

    async def _until(self, link: ReplicaLink, is_done: Callable[[], bool]) -> None:
        until_s = time.monotonic() + self._confirmed_within_s
        while not is_done():
            if link.heard.refused is not None:
                refused = link.heard.refused
                raise RequestError(f"{link.member.replica_id} refused: {refused.detail}.", param="replica", status=409, code=refused.code)
            if link.connection.closed:
                raise _gone(link)
            if time.monotonic() > until_s:
                detail = f"{link.member.replica_id} did not confirm within {self._confirmed_within_s:g} s."
                raise RequestError(detail, param="replica", status=504, code="not_confirmed")
            await asyncio.sleep(_POLL_S)


def _gone(link: ReplicaLink) -> RequestError:
    return RequestError(f"{link.member.replica_id} is gone.", param="replica", status=404, code="replica_not_found")
