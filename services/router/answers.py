"""OpenAI's answers: objects, stream chunks, usage, logprobs in both styles, and the error body, as bytes. Knows no request and no socket.

A chunk is one server-sent event. Chunks are joined from parts made once for each answer, since they are written for every token.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import msgspec

from duomo.errors import CapacityError, DeadlineError, DuomoError, RequestCancelled, RequestError
from duomo.wire.messages import FinishReason
from services.router.generation import EmittedPiece, TextEmitted, Usage
from services.router.text import ModelText

_json: Final = msgspec.json.Encoder().encode
DONE: Final = b"data: [DONE]\n\n"
_LOWEST_LOGPROB: Final = -9999.0  # JSON has no minus infinity; OpenAI's own floor


class AnswerShape(Protocol):
    """One endpoint's way of writing: stream chunks, or one object at the end."""

    def opening(self, choice: int) -> bytes: ...
    def chunk(self, event: TextEmitted) -> bytes: ...
    def usage_chunk(self, usage: Usage) -> bytes: ...
    def whole(self, choices: Sequence[FinishedChoice], usage: Usage) -> bytes: ...


@dataclass(slots=True)
class FinishedChoice:
    """A choice of an answer that is given in one piece."""

    number: int
    texts: list[str] = field(default_factory=list)
    pieces: list[EmittedPiece] = field(default_factory=list)
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerHead:
    """What every object of one answer begins with, and what it shows of its tokens."""

    answer_id: str
    model: str
    text: ModelText
    shows_logprobs: bool
    shows_token_ids: bool
    includes_usage: bool
    created_s: int = field(default_factory=lambda: int(time.time()))


class ChatShape:
    """chat.completion and chat.completion.chunk."""

    def __init__(self, head: AnswerHead) -> None:
        self._head = head
        self._chunk_head = _head(head, "chat.completion.chunk")
        self._tail = b',"usage":null}\n\n' if head.includes_usage else b"}\n\n"

    def opening(self, choice: int) -> bytes:
        """The first chunk of a choice: its role."""
        body = b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]' % choice
        return b'data: %s,"choices":[%s%s' % (self._chunk_head, body, self._tail)

    def chunk(self, event: TextEmitted) -> bytes:
        delta = b'{"content":%s}' % _json(event.text) if event.text or event.finish_reason is None else b"{}"
        finish = b"null" if event.finish_reason is None else b'"%s"' % event.finish_reason.encode()
        return b'data: %s,"choices":[{"index":%d,"delta":%s,"logprobs":%s,"finish_reason":%s%s}]%s' % (
            self._chunk_head,
            event.choice,
            delta,
            self._logprobs(event.pieces),
            finish,
            _token_ids(self._head, event.pieces),
            self._tail,
        )

    def usage_chunk(self, usage: Usage) -> bytes:
        return b'data: %s,"choices":[],"usage":%s}\n\n' % (self._chunk_head, _json(usage_object(usage)))

    def whole(self, choices: Sequence[FinishedChoice], usage: Usage) -> bytes:
        shown = b",".join(
            b'{"index":%d,"message":{"role":"assistant","content":%s,"refusal":null},"logprobs":%s,"finish_reason":%s%s}'
            % (
                choice.number,
                _json("".join(choice.texts)),
                self._logprobs(choice.pieces),
                _json(choice.finish_reason),
                _token_ids(self._head, choice.pieces),
            )
            for choice in choices
        )
        return b'%s,"choices":[%s],"usage":%s}' % (_head(self._head, "chat.completion"), shown, _json(usage_object(usage)))

    def _logprobs(self, pieces: Sequence[EmittedPiece]) -> bytes:
        if not self._head.shows_logprobs:
            return b"null"
        return _json({"content": [self._shown(piece) for piece in pieces if piece.logprob is not None], "refusal": None})

    def _shown(self, piece: EmittedPiece) -> dict[str, object]:
        assert piece.logprob is not None
        top = [self._entry(token_id, logprob) for token_id, logprob in piece.logprob.top]
        return self._entry(piece.token_id, piece.logprob.logprob) | {"top_logprobs": top}

    def _entry(self, token_id: int, logprob: float) -> dict[str, object]:
        raw = self._head.text.token_bytes(token_id)
        return {"token": raw.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(raw)}


class CompletionShape:
    """text_completion, streamed or whole. Offsets of logprobs count the characters shown, for each choice."""

    def __init__(self, head: AnswerHead) -> None:
        self._head = head
        self._object_head = _head(head, "text_completion")
        self._tail = b',"usage":null}\n\n' if head.includes_usage else b"}\n\n"
        self._offsets: dict[int, int] = {}

    def opening(self, choice: int) -> bytes:
        """Completions have no opening chunk."""
        return b""

    def chunk(self, event: TextEmitted) -> bytes:
        finish = b"null" if event.finish_reason is None else b'"%s"' % event.finish_reason.encode()
        return b'data: %s,"choices":[{"index":%d,"text":%s,"logprobs":%s,"finish_reason":%s%s}]%s' % (
            self._object_head,
            event.choice,
            _json(event.text),
            self._logprobs(event.choice, event.pieces),
            finish,
            _token_ids(self._head, event.pieces),
            self._tail,
        )

    def usage_chunk(self, usage: Usage) -> bytes:
        return b'data: %s,"choices":[],"usage":%s}\n\n' % (self._object_head, _json(usage_object(usage)))

    def whole(self, choices: Sequence[FinishedChoice], usage: Usage) -> bytes:
        shown = b",".join(
            b'{"index":%d,"text":%s,"logprobs":%s,"finish_reason":%s%s}'
            % (
                choice.number,
                _json("".join(choice.texts)),
                self._logprobs(choice.number, choice.pieces),
                _json(choice.finish_reason),
                _token_ids(self._head, choice.pieces),
            )
            for choice in choices
        )
        return b'%s,"choices":[%s],"usage":%s}' % (self._object_head, shown, _json(usage_object(usage)))

    def _logprobs(self, choice: int, pieces: Sequence[EmittedPiece]) -> bytes:
        if not self._head.shows_logprobs:
            return b"null"
        offset = self._offsets.get(choice, 0)
        tokens, values, tops, offsets = [], [], [], []
        for piece in pieces:
            if piece.logprob is None:
                continue
            name = self._name(piece.token_id)
            tokens.append(name)
            values.append(_finite(piece.logprob.logprob))
            ranked = {self._name(token_id): _finite(logprob) for token_id, logprob in piece.logprob.top}
            tops.append({name: values[-1]} | ranked)
            offsets.append(offset)
            offset += len(self._head.text.token_bytes(piece.token_id).decode("utf-8", "replace"))
        self._offsets[choice] = offset
        return _json({"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets})

    def _name(self, token_id: int) -> str:
        """The token's text; one that is no whole UTF-8 is spelled in bytes, as OpenAI does."""
        raw = self._head.text.token_bytes(token_id)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


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


def error_status(error: DuomoError) -> int:
    """The HTTP status of a fault: the client's own 4xx, 429/503 without room, 504 at the deadline, else 5xx by whether a retry helps."""
    if isinstance(error, RequestError):
        return error.status
    if isinstance(error, CapacityError):
        return 429 if error.code == "queue_full" else 503
    if isinstance(error, DeadlineError) or error.code == DeadlineError.default_code:
        return 504
    if isinstance(error, RequestCancelled):
        return 499
    return 503 if error.retryable else 500


def error_of(error: DuomoError) -> bytes:
    param = error.param if isinstance(error, RequestError) else None
    return error_body(error_status(error), error.detail, param, error.code)


def error_event(error: DuomoError) -> bytes:
    """A fault in the middle of a stream, and the stream's end."""
    return b"data: %s\n\n%s" % (error_of(error), DONE)


def _error_type(status: int) -> str:
    known = {429: "rate_limit_error", 503: "service_unavailable_error", 504: "timeout_error"}
    return known.get(status, "invalid_request_error" if status < 500 else "server_error")


def _head(head: AnswerHead, kind: str) -> bytes:
    """The object without its closing brace."""
    return _json({"id": head.answer_id, "object": kind, "created": head.created_s, "model": head.model})[:-1]


def _token_ids(head: AnswerHead, pieces: Sequence[EmittedPiece]) -> bytes:
    return b',"token_ids":%s' % _json([piece.token_id for piece in pieces]) if head.shows_token_ids else b""


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST_LOGPROB)
