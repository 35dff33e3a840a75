"""Anthropic's messages as bytes: one object, or the events of a stream, and the error body. Knows no request and no socket."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from duomo.errors import DuomoError
from services.router.answers import AnswerHead, FinishedChoice, error_status
from services.router.generation import TextEmitted, Usage
from services.router.markup import CALL, OutputReader, OutputStyle
from services.router.output_parts import (
    CallArguments,
    CallBlock,
    CallOpened,
    OutputBlock,
    OutputPart,
    ReasoningBlock,
    ReasoningPart,
    blocks_of,
)

_json: Final = msgspec.json.Encoder().encode
_ERROR_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class MessageShape:
    """One answer, which has one choice. prompt_tokens is told at a stream's start; how many of them were cached is known at its end."""

    def __init__(self, head: AnswerHead, style: OutputStyle, prompt_tokens: int) -> None:
        self._head = head
        self._prompt_tokens = prompt_tokens
        self._style = style
        self._reader = OutputReader(style, "toolu_")
        self._open: type[OutputPart] | None = None
        self._num_blocks = 0
        self._stopped: dict[str, object] = {}

    def opening(self, choice: int) -> bytes:
        usage = _usage(Usage(self._prompt_tokens, 0, None))
        message = self._message([], {"stop_reason": None, "stop_sequence": None}, usage)
        return _event("message_start", {"message": message}) + _event("ping", {})

    def chunk(self, event: TextEmitted) -> bytes:
        written = b"".join(map(self._part, self._reader.push(event.text)))
        if event.finish_reason is not None:
            written += b"".join(map(self._part, self._reader.finish())) + self._close()
            self._stopped = _stopped(event.finish_reason, event.stop_string, self._reader.has_called)
        return written

    def ending(self, usage: Usage) -> bytes:
        return _event("message_delta", {"delta": self._stopped, "usage": _usage(usage)}) + _event("message_stop", {})

    def failure(self, error: DuomoError) -> bytes:
        return b"event: error\ndata: %s\n\n" % message_error(error_status(error), error.detail)

    def whole(self, choices: Sequence[FinishedChoice], usage: Usage) -> bytes:
        (choice,) = choices
        assert choice.finish_reason is not None, "a whole answer has ended"
        reader = OutputReader(self._style, "toolu_")
        blocks = [_shown(block) for block in blocks_of(reader.push("".join(choice.texts)) + reader.finish())]
        has_called = any(block["type"] == "tool_use" for block in blocks)
        return _json(self._message(blocks, _stopped(choice.finish_reason, choice.stop_string, has_called), _usage(usage)))

    def _message(self, content: list[dict[str, object]], stopped: dict[str, object], usage: dict[str, object]) -> dict[str, object]:
        head = {"id": self._head.answer_id, "type": "message", "role": "assistant", "model": self._head.model}
        return {**head, "content": content, **stopped, "usage": usage}

    def _part(self, part: OutputPart) -> bytes:
        """Its delta, in a block that is open or opened for it."""
        if isinstance(part, CallArguments):
            return self._delta({"type": "input_json_delta", "partial_json": part.text})
        if isinstance(part, CallOpened):
            return self._begin(part, {"type": "tool_use", "id": part.call_id, "name": part.name, "input": {}})
        if isinstance(part, ReasoningPart):
            begun = self._begin(part, {"type": "thinking", "thinking": "", "signature": ""}) if self._open is not ReasoningPart else b""
            return begun + self._delta({"type": "thinking_delta", "thinking": part.text})
        begun = self._begin(part, {"type": "text", "text": ""}) if self._open is not type(part) else b""
        return begun + self._delta({"type": "text_delta", "text": part.text})

    def _begin(self, part: OutputPart, block: dict[str, object]) -> bytes:
        closed = self._close()
        self._open = type(part)
        return closed + _event("content_block_start", {"index": self._num_blocks, "content_block": block})

    def _delta(self, delta: dict[str, object]) -> bytes:
        return _event("content_block_delta", {"index": self._num_blocks, "delta": delta})

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        self._open = None
        self._num_blocks += 1
        return _event("content_block_stop", {"index": self._num_blocks - 1})


def message_error(status: int, message: str) -> bytes:
    """Anthropic's error body."""
    kind = _ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return _json({"type": "error", "error": {"type": kind, "message": message}})


def _event(name: str, fields: dict[str, object]) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), _json({"type": name, **fields}))


def _stopped(finish_reason: str, stop_string: str | None, has_called: bool) -> dict[str, object]:
    if finish_reason == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if stop_string is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": stop_string}
    return {"stop_reason": "tool_use" if has_called else "end_turn", "stop_sequence": None}


def _usage(usage: Usage) -> dict[str, object]:
    """Anthropic counts what was read from a cache apart from the input."""
    cached = usage.cached_tokens or 0
    return {
        "input_tokens": usage.prompt_tokens - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage.completion_tokens,
    }


def _shown(block: OutputBlock) -> dict[str, object]:
    """A call whose arguments are no JSON object (cut off, or written wrong) has no `input` to show: it stays text."""
    if isinstance(block, ReasoningBlock):
        return {"type": "thinking", "thinking": block.text, "signature": ""}
    if not isinstance(block, CallBlock):
        return {"type": "text", "text": block.text}
    try:
        value: object = msgspec.json.decode(block.arguments)
    except (msgspec.DecodeError, RecursionError):
        value = None
    if isinstance(value, dict):
        return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": value}
    written = f'{CALL}\n{{"name": {_json(block.name).decode()}, "arguments": {block.arguments}'
    return {"type": "text", "text": written}
