"""One request in flight: what each choice has emitted, in order and once, and the legs that serve it. Knows no socket and no policy.

A leg is one attempt of some choices on one pair (P, D). Tokens carry (wire id, attempt, choice, index); those of a void attempt are
dropped, early ones wait for their turn, repeated ones are dropped, so the client sees every index once and in order.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal

from duomo.errors import DuomoError, PeerError
from duomo.telemetry.parts import Rtts
from duomo.telemetry.tracing import Span
from duomo.wire.values import EmittedToken, FinishReason, PromptLogprobs, Timings
from services.router.generation import (
    EmittedPiece,
    EventSink,
    GenerationEnded,
    GenerationFailed,
    GenerationRequest,
    PromptScoresKnown,
    TextEmitted,
    Usage,
)
from services.router.pools import ReplicaLink
from services.router.sent_since import Sent
from services.router.text import Detokenizer, StopScanner

_NO_PIECES: Final[tuple[EmittedPiece, ...]] = ()

Taken = Literal["taken", "early", "repeated", "contradicted", "late"]


class Choice:
    """One answer of a request, as far as it has come. needs_cancel: a stop string ended it, and D has not been told."""

    __slots__ = ("detokenizer", "early", "emitted", "has_ended", "needs_cancel", "leg", "number", "num_resumes", "scanner")

    def __init__(self, number: int, detokenizer: Detokenizer, stops: tuple[str, ...]) -> None:
        self.number = number
        self.emitted: list[int] = []
        self.early: dict[int, EmittedToken] = {}
        self.leg: Leg | None = None
        self.num_resumes = 0
        self.has_ended = False
        self.needs_cancel = False
        self.detokenizer = detokenizer
        self.scanner = StopScanner(stops) if stops else None


@dataclass(slots=True, eq=False, kw_only=True)
class Leg:
    """One attempt. on_prefill, on_decode: what it takes there, in the books of both. has_first_token: P answered; has_landed: D emitted,
    so P's death no longer matters; *_is_over: that side said so."""

    flight: Flight
    wire_id: str
    attempt: int
    choices: tuple[Choice, ...]
    prefill: ReplicaLink
    decode: ReplicaLink
    on_prefill: Sent
    on_decode: Sent
    has_first_token: bool = False
    has_landed: bool = False
    prefill_is_over: bool = False
    decode_is_over: bool = False


@dataclass(slots=True)
class Milestones:
    """Moments of one request on the gateway's monotonic clock, and what the legs reported; the parts of TTFT come from these."""

    sent_s: float = 0.0
    first_received_s: float = 0.0
    first_delivered_s: float = 0.0
    second_received_s: float = 0.0
    second_delivered_s: float = 0.0
    last_s: float = 0.0
    prefill_timings: Timings | None = None
    decode_timings: Timings | None = None
    reason: str = ""
    decode_reason: str = ""
    known_tokens: int = 0
    num_retries: int = 0
    num_resumes: int = 0
    rtts: Rtts = Rtts()


@dataclass(slots=True, eq=False)
class Flight:
    """One request from submit to its end. The service owns it; `on_over` is called exactly once when it ends, however it ends.

    digests: of the prompt's blocks, once it is to be placed. num_failed: attempts that failed before any token. lost: the keys of
    replicas that died under it.
    """

    request: GenerationRequest
    sink: EventSink
    choices: tuple[Choice, ...]
    span: Span
    on_over: Callable[[Flight, DuomoError | None], None]
    legs: set[Leg] = field(default_factory=set)
    milestones: Milestones = field(default_factory=Milestones)
    cached_tokens: int | None = None
    next_attempt: int = 0
    digests: tuple[int, ...] | None = None
    num_failed: int = 0
    lost: set[str] = field(default_factory=set)
    is_over: bool = False
    error: DuomoError | None = None
    timer: asyncio.TimerHandle | None = None

    def take(self, choice: Choice, token: EmittedToken) -> Taken:
        """Apply one token of the choice's current attempt; with it, early ones that now have their turn."""
        if choice.has_ended:
            return "late"
        emitted = choice.emitted
        if token.index != len(emitted):
            return self._out_of_turn(choice, token)
        self._accept(choice, token)
        while choice.early and not choice.has_ended:
            following = choice.early.pop(len(emitted), None)
            if following is None:
                break
            self._accept(choice, following)
        return "taken"

    def take_scores(self, attempt: int, scores: PromptLogprobs) -> None:
        """The prompt's own next log-probabilities. What was told whole is not told again. Raises WireError for what is not the next."""
        scored = self.request.scored
        if scored is not None and not scored.is_whole and not self.is_over:
            scored.take(attempt, scores)
            if scored.is_whole:
                self.sink.deliver(PromptScoresKnown(scored))

    def fail(self, error: DuomoError) -> None:
        """End without (the rest of) an answer."""
        if not self.is_over:
            self._end(error)
            self.sink.deliver(GenerationFailed(error))

    def num_completion_tokens(self) -> int:
        return sum(len(choice.emitted) for choice in self.choices)

    def _out_of_turn(self, choice: Choice, token: EmittedToken) -> Taken:
        if token.index > len(choice.emitted):
            if token.index < self.request.sampling.max_tokens:
                choice.early.setdefault(token.index, token)
            return "early"
        return "repeated" if choice.emitted[token.index] == token.token_id else "contradicted"

    def _accept(self, choice: Choice, token: EmittedToken) -> None:
        if self.request.scored is not None and not self.request.scored.is_whole:
            detail = "A first token came before all of the prompt's log-probabilities."
            self.fail(PeerError(detail, code="scores_lost", phase="prefill.compute", retryable=False))
            return
        if self.request.is_prompt_only:
            self._accept_prompt(choice)
            return
        choice.emitted.append(token.token_id)
        finish = token.finish_reason
        # The token that ends a choice with "stop" (EOS or a stop id) is no part of the text.
        text = "" if finish == "stop" else choice.detokenizer.push(token.token_id)
        if finish is not None:
            text += choice.detokenizer.finish()
        if choice.scanner is not None:
            text, finish = self._scan(choice, choice.scanner, text, finish)
        pieces = (EmittedPiece(token.token_id, token.logprob),) if self.sink.wants_pieces else _NO_PIECES
        stop_string = choice.scanner.found if choice.scanner is not None else None
        self._deliver(choice, TextEmitted(self.request.first_choice + choice.number, text, pieces, finish, stop_string))

    def _accept_prompt(self, choice: Choice) -> None:
        """Its first token says that the prompt is computed: that is all that was asked, and the token is dropped."""
        self._deliver(choice, TextEmitted(self.request.first_choice + choice.number, "", _NO_PIECES, "length"))

    def _deliver(self, choice: Choice, event: TextEmitted) -> None:
        milestones = self.milestones
        self.sink.deliver(event)
        if not milestones.first_delivered_s:
            milestones.first_delivered_s = time.monotonic()
        elif not milestones.second_delivered_s:
            milestones.second_delivered_s = time.monotonic()
        if event.finish_reason is not None:
            choice.has_ended = True
            choice.early.clear()
            if all(other.has_ended for other in self.choices):
                self._finish()

    def _scan(self, choice: Choice, scanner: StopScanner, text: str, finish: FinishReason | None) -> tuple[str, FinishReason | None]:
        if len(choice.emitted) <= self.request.sampling.min_tokens:
            return text, finish
        text, has_stopped = scanner.push(text)
        if has_stopped:
            choice.needs_cancel = finish is None
            return text, "stop"
        return (text + scanner.release(), finish) if finish is not None else (text, None)

    def _finish(self) -> None:
        usage = Usage(len(self.request.prompt_ids), self.num_completion_tokens(), self.cached_tokens)
        self._end(None)
        self.sink.deliver(GenerationEnded(usage))

    def _end(self, error: DuomoError | None) -> None:
        self.is_over = True
        self.error = error
        self.milestones.last_s = time.monotonic()
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        self.on_over(self, error)
        for choice in self.choices:
            choice.leg = None  # a ring through this flight, which would hold the prompt until the collector's next full run
