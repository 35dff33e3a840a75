"""What the answers of all endpoints are made of: their common head, usage, and OpenAI's error body. Knows no request and no socket.

How each endpoint writes: chat_answers.py, completion_answers.py.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import msgspec

from duomo.errors import CapacityError, DeadlineError, DuomoError, RequestCancelled, RequestError
from duomo.grammar.library import BAD_CONSTRAINT, UNSUPPORTED
from duomo.grammar.state import NOT_KEPT
from duomo.wire.values import FinishReason
from services.router.generation import EmittedPiece, TextEmitted, Usage
from services.router.text import ModelText

_json: Final = msgspec.json.Encoder().encode
DONE: Final = b"data: [DONE]\n\n"


class AnswerShape(Protocol):
    """One endpoint's way of writing: a stream of server-sent events, or one object at the end.

    opening: what stands before a choice's first event; ending: after the last event of all; failure: instead of it.
    """

    def opening(self, choice: int) -> bytes: ...
    def chunk(self, event: TextEmitted) -> bytes: ...
    def ending(self, usage: Usage) -> bytes: ...
    def failure(self, error: DuomoError) -> bytes: ...
    def whole(self, choices: Sequence[FinishedChoice], usage: Usage) -> bytes: ...


@dataclass(slots=True)
class FinishedChoice:
    """A choice of an answer that is given in one piece."""

    number: int
    texts: list[str] = field(default_factory=list)
    pieces: list[EmittedPiece] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_string: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerHead:
    """What every object of one answer begins with, and what it shows of its tokens.

    counted_prompts: each prompt's tokens, where every chunk has the usage so far; else empty.
    """

    answer_id: str
    model: str
    text: ModelText
    shows_logprobs: bool
    shows_token_ids: bool
    includes_usage: bool
    counted_prompts: tuple[int, ...] = ()
    created_s: int = field(default_factory=lambda: int(time.time()))


class ChunkEnds:
    """How the chunks of OpenAI's older streams end: with no usage, with null where it comes at the end, or with the choice's own so far.

    num_choices: of each prompt.
    """

    def __init__(self, head: AnswerHead, num_choices: int) -> None:
        self._num_choices = num_choices
        self._prompts = head.counted_prompts
        self._num_tokens = [0] * (len(self._prompts) * num_choices)
        self.plain = b',"usage":null}\n\n' if head.includes_usage else b"}\n\n"

    @property
    def counts(self) -> bool:
        """Whether chunks differ in their ends."""
        return bool(self._prompts)

    def after(self, choice: int, num_tokens: int) -> bytes:
        """Of the choice's next chunk, which shows so many more tokens."""
        if not self._prompts:
            return self.plain
        self._num_tokens[choice] += num_tokens
        usage = Usage(self._prompts[choice // self._num_choices], self._num_tokens[choice], None)
        return b',"usage":%s}\n\n' % _json(usage_object(usage))


def usage_object(usage: Usage) -> dict[str, object]:
    details = None if usage.cached_tokens is None else {"cached_tokens": usage.cached_tokens}
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": details,
    }


def error_body(status: int, message: str, param: str | None, code: str | None) -> bytes:
    """OpenAI's error body: what every refusal carries."""
    return _json({"error": {"message": message, "type": _error_type(status), "param": param, "code": code}})


# What a replica found wrong with the request itself, which the gateway could not see.
_TOO_MUCH: Final = ("queue_full", "queue_timeout", "too_late")  # 503 is for what is missing or broken
_CLIENTS_FAULTS: Final = (RequestError.default_code, BAD_CONSTRAINT, UNSUPPORTED, NOT_KEPT)


def error_status(error: DuomoError) -> int:
    """The HTTP status of a fault: the client's own 4xx, 429/503 without room, 408 at the deadline, else 5xx by whether a retry helps.

    408 and not 504: the client or the operator set the time, and no upstream is at fault (Envoy and Portkey answer so).
    """
    if isinstance(error, RequestError):
        return error.status
    if error.code in _CLIENTS_FAULTS:
        return 400
    if isinstance(error, CapacityError):
        return 429 if error.code in _TOO_MUCH else 503
    if isinstance(error, DeadlineError) or error.code == DeadlineError.default_code:
        return 408
    if isinstance(error, RequestCancelled):
        return 499
    return 503 if error.retryable else 500


def error_of(error: DuomoError) -> bytes:
    param = error.param if isinstance(error, RequestError) else None
    return error_body(error_status(error), error.detail, param, error.code)


def usage_end(head: bytes, includes_usage: bool, usage: Usage) -> bytes:
    """The end of OpenAI's older streams: a chunk with the usage where it was asked for, and the mark."""
    return (b'data: %s,"choices":[],"usage":%s}\n\n' % (head, _json(usage_object(usage))) if includes_usage else b"") + DONE


def error_event(error: DuomoError) -> bytes:
    """A fault in the middle of such a stream, and its end."""
    return b"data: %s\n\n%s" % (error_of(error), DONE)


def _error_type(status: int) -> str:
    known = {408: "timeout_error", 429: "rate_limit_error", 503: "service_unavailable_error"}
    return known.get(status, "invalid_request_error" if status < 500 else "server_error")


def object_head(head: AnswerHead, kind: str) -> bytes:
    """The object without its closing brace."""
    return _json({"id": head.answer_id, "object": kind, "created": head.created_s, "model": head.model})[:-1]


def token_ids_of(head: AnswerHead, pieces: Sequence[EmittedPiece]) -> bytes:
    return b',"token_ids":%s' % _json([piece.token_id for piece in pieces]) if head.shows_token_ids else b""
