"""The replicas this gateway is connected to: one socket each, their last reports, and what this gateway has running there.

Owns the connections and their reading tasks. Membership comes from the directory; a replica that the directory forgot stays as long as
its socket lives. Knows no request's content: messages go to a PoolListener.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Literal, Protocol

from duomo.config import WireSection
from duomo.errors import DuomoError, PeerError, WireError
from duomo.wire.connection import Connection, Identity, connect
from duomo.wire.messages import Message, Preempted, PromptScored, Refused, ReplicaReport, RequestFailed, RequestFinished, TokensEmitted
from duomo.wire.values import PeerAddress
from services.kv_transfer.ending import end_tasks
from services.router.books import ReplicaBook
from services.router.operator import Heard

if TYPE_CHECKING:
    from services.kv_transfer.directory import Member
    from services.router.flight import Leg

POLL_PERIOD_S: Final = 0.25
SILENT_S: Final = 2.0  # a report comes ten times a second; a busy loop may be late with it
_RETRY_CONNECT_S: Final = 0.5

log = logging.getLogger(__name__)


class MemberSource(Protocol):
    """Who is registered: the directory on Redis, or a fixed list."""

    async def members(self) -> Sequence[Member]: ...


class ReplicaLink:
    """A live connection to one start of one replica, the legs of this gateway there, and the book of its load."""

    def __init__(self, member: Member, connection: Connection, role: Literal["prefill", "decode"]) -> None:
        self.member = member
        self.connection = connection
        self.role = role
        self.key = member.boot_id
        self.address = PeerAddress(replica_id=member.replica_id, boot_id=member.boot_id, address=member.address)
        self.book = ReplicaBook(self.key)
        self.legs: set[Leg] = set()
        self.has_refused_drain = False
        self.heard = Heard()

    @property
    def report(self) -> ReplicaReport | None:
        """Its last one."""
        return self.book.report

    def is_silent(self, now_s: float) -> bool:
        """Whether it has reported, and not for some time."""
        return self.report is not None and now_s - self.book.received_s > SILENT_S

    @property
    def is_usable(self) -> bool:
        """Connected, reporting, and taking new requests. A refusal says that it drains before the next report does."""
        if self.connection.closed or self.report is None:
            return False
        return not self.report.is_draining and not self.has_refused_drain


class PoolListener(Protocol):
    """Who hears the replicas. Called on the loop; must not block."""

    def tokens_emitted(self, link: ReplicaLink, frame: TokensEmitted, received_s: float) -> None: ...
    def prompt_scored(self, link: ReplicaLink, message: PromptScored) -> None: ...
    def request_finished(self, link: ReplicaLink, message: RequestFinished) -> None: ...
    def request_failed(self, link: ReplicaLink, message: RequestFailed) -> None: ...
    def preempted(self, link: ReplicaLink, message: Preempted) -> None: ...
    def reported(self, link: ReplicaLink) -> None: ...
    def link_lost(self, link: ReplicaLink, error: PeerError) -> None: ...


class Pools:
    """Both pools. start() begins to watch the member source; stop() closes every connection and waits for every task."""

    def __init__(self, source: MemberSource, identity: Identity, wire: WireSection, listener: PoolListener) -> None:
        self.links: dict[str, ReplicaLink] = {}
        self.is_directory_reachable = True
        self._source = source
        self._identity = identity
        self._wire = wire
        self._listener = listener
        self._connecting: set[str] = set()
        self._retry_at_s: dict[str, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def prefills(self) -> list[ReplicaLink]:
        return [link for link in self.links.values() if link.role == "prefill"]

    def decodes(self) -> list[ReplicaLink]:
        return [link for link in self.links.values() if link.role == "decode"]

    def most_tokens(self) -> int | None:
        """Of one choice, prompt and completion: what both pools hold, each by its largest replica; None where one has none that reports."""
        sizes = [
            [link.report.num_blocks * link.report.block_tokens for link in pool if link.report]
            for pool in (self.prefills(), self.decodes())
        ]
        return min(map(max, sizes)) if all(sizes) else None

    async def start(self) -> None:
        self._spawn(self._watch())

    async def stop(self) -> None:
        await end_tasks(self._tasks)
        await asyncio.gather(*(link.connection.close() for link in self.links.values()), return_exceptions=True)
        self.links.clear()

    async def _watch(self) -> None:
        while True:
            try:
                members = await self._source.members()
                self._set_reachable(True, "")
            except DuomoError as error:
                self._set_reachable(False, str(error))
                members = ()
            self._connect_new(members)
            await asyncio.sleep(POLL_PERIOD_S)

    def _set_reachable(self, is_reachable: bool, why: str) -> None:
        if is_reachable != self.is_directory_reachable:
            log.log(logging.INFO if is_reachable else logging.WARNING, "directory %s", why or "answers again")
        self.is_directory_reachable = is_reachable

    def _connect_new(self, members: Sequence[Member]) -> None:
        now_s = time.monotonic()
        known = {member.boot_id for member in members}
        self._retry_at_s = {key: at_s for key, at_s in self._retry_at_s.items() if key in known}
        for member in members:
            key = member.boot_id
            if member.role not in ("prefill", "decode") or member.model_fingerprint != self._identity.model_fingerprint:
                continue
            if key in self.links or key in self._connecting or now_s < self._retry_at_s.get(key, 0.0):
                continue
            self._connecting.add(key)
            self._spawn(self._serve(member, "prefill" if member.role == "prefill" else "decode"))

    async def _serve(self, member: Member, role: Literal["prefill", "decode"]) -> None:
        """One replica from dialling to its end."""
        try:
            connection = await connect(member.address, self._identity, self._wire)
        except DuomoError as error:
            self._retry_at_s[member.boot_id] = time.monotonic() + _RETRY_CONNECT_S
            log.info("cannot connect to %s: %s", member.replica_id, error)
            return
        finally:
            self._connecting.discard(member.boot_id)
        if connection.peer.boot_id != member.boot_id:  # the address was taken over by a newer start, which registers itself
            self._retry_at_s[member.boot_id] = time.monotonic() + _RETRY_CONNECT_S
            await connection.close()
            return
        link = ReplicaLink(member, connection, role)
        self.links[link.key] = link
        log.info("connected to %s replica %s", role, member.replica_id)
        try:
            await self._read(link)
        finally:
            self.links.pop(link.key, None)
            with contextlib.suppress(asyncio.CancelledError):
                await connection.close()

    async def _read(self, link: ReplicaLink) -> None:
        connection = link.connection
        while True:
            try:
                message = await connection.receive()
            except WireError as error:
                log.warning("%s sent what this version cannot read: %s", link.member.replica_id, error)
                continue
            except PeerError as error:
                log.info("%s replica %s is gone: %s", link.role, link.member.replica_id, error)
                self._lost(link, error)
                return
            try:
                self._dispatch(link, message, connection.received_s)
            except Exception:  # a programmer's fault; unheard, what the message was about would wait for ever
                log.exception("a message of %s could not be taken: its connection is given up", link.member.replica_id)
                self._lost(link, PeerError("A message could not be taken.", code="connection_given_up", phase="wire"))
                return

    def _lost(self, link: ReplicaLink, error: PeerError) -> None:
        self.links.pop(link.key, None)
        self._retry_at_s[link.key] = time.monotonic() + _RETRY_CONNECT_S
        self._listener.link_lost(link, error)

    def _dispatch(self, link: ReplicaLink, message: Message, received_s: float) -> None:
        if type(message) is TokensEmitted:
            self._listener.tokens_emitted(link, message, received_s)
        elif type(message) is ReplicaReport:
            link.book.reported(message, received_s)
            link.has_refused_drain &= message.is_draining  # reports come behind the refusal: one that does not drain is an Undrain's
            link.heard.reported(message)
            self._listener.reported(link)
        elif type(message) is PromptScored:
            self._listener.prompt_scored(link, message)
        elif type(message) is RequestFinished:
            self._listener.request_finished(link, message)
        elif type(message) is RequestFailed:
            self._listener.request_failed(link, message)
        elif type(message) is Preempted:
            self._listener.preempted(link, message)
        elif type(message) is Refused:
            link.heard.was_refused(message)
            log.warning("%s refused a message: %s %s", link.member.replica_id, message.code, message.detail)
        elif not link.heard.answered(message):
            log.warning("%s sent %s, which no gateway expects", link.member.replica_id, type(message).__name__)

    def _spawn(self, work: object) -> None:
        assert asyncio.iscoroutine(work)
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.error("a task of the pools failed", exc_info=error)
