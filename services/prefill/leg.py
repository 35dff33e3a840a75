"""Owns the state of one leg: one attempt of one request on this prefill replica. Knows no plan, no tensor and no socket's life.

A leg moves QUEUED -> ANNOUNCED -> GRANTED -> COMPUTING -> HANDING_OFF and is over at any point (finished, failed, cancelled). What it
holds (KV blocks, a handle) is given back when it is over and neither the step thread nor the writer thread can touch it any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from duomo.engine.prefix_digest import PrefixHash
from duomo.engine.sampler import RowSampling, ending_ids
from duomo.grammar.state import Grammar
from duomo.telemetry.tracing import Span, Tracing
from duomo.wire.connection import Connection
from duomo.wire.messages import PullKv, StartPrefill
from duomo.wire.values import Handle, Timings
from services.kv_transfer.layout import MessageSpan
from services.prefill.snapshot import Key, PromptView
from services.prefill.worker import WaveRow


class Stage(StrEnum):
    """How far a leg is."""

    QUEUED = "queued"
    ANNOUNCED = "announced"
    GRANTED = "granted"
    COMPUTING = "computing"
    HANDING_OFF = "handing_off"


@dataclass(slots=True, kw_only=True, eq=False)
class Handoff:
    """A granted handle and its messages. unlanded: messages that D has not released; num_in_flight: pushes that are not terminal.

    begun: groups whose messages the writer was given before they were computed.
    """

    handle: Handle
    spans: tuple[MessageSpan, ...]
    unlanded: set[int]
    pushed: set[int] = field(default_factory=set)
    begun: set[int] = field(default_factory=set)
    pulls: list[PullKv] = field(default_factory=list)
    num_in_flight: int = 0
    is_abandoned: bool = False
    is_terminal: bool = False


@dataclass(slots=True, kw_only=True, eq=False)
class Leg:
    """One attempt. Allocated by PrefillService; everything in it is freed through it.

    token_ids: prompt and emitted tokens. blocks: this leg's block table in the KV cache. is_in_wave: the step thread may write them.
    grammar: of a request with a constraint, before it may join a wave. prefix_hashes: of its blocks that the prefix cache may have.
    """

    request: StartPrefill
    gateway: Connection
    token_ids: tuple[int, ...]
    num_blocks: int
    received_s: float
    deadline_s: float
    queue_span: Span
    grammar: Grammar | None = None
    stage: Stage = Stage.QUEUED
    is_over: bool = False
    is_in_wave: bool = False
    announced_s: float | None = None
    handoff: Handoff | None = None
    blocks: tuple[int, ...] = ()
    cached_tokens: int = 0
    prefix_hashes: tuple[PrefixHash, ...] = ()
    compute_span: Span | None = None
    started_s: float = 0.0
    computed_s: float = 0.0
    sampled_s: float = 0.0
    cancelled_choices: set[int] = field(default_factory=set)
    has_only_ended_choices: bool = False
    is_finished: bool = False
    lease_timer: asyncio.TimerHandle | None = None
    deadline_timer: asyncio.TimerHandle | None = None
    view: PromptView = field(init=False)

    def __post_init__(self) -> None:
        self.view = self.look(is_reachable=False)

    @property
    def key(self) -> Key:
        return (self.request.request_id, self.request.attempt)

    @property
    def is_announced(self) -> bool:
        """Whether D has heard of this leg."""
        return self.announced_s is not None

    def look(self, *, is_reachable: bool) -> PromptView:
        """What the policy sees; call after every change of stage before COMPUTING."""
        self.view = PromptView(
            key=self.key,
            peer=self.request.decode.boot_id,
            num_tokens=len(self.token_ids),
            num_blocks=self.num_blocks,
            priority=self.request.priority,
            arrived_s=self.received_s,
            deadline_s=self.deadline_s,
            is_reachable=is_reachable,
            announced_s=self.announced_s,
            is_granted=self.stage is Stage.GRANTED,
        )
        return self.view

    @property
    def is_scored(self) -> bool:
        """Whether the prompt's own log-probabilities were asked for."""
        return self.request.sampling.prompt_logprobs is not None

    def wave_row(self) -> WaveRow:
        """What the step thread computes for this leg."""
        return WaveRow(token_ids=self.token_ids, start=self.cached_tokens, block_table=self.blocks)

    def choice_rows(self, eos_ids: Sequence[int]) -> list[RowSampling]:
        """How the next token of each choice is sampled; emitted tokens are output tokens."""
        request = self.request
        ends = ending_ids(request.sampling, eos_ids)
        return [
            RowSampling(
                sampling=request.sampling,
                choice=choice,
                prompt_ids=request.prompt_ids,
                output_ids=request.emitted_ids,
                ending_ids=ends,
                grammar=None if self.grammar is None else self.grammar.state(request.sampling),
            )
            for choice in request.choices
        ]

    def start_computing(self, wave_id: int, now_s: float, tracing: Tracing) -> None:
        """The leg's wave runs its first group now."""
        self.stage, self.is_in_wave, self.started_s = Stage.COMPUTING, True, now_s
        self.queue_span.set({"duomo.wave": wave_id})
        self.queue_span.end(at_s=now_s)
        attributes = {"duomo.wave": wave_id, "duomo.prompt_tokens": len(self.token_ids), "duomo.cached_tokens": self.cached_tokens}
        self.compute_span = tracing.start_span("prefill.compute", self.request.traceparent, attributes, start_s=now_s)

    def end_spans(self, at_s: float) -> None:
        """End whatever span is still open; a second end does nothing."""
        self.queue_span.end(at_s=at_s)
        if self.compute_span is not None:
            self.compute_span.end(at_s=at_s)

    def timings(self, now_s: float) -> Timings:
        """The parts of this leg up to now."""
        return Timings(
            total_s=now_s - self.received_s,
            queue_s=self.started_s - self.received_s if self.started_s else 0.0,
            compute_s=self.computed_s - self.started_s if self.computed_s else 0.0,
            sample_s=self.sampled_s - self.computed_s if self.sampled_s else 0.0,
        )

    def remaining_s(self, now_s: float) -> float:
        return max(self.deadline_s - now_s, 0.0)
