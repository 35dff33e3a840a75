"""A prefill and a decode pool that speak the real wire and compute nothing: real sockets, real messages, plausible tokens, scripted faults.

Token `index` of choice `choice` is a pure function of the two, so that a test knows what a client must see whatever went wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from duomo.config import DuomoConfig
from duomo.errors import PeerError
from duomo.wire.connection import Connection, Identity, Listener, new_boot_id
from duomo.wire.histogram import packed
from duomo.wire.messages import (
    CachesFlushed,
    Cancel,
    Drain,
    FlushCaches,
    Message,
    Preempted,
    ReplicaReport,
    RequestFailed,
    RequestFinished,
    Resume,
    StartDecode,
    StartPrefill,
    TokensEmitted,
    Undrain,
)
from duomo.wire.values import EmittedToken, Timings, TokenLogprob
from services.kv_transfer.directory import Directory, Member
from services.router.text import ModelText
from tests.services.router.stub_scores import scored_frames

MODEL = Path(__file__).parents[3] / "models" / "tiny-moe"
STORY = "Once upon a time there was a naïve fox 🦊 who liked tea. The fox said: “Hello, little bird!” and they were friends. "
BLOCK_TOKENS = 16

Fault = Literal["die", "fail", "fail_for_good", "no_grant", "unreachable", "draining", "preempt", "hold"]


@dataclass
class Script:
    """What goes wrong: faults are used up in order, one for each leg that starts. decode faults strike after `at` tokens of the leg.

    failing: replicas that fail every leg, in failing_phase.
    """

    prefill_faults: deque[Fault | None] = field(default_factory=deque)
    decode_faults: deque[tuple[Fault | None, int]] = field(default_factory=deque)
    prefill_s: float = 0.0
    step_s: float = 0.0
    duplicates_frames: bool = False
    reorders_frames: bool = False
    prefill_finishes: bool = True
    cached_tokens: int = 0
    eos_at: int | None = None
    failing: set[str] = field(default_factory=set)
    failing_phase: str = "prefill.compute"
    choice_logprobs: tuple[float, ...] = ()  # of every token of each choice; else -0.5
    score_frames: int | None = None  # so many frames of a prompt's log-probabilities are sent; None: all
    fails_scored: int = 0  # so many legs fail behind them


class Story:
    """The tokens that every stub emits: one without end, told by each choice from another place, or what it is told to say, and EOS."""

    def __init__(self, text: ModelText, told: str | None = None) -> None:
        self._text = text
        self.tell(told)

    def tell(self, told: str | None) -> None:
        """From now on; None: the story without end."""
        self.ids = self._text.encode(told or STORY, add_special_tokens=False)
        self.end = None if told is None else len(self.ids)

    def token(self, choice: int, index: int) -> int:
        return self.ids[(index + (7 * choice if self.end is None else 0)) % len(self.ids)]

    def text(self, choice: int, num_tokens: int) -> str:
        detokenizer = self._text.detokenizer()
        shown = [detokenizer.push(self.token(choice, index)) for index in range(num_tokens)]
        return "".join(shown) + detokenizer.finish()


class StubPools:
    """Replicas of both roles in this process. P tells D by `computed` that a prompt's KV is there, in place of a transfer.

    go_on: once set, legs that a "hold" stopped run to their end. What has to happen meanwhile has no race to win.
    """

    def __init__(self, script: Script, story: Story, fingerprint: str, folder: Path, num_blocks: int = 4096) -> None:
        self.script = script
        self.story = story
        self.fingerprint = fingerprint
        self.folder = folder
        self.num_blocks = num_blocks
        self.computed: dict[tuple[str, int], asyncio.Event] = {}
        self.go_on = asyncio.Event()
        self.replicas: list[StubReplica] = []

    def kv(self, request_id: str, attempt: int) -> asyncio.Event:
        return self.computed.setdefault((request_id, attempt), asyncio.Event())

    def of_role(self, role: str) -> list[StubReplica]:
        return [replica for replica in self.replicas if replica.role == role]

    async def add(self, role: Literal["prefill", "decode"], directory: Directory) -> StubReplica:
        replica = StubReplica(self, role, f"{role}-{len(self.replicas)}")
        await replica.start()
        await directory.register(replica.member)
        self.replicas.append(replica)
        return replica

    async def close(self) -> None:
        for replica in self.replicas:
            await replica.die()


class StubReplica:
    """One replica. seen: every message it got."""

    def __init__(self, pools: StubPools, role: Literal["prefill", "decode"], replica_id: str) -> None:
        self.pools = pools
        self.role = role
        self.boot_id = new_boot_id()
        self.replica_id = replica_id
        self.seen: list[Message] = []
        self.used_blocks = 0
        self.expert_tokens_LE = np.zeros((2, 4), np.int64)
        self.num_running = 0
        self.max_running = 0
        self.is_draining = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._legs: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._ended_choices: set[tuple[str, int, int]] = set()
        address = f"unix:{pools.folder}/{replica_id}.sock"
        identity = Identity(replica_id=replica_id, boot_id=self.boot_id, role=role, model_fingerprint=pools.fingerprint, address=address)
        self._listener = Listener(address, identity, DuomoConfig.model_validate({"model": {"path": "."}}).wire, self._serve)

    @property
    def member(self) -> Member:
        return Member(
            replica_id=self.replica_id,
            boot_id=self.boot_id,
            role=self.role,
            address=self._listener.address,
            model_fingerprint=self.pools.fingerprint,
            model_name=MODEL.name,
        )

    def of_type(self, kind: type) -> list:
        return [message for message in self.seen if type(message) is kind]

    @property
    def seen_starts(self) -> list[StartPrefill | StartDecode | Resume]:
        """Legs that it was given."""
        return [message for message in self.seen if isinstance(message, StartPrefill | StartDecode | Resume)]

    async def start(self) -> None:
        await self._listener.start()

    async def die(self) -> None:
        """As a killed process: every socket closes, nothing more is said."""
        for task in [*self._tasks, *self._legs.values()]:
            task.cancel()
        await self._listener.close()

    async def _serve(self, connection: Connection) -> None:
        reporter = asyncio.create_task(self._report(connection))
        self._tasks.add(reporter)
        try:
            while True:
                message = await connection.receive()
                self.seen.append(message)
                if isinstance(message, StartPrefill):
                    self._begin(message, self._prefill(connection, message))
                elif isinstance(message, StartDecode | Resume):
                    self._begin(message, self._decode(connection, message))
                elif isinstance(message, Cancel):
                    self._cancel(message)
                elif isinstance(message, Drain | Undrain):
                    self.is_draining = isinstance(message, Drain)
                elif isinstance(message, FlushCaches):
                    connection.post(CachesFlushed(flush_id=message.flush_id, num_blocks=9))
        finally:
            reporter.cancel()
            for leg in self._legs.values():
                leg.cancel()

    def _begin(self, message: StartPrefill | StartDecode | Resume, work: Awaitable[None]) -> None:
        self._legs[(message.request_id, message.attempt)] = asyncio.create_task(self._guard(work))

    async def _guard(self, work: Awaitable[None]) -> None:
        with contextlib.suppress(PeerError):
            await work

    def _cancel(self, message: Cancel) -> None:
        if message.choice is not None:
            self._ended_choices.add((message.request_id, message.attempt, message.choice))
            return
        for (request_id, attempt), leg in self._legs.items():
            if request_id == message.request_id and attempt <= message.attempt:
                leg.cancel()

    async def _report(self, connection: Connection) -> None:
        while not connection.closed:
            with contextlib.suppress(PeerError):
                connection.post(self.report())
            await asyncio.sleep(0.05)

    def report(self) -> ReplicaReport:
        return ReplicaReport(
            replica_id=self.replica_id,
            boot_id=self.boot_id,
            role=self.role,
            is_draining=self.is_draining,
            num_running=self.num_running,
            num_queued=0,
            num_queued_tokens=0,
            num_blocks=self.pools.num_blocks,
            num_free_blocks=self.pools.num_blocks - self.used_blocks,
            num_cached_blocks=0,
            num_slots=8,
            num_free_slots=8,
            num_quarantined_slots=0,
            num_open_handles=0,
            num_open_spans=0,
            num_steps=0,
            block_tokens=BLOCK_TOKENS,
            prefix_digests=(2**64 - 1, 5) if self.role == "prefill" else (),
            experts=packed(self.expert_tokens_LE),
        )

    async def _prefill(self, connection: Connection, start: StartPrefill) -> None:
        script = self.pools.script
        fault = script.prefill_faults.popleft() if script.prefill_faults else None
        if fault == "hold":
            await self.pools.go_on.wait()
            fault = None
        await asyncio.sleep(script.prefill_s)
        if self.replica_id in script.failing:
            connection.post(_failed(start, "fail", script.failing_phase))
            return
        if fault == "die":
            self._tasks.add(asyncio.create_task(self.die()))
            return
        if fault is not None:
            self.is_draining |= fault == "draining"
            connection.post(_failed(start, fault))
            return
        for frame in list(scored_frames(start))[: script.score_frames]:
            connection.post(frame)
        if script.fails_scored:
            script.fails_scored -= 1
            connection.post(_failed(start, "fail"))
            return
        index = len(start.emitted_ids)
        timings = Timings(total_s=script.prefill_s, queue_s=0.0, compute_s=script.prefill_s)
        tokens = tuple(self._token(start, choice, index, timings) for choice in start.choices)
        connection.post(TokensEmitted(tokens=tokens))
        if script.prefill_finishes:
            connection.post(RequestFinished(**_about(start), cached_tokens=script.cached_tokens, timings=timings))
        self.pools.kv(start.request_id, start.attempt).set()

    async def _decode(self, connection: Connection, start: StartDecode | Resume) -> None:
        script = self.pools.script
        fault, at = script.decode_faults.popleft() if script.decode_faults else (None, 0)
        choices = (start.choice,) if isinstance(start, Resume) else start.choices
        if self.replica_id in script.failing:
            connection.post(_failed(start, "fail", script.failing_phase))
            return
        first = len(start.emitted_ids) + 1 if isinstance(start, Resume) else 1
        await self.pools.kv(start.request_id, start.attempt).wait()
        with self._holding(start, len(choices)):
            live = [choice for choice in choices if self._token(start, choice, first - 1, None).finish_reason is None]
            index = first
            late: list[EmittedToken] = []
            while live:
                if fault == "hold" and index - first == at:
                    await self.pools.go_on.wait()
                    fault = None
                if fault is not None and index - first == at:
                    if self._strike(connection, start, fault, live[0], index):
                        return
                    fault = None
                await asyncio.sleep(script.step_s)
                live = [choice for choice in live if (start.request_id, start.attempt, choice) not in self._ended_choices]
                tokens = [self._token(start, choice, index, Timings(total_s=0.0) if index == first else None) for choice in live]
                late = self._emit(connection, tokens, late)
                live = [token.choice for token in tokens if token.finish_reason is None]
                index += 1
            self._emit(connection, [], late)
        connection.post(RequestFinished(**_about(start), cached_tokens=0, timings=Timings(total_s=0.0)))

    def _strike(self, connection: Connection, start: StartDecode | Resume, fault: Fault, choice: int, index: int) -> bool:
        """True where the leg is over."""
        if fault == "die":
            self._tasks.add(asyncio.create_task(self.die()))
        elif fault == "preempt":
            connection.post(Preempted(**_about(start), choice=choice, num_emitted=index, reason="blocks"))
            self._ended_choices.add((start.request_id, start.attempt, choice))
            return isinstance(start, Resume) or len(start.choices) == 1
        else:
            connection.post(_failed(start, fault, "decode.stream"))
        return True

    def _emit(self, connection: Connection, tokens: list[EmittedToken], late: list[EmittedToken]) -> list[EmittedToken]:
        """Post the step's tokens, then those held back before; returns what is held back now."""
        script = self.pools.script
        if script.reorders_frames and tokens and tokens[0].index % 3 == 1:
            return tokens + late
        for frame in (tokens, late):
            for _ in range(2 if script.duplicates_frames else 1):
                if frame:
                    connection.post(TokensEmitted(tokens=tuple(frame)))
        return []

    def _token(self, start: StartPrefill | StartDecode | Resume, choice: int, index: int, timings: Timings | None) -> EmittedToken:
        sampling = start.sampling
        token_id = self.pools.story.token(choice, index)
        is_last = index + 1 >= sampling.max_tokens
        is_eos = index in (self.pools.script.eos_at, self.pools.story.end) and not sampling.ignore_eos
        finish = "stop" if is_eos or token_id in sampling.stop_token_ids else ("length" if is_last else None)
        logprob = None
        if sampling.logprobs is not None:
            value = self.pools.script.choice_logprobs[choice] if self.pools.script.choice_logprobs else -0.5
            logprob = TokenLogprob(logprob=value, top=tuple((token_id + rank, -0.5 - rank) for rank in range(sampling.logprobs)))
        return EmittedToken(
            request_id=start.request_id,
            choice=choice,
            attempt=start.attempt,
            index=index,
            token_id=2 if is_eos else token_id,
            logprob=logprob,
            finish_reason=finish,
            timings=timings,
        )

    @contextlib.contextmanager
    def _holding(self, start: StartDecode | Resume, num_choices: int) -> Iterator[None]:
        num_blocks = -(-(len(start.prompt_ids) + start.sampling.max_tokens) // BLOCK_TOKENS) * num_choices
        self.used_blocks += num_blocks
        self.num_running += 1
        self.max_running = max(self.max_running, self.num_running)
        try:
            yield
        finally:
            self.used_blocks -= num_blocks
            self.num_running -= 1


def _about(start: StartPrefill | StartDecode | Resume) -> dict:
    return {"request_id": start.request_id, "attempt": start.attempt, "traceparent": "", "remaining_s": start.remaining_s}


def _failed(start: StartPrefill | StartDecode | Resume, fault: Fault, phase: str = "prefill.compute") -> RequestFailed:
    if fault == "no_grant":
        return RequestFailed(**_about(start), code="no_grant", phase="kv.handoff", retryable=True, detail="no grant came in time")
    if fault == "unreachable":
        return RequestFailed(**_about(start), code="unreachable", phase="kv.handoff", retryable=True, detail="decode refuses connections")
    if fault == "draining":
        return RequestFailed(**_about(start), code="draining", phase="prefill.queue", retryable=True, detail="the stub drains")
    retryable = fault != "fail_for_good"
    return RequestFailed(**_about(start), code="engine_failed", phase=phase, retryable=retryable, detail="the stub was told to fail")
