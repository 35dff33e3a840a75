"""Owns a prefill and a decode replica that speak the real wire and compute nothing: a process of its own for `duomo bench gateway`.

Both register in the directory as any replica does, so that any gateway of that model finds them. Prefill answers at once; decode makes one
step for all its streams every step_s: one frame to each gateway. What was served and when goes into a ledger (stub_ledger.py).
Knows no gateway and no figure.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Final, Literal

import uvloop

from bench.serve.stub_ledger import StubLedger, answer_bench
from bench.serve.stub_story import StubStory
from duomo.config import ModelSection, WireSection
from duomo.errors import PeerError
from duomo.wire.connection import Connection, Identity, Listener, new_boot_id
from duomo.wire.messages import Cancel, ReplicaReport, RequestFinished, Resume, StartDecode, StartPrefill, TokensEmitted
from duomo.wire.values import EmittedToken, Timings
from services.kv_transfer.directory import Directory, Member
from services.router.model_card import read_model_card

Role = Literal["prefill", "decode"]
REPORT_PERIOD_S: Final = 0.1
LEASE_S: Final = 30.0
_BLOCK_TOKENS: Final = 16
_NUM_BLOCKS: Final = 1 << 20


@dataclass(frozen=True, kw_only=True)
class StubOptions:
    """Where the stub registers, what model it claims to serve, how long its steps are."""

    redis_url: str
    model: Path
    step_s: float
    folder: Path


class _Leg:
    """One request on the decode side: who hears of it, and the next token's index."""

    __slots__ = ("connection", "index", "start")

    def __init__(self, connection: Connection, start: StartDecode) -> None:
        self.connection = connection
        self.start = start
        self.index = 1


class StubEngine:
    """Both replicas. The fixed points of its times: a start read off the socket, an encoded frame about to be written."""

    def __init__(self, options: StubOptions) -> None:
        self.options = options
        self.story = StubStory(options.model)
        self.fingerprint = read_model_card(ModelSection(path=options.model)).fingerprint
        self.ledger = StubLedger()
        self._num_frames = 0
        self._expected: dict[str, _Leg] = {}
        self._computed: set[str] = set()
        self._live: dict[str, _Leg] = {}

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Registered and listening while the block runs."""
        directory = Directory(self.options.redis_url, LEASE_S)
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(directory.close)
            for role in ("prefill", "decode"):
                replica = _Replica(self, role)
                await stack.enter_async_context(replica.listener)
                await directory.register(replica.member)
                stack.push_async_callback(directory.remove, replica.member)
                keeping = asyncio.create_task(_keep(directory, replica.member))
                stack.callback(keeping.cancel)
            stepping = asyncio.create_task(self._step())
            stack.callback(stepping.cancel)
            yield

    def begin_prefill(self, connection: Connection, start: StartPrefill) -> None:
        """The first token at once, and this leg is over."""
        seed = start.sampling.seed
        self.ledger.begin(seed, connection.received_s, len(start.prompt_ids))
        token = self._token(start, 0, Timings(total_s=0.0))
        connection.post(TokensEmitted(tokens=(token,)))
        connection.post(_finished(start))
        self.ledger.sent(seed, time.monotonic())
        connection.flush()
        self._computed.add(start.request_id)
        self._join(start.request_id)

    def begin_decode(self, connection: Connection, start: StartDecode) -> None:
        self._expected[start.request_id] = _Leg(connection, start)
        self._join(start.request_id)

    def cancel(self, request_id: str) -> None:
        self._expected.pop(request_id, None)
        self._live.pop(request_id, None)

    def lost(self, connection: Connection) -> None:
        self._live = {name: leg for name, leg in self._live.items() if leg.connection is not connection}
        self._expected = {name: leg for name, leg in self._expected.items() if leg.connection is not connection}

    def report(self, replica_id: str, boot_id: str, role: Role) -> ReplicaReport:
        return ReplicaReport(
            replica_id=replica_id,
            boot_id=boot_id,
            role=role,
            is_draining=False,
            num_running=len(self._live),
            num_queued=0,
            num_queued_tokens=0,
            num_blocks=_NUM_BLOCKS,
            num_free_blocks=_NUM_BLOCKS,
            num_cached_blocks=0,
            num_slots=8,
            num_free_slots=8,
            num_quarantined_slots=0,
            num_open_handles=0,
            num_open_spans=0,
            num_steps=self._num_frames,
            block_tokens=_BLOCK_TOKENS,
        )

    def _join(self, request_id: str) -> None:
        """Its prompt is computed and decode expects it: it runs from the next step on."""
        if request_id in self._computed and request_id in self._expected:
            self._computed.discard(request_id)
            leg = self._expected.pop(request_id)
            if leg.start.sampling.max_tokens > 1:
                self._live[request_id] = leg
            else:
                self._finish(leg)

    async def _step(self) -> None:
        """A token of every stream each step_s, by a clock that does not drift."""
        due_s = time.monotonic()
        while True:
            due_s = max(due_s + self.options.step_s, time.monotonic() - self.options.step_s)
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            by_gateway: dict[Connection, list[_Leg]] = {}
            for leg in self._live.values():
                by_gateway.setdefault(leg.connection, []).append(leg)
            for connection, legs in by_gateway.items():
                with contextlib.suppress(PeerError):  # lost() follows
                    self._emit(connection, legs)

    def _emit(self, connection: Connection, legs: list[_Leg]) -> None:
        tokens = tuple([self._token(leg.start, leg.index, Timings(total_s=0.0) if leg.index == 1 else None) for leg in legs])
        connection.post(TokensEmitted(tokens=tokens))
        sent_s = time.monotonic()
        connection.flush()
        self._num_frames += 1
        for leg in legs:
            sampling = leg.start.sampling
            self.ledger.sent(sampling.seed, sent_s)
            leg.index += 1
            if leg.index == sampling.max_tokens:
                del self._live[leg.start.request_id]
                self._finish(leg)

    def _finish(self, leg: _Leg) -> None:
        self.ledger.end(leg.start.sampling.seed)
        leg.connection.post(_finished(leg.start))

    def _token(self, start: StartPrefill | StartDecode, index: int, timings: Timings | None) -> EmittedToken:
        return EmittedToken(
            request_id=start.request_id,
            choice=start.choices[0],
            attempt=start.attempt,
            index=index,
            token_id=self.story.token(start.sampling.seed, index),
            finish_reason="length" if index + 1 == start.sampling.max_tokens else None,
            timings=timings,
        )


class _Replica:
    """One role's door."""

    def __init__(self, engine: StubEngine, role: Role) -> None:
        self._engine = engine
        self._role = role
        self._replica_id, self._boot_id = f"stub-{role}", new_boot_id()
        address = f"unix:{engine.options.folder}/{self._replica_id}.sock"
        identity = Identity(
            replica_id=self._replica_id, boot_id=self._boot_id, role=role, model_fingerprint=engine.fingerprint, address=address
        )
        self.listener = Listener(address, identity, WireSection(), self._serve)

    @property
    def member(self) -> Member:
        return Member(
            replica_id=self._replica_id,
            boot_id=self._boot_id,
            role=self._role,
            address=self.listener.address,
            model_fingerprint=self._engine.fingerprint,
            model_name=self._engine.options.model.name,
        )

    async def _serve(self, connection: Connection) -> None:
        reporting = asyncio.create_task(self._report(connection))
        try:
            while True:
                message = await connection.receive()
                if isinstance(message, StartPrefill):
                    self._engine.begin_prefill(connection, message)
                elif isinstance(message, StartDecode):
                    self._engine.begin_decode(connection, message)
                elif isinstance(message, Cancel):
                    self._engine.cancel(message.request_id)
                elif isinstance(message, Resume):
                    raise SystemExit("the stub loses nothing, so a gateway that resumes is at fault")
        finally:
            reporting.cancel()
            self._engine.lost(connection)

    async def _report(self, connection: Connection) -> None:
        while not connection.closed:
            connection.post(self._engine.report(self._replica_id, self._boot_id, self._role))
            await asyncio.sleep(REPORT_PERIOD_S)


async def _keep(directory: Directory, member: Member) -> None:
    while True:
        await asyncio.sleep(LEASE_S / 3)
        await directory.register(member)


def _finished(start: StartPrefill | StartDecode) -> RequestFinished:
    return RequestFinished(
        request_id=start.request_id,
        attempt=start.attempt,
        traceparent="",
        remaining_s=start.remaining_s,
        cached_tokens=0,
        timings=Timings(total_s=0.0),
    )


def run_stub(options: StubOptions, pipe: Pipe) -> None:
    """The process, until the bench asks it to stop or is gone."""

    async def main() -> None:
        engine = StubEngine(options)
        async with engine.serving():
            await answer_bench(pipe, engine.ledger)

    uvloop.run(main())
