"""A prefill replica that does as told: real sockets, a real transfer agent, the real engine. Knows no decode internals."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from duomo.config import DuomoConfig
from duomo.engine.batch import PromptSlice, StepBatch
from duomo.engine.blocks import BlockManager
from duomo.engine.kv_cache import KvCache, kv_spec
from duomo.engine.monolith import GenerateRequest, generate
from duomo.engine.runner import ModelRunner
from duomo.engine.sampler import RowSampling, Sampler, ending_ids
from duomo.errors import PeerError
from duomo.grammar.cache import compiled
from duomo.models.qwen3_moe import Model, load_model
from duomo.wire.connection import Connection, Identity, connect, new_boot_id
from duomo.wire.histogram import packed
from duomo.wire.messages import (
    Cancel,
    GroupLanded,
    HandleOffered,
    Message,
    PrefillDone,
    PullKv,
    RequestFailed,
    RingOffered,
    Role,
    TransferFenced,
    WaveAnnounced,
)
from duomo.wire.values import ExpertHistogram, Handle, PeerAddress, Sampling
from services.kv_transfer.agent import PushJob, TransferAgent
from services.kv_transfer.layout import MessageSpan, messages
from services.kv_transfer.transport_loopback import LoopbackHub

Kind = TypeVar("Kind", bound=Message)

MODEL_DIR = Path(__file__).parents[3] / "models" / "tiny-moe"
BLOCK_TOKENS = 16
WAIT_S = 30.0
LOOK_S = 0.003
GREEDY = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)
GROUP_BOUNDS = (0, 2, 4, 6, 8)


@functools.cache
def model() -> Model:
    torch.set_num_threads(1)  # two threads that spin for each other stand still on a busy machine
    return load_model(MODEL_DIR)


def ids(num_tokens: int, seed: int = 1) -> tuple[int, ...]:
    """A made-up prompt."""
    return tuple((seed * 7919 + place * 31 + place * place) % 8000 + 10 for place in range(num_tokens))


@functools.cache
def expected(prompt_ids: tuple[int, ...], sampling: Sampling = GREEDY, choice: int = 0) -> list[int]:
    """What the monolith generates."""
    of_model = (MODEL_DIR / "tokenizer.json", model().config.vocab, model().config.eos_ids)
    grammar = compiled(of_model, sampling.constraint) if sampling.constraint is not None else None
    request = GenerateRequest(prompt_ids=prompt_ids, sampling=sampling, choice=choice, grammar=grammar)
    return [token.token_id for token in generate(model(), [request])[0]]


def with_max(sampling: Sampling, max_tokens: int, stop_token_ids: tuple[int, ...] = ()) -> Sampling:
    """The same with another length."""
    return Sampling(max_tokens=max_tokens, temperature=sampling.temperature, ignore_eos=sampling.ignore_eos, stop_token_ids=stop_token_ids)


async def until(check: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
    """timeout_s: in looks, so that a machine that stands still between two of them spends one. Raises TimeoutError."""
    for _ in range(round(timeout_s / LOOK_S)):
        if check():
            return
        await asyncio.sleep(LOOK_S)
    raise TimeoutError(f"not within {timeout_s:g} s")


class Peer:
    """One end of a socket to D: everything that came, in order."""

    def __init__(self, role: Role, config: DuomoConfig) -> None:
        boot_id = new_boot_id()
        self.config = config
        self.identity = Identity(
            replica_id=f"{role}-{boot_id[:4]}",
            boot_id=boot_id,
            role=role,
            model_fingerprint=model().config.fingerprint,
            address="",
            secret="",
        )
        self.connection: Connection | None = None
        self.inbox: list[Message] = []
        self._reader: asyncio.Task[None] | None = None

    @property
    def address(self) -> PeerAddress:
        return PeerAddress(replica_id=self.identity.replica_id, boot_id=self.identity.boot_id, address="unix:/nowhere")

    async def connect(self, address: str) -> None:
        self.connection = await connect(address, self.identity, self.config.wire)
        self._reader = asyncio.create_task(self._read(self.connection))

    async def close(self) -> None:
        if self.connection is not None:
            await self.connection.close()
        if self._reader is not None:
            await asyncio.gather(self._reader, return_exceptions=True)

    def post(self, message: Message) -> None:
        assert self.connection is not None
        self.connection.post(message)

    def of(self, kind: type[Kind], request_id: str | None = None) -> list[Kind]:
        return [
            one for one in self.inbox if isinstance(one, kind) and (request_id is None or getattr(one, "request_id", None) == request_id)
        ]

    async def one(self, kind: type[Kind], request_id: str | None = None) -> Kind:
        await until(lambda: bool(self.of(kind, request_id)))
        return self.of(kind, request_id)[0]

    async def _read(self, connection: Connection) -> None:
        with contextlib.suppress(PeerError):
            while True:
                message = await connection.receive()
                self.inbox.append(message)
                self.take(message)

    def take(self, message: Message) -> None:
        """What a subclass does with a message."""


@dataclass
class Prompt:
    """A prompt that the scripted prefill serves. token_ids: prompt and emitted."""

    request_id: str
    attempt: int
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    choices: tuple[int, ...] = (0,)
    emitted_ids: tuple[int, ...] = ()

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.prompt_ids + self.emitted_ids


@dataclass
class Computed:
    """KV in the scripted prefill's cache, and the first token of every choice."""

    blocks: list[int]
    first_token_ids: tuple[int, ...]
    experts: ExpertHistogram


class ScriptedPrefill(Peer):
    """Computes a prompt by the engine and pushes its KV through a real agent."""

    def __init__(self, config: DuomoConfig, hub: LoopbackHub) -> None:
        super().__init__("prefill", config)
        self.agent = TransferAgent(self.identity.boot_id, hub.agent(self.identity.boot_id), config.kv_transfer, num_send_slots=8)
        self.cache = KvCache(kv_spec(model().config, BLOCK_TOKENS), 256)
        self.blocks = BlockManager(256, BLOCK_TOKENS, max_cached_blocks=0)
        self.runner = ModelRunner(model(), self.cache)
        self.ring = asyncio.Event()
        self.handles: dict[tuple[str, int], Handle] = {}
        self.consumer = ""
        self.spans: dict[int, tuple[MessageSpan, ...]] = {}
        self.tables: dict[int, list[int]] = {}
        self.answers_pulls = True

    def take(self, message: Message) -> None:
        assert self.connection is not None
        self.consumer = self.connection.peer.boot_id
        match message:
            case RingOffered():
                self.agent.attach_ring(self.consumer, message)
                self.ring.set()
            case HandleOffered():
                self.handles[message.request_id, message.attempt] = message.handle
            case GroupLanded():
                self.agent.credit(message.handle_id, message.message_idx)
            case PullKv() if self.answers_pulls:
                self.push(message.handle_id, message.message_idx)
            case Cancel() | RequestFailed():
                handle = self.handles.get((message.request_id, message.attempt))
                if handle is not None:
                    asyncio.get_running_loop().create_task(self.fence(handle))

    async def fence(self, handle: Handle) -> None:
        await asyncio.wrap_future(self.agent.cancel(handle.handle_id))
        self.post(
            TransferFenced(
                request_id=handle.request_id, attempt=handle.attempt, traceparent="", remaining_s=0.0, handle_id=handle.handle_id
            )
        )

    def announce(self, prompt: Prompt, num_tokens: int | None = None) -> None:
        self.post(
            WaveAnnounced(
                request_id=prompt.request_id,
                attempt=prompt.attempt,
                traceparent="",
                remaining_s=60.0,
                wave_id=1,
                num_tokens=len(prompt.token_ids) if num_tokens is None else num_tokens,
                group_bounds=GROUP_BOUNDS,
            )
        )

    async def granted(self, prompt: Prompt) -> Handle:
        await until(lambda: (prompt.request_id, prompt.attempt) in self.handles)
        return self.handles[prompt.request_id, prompt.attempt]

    def compute(self, prompt: Prompt) -> Computed:
        table = self.blocks.allocate(-(-len(prompt.token_ids) // BLOCK_TOKENS))
        assert table is not None
        batch = StepBatch(slices=(PromptSlice(token_ids=prompt.token_ids, start=0, block_table=table),))
        state, logits_SV = self.runner.run(batch)
        ends = ending_ids(prompt.sampling, model().config.eos_ids)
        rows = [
            RowSampling(
                sampling=prompt.sampling,
                choice=choice,
                prompt_ids=prompt.prompt_ids,
                output_ids=list(prompt.emitted_ids),
                ending_ids=ends,
            )
            for choice in prompt.choices
        ]
        sampled = Sampler().sample(logits_SV.expand(len(rows), -1), rows)
        return Computed(table, tuple(token.token_id for token in sampled), packed(state.expert_counts[0].numpy().astype("int32")))

    def open(self, handle: Handle, computed: Computed) -> tuple[MessageSpan, ...]:
        to_send = range(handle.first_block, handle.num_blocks)
        spans = messages(to_send, GROUP_BOUNDS, self.cache.spec.block_bytes, self.config.kv_transfer.slot_bytes)
        self.spans[handle.handle_id], self.tables[handle.handle_id] = spans, computed.blocks
        return spans

    def push(self, handle_id: int, message_idx: int) -> None:
        span = self.spans[handle_id][message_idx]
        handle = next(handle for handle in self.handles.values() if handle.handle_id == handle_id)
        table = self.tables[handle_id][span.block_lo : span.block_hi]

        def fill(out: memoryview) -> None:
            self.cache.pack(span.layers, table, out)

        future = self.agent.push(PushJob(handle=handle, span=span, fill=fill))
        future.add_done_callback(lambda done: done.exception())

    def done(self, prompt: Prompt, handle: Handle, computed: Computed, ended: tuple[int, ...] = ()) -> None:
        self.post(
            PrefillDone(
                request_id=prompt.request_id,
                attempt=prompt.attempt,
                traceparent="",
                remaining_s=60.0,
                handle_id=handle.handle_id,
                num_messages=len(self.spans[handle.handle_id]),
                first_token_ids=computed.first_token_ids,
                ended_choices=ended,
                cached_tokens=0,
                expert_histogram=computed.experts,
            )
        )

    async def send(self, prompt: Prompt) -> tuple[Handle, Computed]:
        """P's part but for PrefillDone: announce, compute, push."""
        self.announce(prompt)
        handle = await self.granted(prompt)
        computed = self.compute(prompt)
        for span in self.open(handle, computed):
            self.push(handle.handle_id, span.message_idx)
        return handle, computed

    async def prefill(self, prompt: Prompt) -> Computed:
        """The whole of P's part: announce, compute, push, done. Returns once D released every message."""
        handle, computed = await self.send(prompt)
        self.done(prompt, handle, computed)
        await until(
            lambda: (
                len([one for one in self.of(GroupLanded, prompt.request_id) if one.handle_id == handle.handle_id])
                == len(self.spans[handle.handle_id])
                or bool(self.of(Cancel, prompt.request_id) or self.of(RequestFailed, prompt.request_id))
            )
        )
        self.blocks.free(computed.blocks)
        return computed

    async def close(self) -> None:
        await super().close()
        self.agent.close()


def resumed(prompt: Prompt, emitted_ids: list[int], choice: int = 0) -> Prompt:
    """The next attempt of one choice."""
    return replace(prompt, attempt=prompt.attempt + 1, emitted_ids=tuple(emitted_ids), choices=(choice,))
