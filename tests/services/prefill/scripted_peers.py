"""A decode replica and a gateway that do as they are told, on real sockets and a real transfer agent. Knows no prefill internals."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from duomo.config import DuomoConfig, TransferSection
from duomo.engine.blocks import BlockManager
from duomo.engine.kv_cache import KvCache, kv_spec
from duomo.errors import PeerError
from duomo.models.config import ModelConfig
from duomo.wire.connection import Connection, Identity, Listener, connect, new_boot_id
from duomo.wire.messages import (
    Cancel,
    GroupLanded,
    HandleOffered,
    Message,
    PullKv,
    ReplicaReport,
    RequestFailed,
    RequestFinished,
    Role,
    StartPrefill,
    TokensEmitted,
    TransferFenced,
    WaveAnnounced,
)
from duomo.wire.values import EmittedToken, Handle, PeerAddress, Sampling
from services.kv_transfer.agent import TransferAgent
from services.kv_transfer.layout import MessageSpan, messages
from services.kv_transfer.transport import Transport

GREEDY = Sampling(max_tokens=8, temperature=0.0, ignore_eos=True)
WAIT_S = 20.0
LOOK_S = 0.005


def identity(role: Role, model: ModelConfig, address: str = "") -> Identity:
    boot_id = new_boot_id()
    return Identity(
        replica_id=f"{role}-{boot_id[:4]}", boot_id=boot_id, role=role, model_fingerprint=model.fingerprint, address=address, secret=""
    )


@dataclass(slots=True)
class Inbox:
    """What came, in order, with a way to wait for it."""

    messages: list[Message] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, message: Message) -> None:
        self.messages.append(message)
        self.changed.set()

    def of(self, kind: type[Message], request_id: str | None = None) -> list[Message]:
        return [
            one for one in self.messages if isinstance(one, kind) and (request_id is None or getattr(one, "request_id", None) == request_id)
        ]

    async def until(self, check: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
        async with asyncio.timeout(timeout_s):
            while not check():
                self.changed.clear()
                await self.changed.wait()

    async def one(self, kind: type[Message], request_id: str) -> Message:
        await self.until(lambda: bool(self.of(kind, request_id)))
        return self.of(kind, request_id)[0]


def kv_bytes(cache: KvCache, table: list[int], num_tokens: int) -> bytes:
    """The KV of a sequence's tokens; what lies behind them in the last block is nobody's and left out."""
    blocks = cache.tensor[:, table].clone()
    blocks[:, -1, :, :, num_tokens - (len(table) - 1) * cache.spec.block_tokens :] = 0
    return bytes(blocks.numpy().tobytes())


class ScriptedDecode:
    """Grants, lands and verifies; may be told to do less.

    is_granting, is_draining: whether announcements are granted and slots are read; corrupts come from the transport's fault plan and are
    pulled once. tables: blocks of each request in `cache`.
    """

    def __init__(self, model: ModelConfig, config: DuomoConfig, transport: Transport, num_blocks: int = 512) -> None:
        self.identity = identity("decode", model, f"unix:{config.run_dir}/d-{new_boot_id()[:6]}.sock")
        section: TransferSection = config.kv_transfer
        self.agent = TransferAgent(self.identity.boot_id, transport, section)
        self.cache = KvCache(kv_spec(model, config.model.block_tokens), num_blocks)
        self.blocks = BlockManager(num_blocks, config.model.block_tokens)
        self.inbox = Inbox()
        self.is_granting = True
        self.is_draining = True
        self.num_ring_slots = 8
        self.first_block = 0
        self.tables: dict[str, list[int]] = {}
        self.spans: dict[int, tuple[MessageSpan, ...]] = {}
        self.landed: dict[int, list[int]] = {}
        self.open: dict[int, str] = {}
        self.pulls = 0
        self.connections: list[Connection] = []
        self._slot_bytes = section.slot_bytes
        self._handle_ids = itertools.count(1)
        self._waiting: list[tuple[Connection, WaveAnnounced]] = []
        self._listener = Listener(self.identity.address, self.identity, config.wire, self._serve)
        self._task: asyncio.Task[None] | None = None

    @property
    def address(self) -> PeerAddress:
        return PeerAddress(replica_id=self.identity.replica_id, boot_id=self.identity.boot_id, address=self._listener.address)

    async def start(self) -> None:
        await self._listener.start()
        self._task = asyncio.create_task(self._poll())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._listener.close()
        self.agent.close()

    def kv(self, request_id: str, num_tokens: int) -> bytes:
        """All layers of the request's first num_tokens tokens."""
        return kv_bytes(self.cache, self.tables[request_id], num_tokens)

    def is_complete(self, request_id: str) -> bool:
        return any(self.open.get(handle) == request_id and len(self.landed[handle]) == len(self.spans[handle]) for handle in self.open)

    def pump(self) -> None:
        """Grant what waits."""
        while self.is_granting and self._waiting:
            connection, message = self._waiting[0]
            if not self._grant(connection, message):
                return
            self._waiting.pop(0)

    async def _serve(self, connection: Connection) -> None:
        self.connections.append(connection)
        connection.post(self.agent.open_ring(connection.peer.boot_id, self.num_ring_slots))
        with contextlib.suppress(PeerError):
            while True:
                message = await connection.receive()
                if isinstance(message, WaveAnnounced):
                    self._waiting.append((connection, message))
                    self.pump()
                elif isinstance(message, TransferFenced):
                    self.agent.fence(message.handle_id)
                elif isinstance(message, Cancel):
                    self.abort(message.request_id)
                self.inbox.add(message)

    def abort(self, request_id: str) -> None:
        self._waiting = [(peer, one) for peer, one in self._waiting if one.request_id != request_id]
        for handle_id in [handle_id for handle_id, owner in self.open.items() if owner == request_id]:
            self.agent.abort(handle_id)
            del self.open[handle_id]

    def _grant(self, connection: Connection, message: WaveAnnounced) -> bool:
        producer = connection.peer.boot_id
        num_blocks = self.blocks.num_blocks_for(message.num_tokens)
        spans = messages(range(self.first_block, num_blocks), message.group_bounds, self.cache.spec.block_bytes, self._slot_bytes)
        slots = self.agent.grant(producer, len(spans))
        if slots is None:
            return False
        table = self.blocks.allocate(num_blocks)
        assert table is not None
        self.tables[message.request_id] = table
        handle = Handle(
            handle_id=next(self._handle_ids),
            producer_boot_id=producer,
            consumer_boot_id=self.identity.boot_id,
            model_fingerprint=self.identity.model_fingerprint,
            request_id=message.request_id,
            attempt=message.attempt,
            ring_name=self.agent.ring_name(producer),
            slots=slots,
            num_tokens=message.num_tokens,
            num_blocks=num_blocks,
            first_block=self.first_block,
        )
        self.spans[handle.handle_id], self.landed[handle.handle_id] = spans, []
        self.open[handle.handle_id] = message.request_id
        self.agent.expect(handle, spans)
        connection.post(
            HandleOffered(request_id=message.request_id, attempt=message.attempt, traceparent="", remaining_s=9.0, handle=handle)
        )
        return True

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(0.001)
            for landed in self.agent.poll() if self.is_draining else ():
                request_id = self.open.get(landed.handle_id)
                if request_id is None:
                    continue
                span = landed.span
                if landed.error is not None:
                    self.pulls += 1
                    self._post(
                        PullKv(
                            request_id=request_id,
                            attempt=0,
                            traceparent="",
                            remaining_s=9.0,
                            handle_id=landed.handle_id,
                            group=span.group,
                            message_idx=span.message_idx,
                        )
                    )
                    continue
                table = self.tables[request_id]
                self.cache.scatter(span.layers, table[span.block_lo : span.block_hi], landed.payload)
                self.agent.release(landed.handle_id, span.message_idx)
                self.landed[landed.handle_id].append(span.message_idx)
                self._post(
                    GroupLanded(
                        request_id=request_id,
                        attempt=0,
                        traceparent="",
                        remaining_s=9.0,
                        handle_id=landed.handle_id,
                        group=span.group,
                        message_idx=span.message_idx,
                    )
                )
                self.inbox.changed.set()
            self.pump()

    def _post(self, message: Message) -> None:
        with contextlib.suppress(PeerError):
            self.connections[-1].post(message)


class ScriptedGateway:
    """Sends StartPrefill and Cancel to one replica, keeps what comes."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.inbox = Inbox()
        self.reports: list[ReplicaReport] = []
        self._task = asyncio.create_task(self._read())

    @staticmethod
    async def dial(address: str, model: ModelConfig, config: DuomoConfig) -> ScriptedGateway:
        return ScriptedGateway(await connect(address, identity("gateway", model), config.wire))

    async def close(self) -> None:
        await self.connection.close()
        await asyncio.gather(self._task, return_exceptions=True)

    def start(self, request_id: str, prompt_ids: tuple[int, ...], decode: PeerAddress, **changes: object) -> None:
        fields: dict[str, object] = {
            "attempt": 0,
            "traceparent": "",
            "remaining_s": 100.0,
            "sampling": GREEDY,
            "choices": (0,),
        } | changes
        self.connection.post(StartPrefill(request_id=request_id, prompt_ids=prompt_ids, decode=decode, **fields))  # type: ignore[arg-type]  # changes are StartPrefill's fields

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        self.connection.post(Cancel(request_id=request_id, attempt=0, traceparent="", remaining_s=1.0, reason="client_left", choice=choice))

    def tokens(self, request_id: str) -> list[EmittedToken]:
        frames = [one for one in self.inbox.messages if isinstance(one, TokensEmitted)]
        return [token for frame in frames for token in frame.tokens if token.request_id == request_id]

    async def finished(self, request_id: str) -> RequestFinished:
        """Waits for the leg's good end; a failure instead fails the test with its reason."""
        await self.inbox.until(lambda: bool(self.inbox.of(RequestFinished, request_id) or self.inbox.of(RequestFailed, request_id)))
        assert not self.inbox.of(RequestFailed, request_id), self.inbox.of(RequestFailed, request_id)
        message = self.inbox.of(RequestFinished, request_id)[0]
        assert isinstance(message, RequestFinished)
        return message

    async def failed(self, request_id: str) -> RequestFailed:
        message = await self.inbox.one(RequestFailed, request_id)
        assert isinstance(message, RequestFailed)
        return message

    async def _read(self) -> None:
        with contextlib.suppress(PeerError):
            while True:
                message = await self.connection.receive()
                if isinstance(message, ReplicaReport):
                    self.reports.append(message)
                else:
                    self.inbox.add(message)


async def until(check: Callable[[], bool], what: str, timeout_s: float = WAIT_S) -> None:
    """Poll an outside condition. timeout_s: in looks, so that a machine that stands still between two of them spends one."""
    for _ in range(round(timeout_s / LOOK_S)):
        if check():
            return
        await asyncio.sleep(LOOK_S)
    assert check(), what
