"""Owns what decode knows of one attempt of one request, from its first message to its last block. Knows no socket and no tensor.

EXPECTED    StartDecode or Resume came; its prefill replica has not announced it
WAITING     announced as well: waits for blocks, in the order of announcement
GRANTED     holds blocks; waits for landing slots, then its handle is offered and KV lands
RUNNING     every message landed and verified, PrefillDone seen: its choices are in the batch
OVER        ended, everything returned
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from duomo.engine.prefix_digest import PrefixHash
from duomo.engine.sampler import RowSampling
from duomo.errors import DuomoError
from duomo.grammar.state import Grammar, GrammarState
from duomo.wire.messages import PrefillDone, Resume, StartDecode, WaveAnnounced
from duomo.wire.values import Handle, PeerAddress, Sampling, Timings
from services.decode.policy import DecodeLimits, WaitingLeg, blocks_for, promised_blocks, table_promise
from services.decode.routed_tokens import RoutedTokens
from services.kv_transfer.layout import MessageSpan

LegKey = tuple[str, int]  # (request id, attempt)


class LegState(Enum):
    """See the page's head."""

    EXPECTED = "expected"
    WAITING = "waiting"
    GRANTED = "granted"
    RUNNING = "running"
    OVER = "over"


@dataclass(slots=True, kw_only=True)
class LegTimes:
    """Moments of a leg on this process' monotonic clock; None until they happen. wall_offset_s turns one into Unix time."""

    started_s: float
    announced_s: float | None = None
    granted_s: float | None = None
    offered_s: float | None = None
    first_landed_s: float | None = None
    last_landed_s: float | None = None
    prefill_done_s: float | None = None
    first_step_s: float | None = None
    first_token_s: float | None = None
    first_batch_size: int = 0

    def ready_s(self) -> float:
        """When the KV was here and the first token known."""
        assert self.prefill_done_s is not None
        return max(self.prefill_done_s, self.last_landed_s if self.last_landed_s is not None else self.prefill_done_s)

    def landing_s(self) -> float:
        """From the first message to the last; 0 where fewer than two landed."""
        if self.first_landed_s is None or self.last_landed_s is None:
            return 0.0
        return self.last_landed_s - self.first_landed_s

    def first_token(self, step_started_s: float, now_s: float, peer_rtt_s: float, batch_size: int) -> Timings:
        """The leg's first token from here is written now: the parts of the time that led to it."""
        assert self.prefill_done_s is not None
        self.first_step_s, self.first_token_s, self.first_batch_size = step_started_s, now_s, batch_size
        return Timings(
            total_s=now_s - self.started_s,
            handoff_exposed_s=self.ready_s() - self.prefill_done_s,
            admit_s=step_started_s - self.ready_s(),
            first_step_s=now_s - step_started_s,
            peer_rtt_s=peer_rtt_s,
        )


@dataclass(slots=True, kw_only=True, eq=False)
class Choice:
    """One choice in the batch. table: its blocks, those shared with others first; num_kv: tokens whose KV is in them.

    next_token_id is fed at position num_kv by the next step. output_ids: every emitted token of the choice, over all attempts; `sampling`
    reads the same list. num_in_flight: steps planned and not applied, in the last of which it has this row: then next_token_id is not
    known, and the row's token is fed.
    """

    sequence_id: int
    leg: Leg
    number: int
    table: list[int]
    num_kv: int
    next_token_id: int
    output_ids: list[int]
    sampling: RowSampling
    promised_blocks: int
    num_in_flight: int = 0
    row: int = 0
    is_alive: bool = True

    @property
    def position(self) -> int:
        """Where the next step's token is fed."""
        return self.num_kv + self.num_in_flight


@dataclass(slots=True, kw_only=True, eq=False)
class Leg:
    """One attempt of one request. `gateway` is the boot id of who gets its tokens, `prefill` who sends its KV.

    failure: why it ended, where that is an error. silent_s: for how long we have looked and nothing of its KV came. num_refused: messages
    that lay wrong. blocks: held while the KV lands; they pass to the choices when the leg joins. cached_tokens: tokens whose KV was in
    them when they were granted, num_cached_blocks the blocks of those. prefix_hashes: of its tokens' full blocks, where the pool
    remembers prefixes; is_remembered: others find them in its blocks. promise_blocks: the whole promise while it lands. grammar: of a
    request with a constraint, once it is compiled.
    """

    leg_id: int
    request_id: str
    attempt: int
    gateway: str
    prefill: PeerAddress
    prompt_ids: tuple[int, ...]
    emitted_ids: tuple[int, ...]
    sampling: Sampling
    choice_numbers: tuple[int, ...]
    priority: int
    traceparent: str
    deadline_s: float
    is_protected: bool
    times: LegTimes
    cache_salt: str = ""
    state: LegState = LegState.EXPECTED
    announced: WaveAnnounced | None = None
    blocks: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    num_cached_blocks: int = 0
    prefix_hashes: tuple[PrefixHash, ...] = ()
    is_remembered: bool = False
    is_distrusted: bool = False
    promise_blocks: int = 0
    order: int = 0
    handle: Handle | None = None
    spans: tuple[MessageSpan, ...] = ()
    num_landing_blocks: int = 0
    landed: set[int] = field(default_factory=set)
    pulled: set[int] = field(default_factory=set)
    silent_s: float = 0.0
    landed_bytes: int = 0
    first_landed_bytes: int = 0
    num_refused: int = 0
    failure: DuomoError | None = None
    done: PrefillDone | None = None
    prompt_counts_LE: NDArray[np.integer] | None = None
    choices: dict[int, Choice] = field(default_factory=dict)
    cancelled_choices: set[int] = field(default_factory=set)
    num_decoded_tokens: int = 0
    num_preempted: int = 0
    routed: RoutedTokens = field(default_factory=RoutedTokens)
    grammar: Grammar | None = None

    @classmethod
    def of(cls, message: StartDecode | Resume, *, leg_id: int, gateway: str, now_s: float, max_preemptions: int) -> Leg:
        """A leg as its gateway describes it. A resume beyond max_preemptions attempts is protected from another preemption."""
        is_resume = isinstance(message, Resume)
        return cls(
            leg_id=leg_id,
            request_id=message.request_id,
            attempt=message.attempt,
            gateway=gateway,
            prefill=message.prefill,
            prompt_ids=message.prompt_ids,
            emitted_ids=message.emitted_ids if isinstance(message, Resume) else (),
            sampling=message.sampling,
            choice_numbers=(message.choice,) if isinstance(message, Resume) else message.choices,
            priority=message.priority,
            traceparent=message.traceparent,
            deadline_s=now_s + message.remaining_s,
            is_protected=is_resume and message.attempt >= max_preemptions,
            times=LegTimes(started_s=now_s),
            cache_salt=message.cache_salt,
        )

    @property
    def key(self) -> LegKey:
        return (self.request_id, self.attempt)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Prompt and emitted tokens."""
        return self.prompt_ids + self.emitted_ids

    @property
    def num_tokens(self) -> int:
        """Tokens whose KV prefill sends."""
        return len(self.prompt_ids) + len(self.emitted_ids)

    @property
    def max_new_tokens(self) -> int:
        """Tokens still to come, the first of them from prefill."""
        return max(1, self.sampling.max_tokens - len(self.emitted_ids))

    def may_join(self, now_s: float, delay_s: float) -> bool:
        """Whether what arrived may be sampled from: its grammar is compiled, and delay_s, slept on purpose, is over."""
        return (self.grammar is not None or self.sampling.constraint is None) and now_s >= self.times.ready_s() + delay_s

    def grammar_state(self) -> GrammarState | None:
        """Of one choice, at its grammar's start."""
        return None if self.grammar is None else self.grammar.state(self.sampling)

    @property
    def is_landed(self) -> bool:
        """Whether every message is in the blocks."""
        return self.handle is not None and len(self.landed) == len(self.spans)

    def waiting(self) -> WaitingLeg:
        """The leg as the policy sees it."""
        return WaitingLeg(
            leg_id=self.leg_id,
            num_tokens=self.num_tokens,
            max_new_tokens=self.max_new_tokens,
            num_choices=len(self.choice_numbers),
            is_protected=self.is_protected,
        )

    def forget_handoff(self) -> None:
        """Back to EXPECTED: the producer took its announcement back. Nothing is held any more."""
        assert not self.blocks and not self.choices
        self.state, self.announced, self.handle, self.done, self.prompt_counts_LE = LegState.EXPECTED, None, None, None, None
        self.spans, self.landed, self.pulled, self.landed_bytes, self.silent_s = (), set(), set(), 0, 0.0
        self.first_landed_bytes = self.num_refused = 0
        self.is_remembered = False
        self.times = LegTimes(started_s=self.times.started_s)

    def open_promise(self) -> int:
        """Blocks promised to this leg that it has not taken."""
        if self.state is LegState.GRANTED:
            return self.promise_blocks - len(self.blocks)
        return sum(max(0, choice.promised_blocks - len(choice.table)) for choice in self.choices.values())

    def num_promised(self, limits: DecodeLimits) -> int:
        return promised_blocks(self.waiting(), limits)

    def table_promise(self, limits: DecodeLimits) -> int:
        return table_promise(self.waiting(), limits)

    def num_prompt_blocks(self, limits: DecodeLimits) -> int:
        return blocks_for(self.num_tokens, limits.block_tokens)
