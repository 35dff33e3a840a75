"""The nouns between the REST edge and the two pools: a generation request and the events it yields. Knows no HTTP and no socket."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import msgspec

from duomo.errors import DuomoError
from duomo.wire.values import FinishReason, Sampling, TokenLogprob
from services.router.scored_prompt import ScoredPrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One prompt and its choices, checked and tokenised.

    received_s, deadline_s: on the gateway's monotonic clock. tokenize_s: seconds spent rendering and tokenising.
    first_choice: number of choice 0 in the client's answer (several prompts of one call count on).
    traceparent: the client's W3C context, "" without one. cache_salt: only requests of the same one find each other's prompts.
    is_prompt_only: nothing is to be generated; `sampling` asks for the one token that prefill always gives, and nobody sees it.
    priority: higher goes first. session: requests of the same one go to the same replicas where nothing speaks against it; "": none.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    num_choices: int
    stop: tuple[str, ...]
    received_s: float
    deadline_s: float
    tokenize_s: float = 0.0
    first_choice: int = 0
    traceparent: str = ""
    cache_salt: str = ""
    priority: int = 0
    session: str = ""
    endpoint: str = "chat"
    scored: ScoredPrompt | None = None
    is_prompt_only: bool = False


@dataclass(frozen=True, slots=True)
class EmittedPiece:
    """One token as the client sees it: its id and, where asked, its probability."""

    token_id: int
    logprob: TokenLogprob | None


class TextEmitted(msgspec.Struct, frozen=True, gc=False):
    """New text of one choice and the tokens it came from; text may be empty while bytes or a stop string are held back.

    pieces is empty where neither logprobs nor token ids were asked for. stop_string: the one that ended the choice, if one did. A Struct,
    because one is made for every token: a frozen dataclass is slow to make.
    """

    choice: int
    text: str
    pieces: tuple[EmittedPiece, ...]
    finish_reason: FinishReason | None = None
    stop_string: str | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request; cached_tokens is None where the prefill leg has not said it."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None


@dataclass(frozen=True, slots=True)
class PromptScoresKnown:
    """All of the prompt's own log-probabilities are there, before any TextEmitted of it: whoever takes the event has them written."""

    scored: ScoredPrompt


@dataclass(frozen=True, slots=True)
class GenerationEnded:
    """Every choice has ended."""

    usage: Usage


@dataclass(frozen=True, slots=True)
class GenerationFailed:
    """The request is over without an answer, or in the middle of one."""

    error: DuomoError


GenerationEvent = PromptScoresKnown | TextEmitted | GenerationEnded | GenerationFailed


class EventSink(Protocol):
    """Who takes a request's events. Called on the loop, never blocks; `wants_pieces` asks for token ids and logprobs.

    first_sent_s, second_sent_s: when the first and second event reached the client's socket, 0 where they have not (yet).
    """

    wants_pieces: bool
    first_sent_s: float
    second_sent_s: float

    def deliver(self, event: GenerationEvent) -> None: ...
    def leave(self, why: str) -> None:
        """Nobody waits for the answer any more."""
