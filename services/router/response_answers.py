"""OpenAI's responses as bytes: one object, or the events of a stream. Knows no request and no socket."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from duomo.errors import DuomoError
from services.router.answers import AnswerHead, FinishedChoice, error_status
from services.router.generation import TextEmitted, Usage
from services.router.markup import OutputReader, OutputStyle
from services.router.output_parts import CallArguments, CallOpened, OutputPart, ReasoningPart

_json: Final = msgspec.json.Encoder().encode
_PART_OF: Final = {"message": "output_text", "reasoning": "reasoning_text"}


class ResponseShape:
    """One answer, streamed or whole; it has one choice. Items are numbered and named when they begin, and kept until the end."""

    def __init__(self, head: AnswerHead, style: OutputStyle, echo: Mapping[str, object]) -> None:
        self._head = head
        self._echo = echo
        self._reader = OutputReader(style)
        self._items: list[dict[str, object]] = []
        self._text = ""  # of the item that is open
        self._is_open = False
        self._num_events = 0
        self._reasoning_tokens = 0
        self._status = "in_progress"

    def opening(self, choice: int) -> bytes:
        return self._event("response.created", response=self._object(None)) + self._event(
            "response.in_progress", response=self._object(None)
        )

    def chunk(self, event: TextEmitted) -> bytes:
        written = self._read(event.text)
        return written if event.finish_reason is None else written + self._finish(event.finish_reason)

    def ending(self, usage: Usage) -> bytes:
        return self._event(f"response.{self._status}", response=self._object(usage))

    def failure(self, error: DuomoError) -> bytes:
        """OpenAI's word for the fault; what it was stands in the message."""
        self._status = "failed"
        code = "rate_limit_exceeded" if error_status(error) == 429 else "server_error"
        return self._event("response.failed", response=self._object(None) | {"error": {"code": code, "message": error.detail}})

    def whole(self, choices: Sequence[FinishedChoice], usage: Usage) -> bytes:
        (choice,) = choices
        assert choice.finish_reason is not None, "a whole answer has ended"
        for text in choice.texts:
            self._read(text)
        self._finish(choice.finish_reason)
        return _json(self._object(usage))

    def _read(self, text: str) -> bytes:
        """One token's."""
        was_reasoning = self._reader.is_reasoning
        written = b"".join(map(self._part, self._reader.push(text)))
        self._reasoning_tokens += was_reasoning or self._reader.is_reasoning
        return written

    def _finish(self, finish_reason: str) -> bytes:
        self._status = "incomplete" if finish_reason == "length" else "completed"
        written = b"".join(map(self._part, self._reader.finish()))
        return written + self._close(self._status)

    def _part(self, part: OutputPart) -> bytes:
        """Its delta, in an item that is open or opened for it."""
        if isinstance(part, CallOpened):
            call: dict[str, object] = {"type": "function_call", "call_id": part.call_id, "name": part.name, "arguments": ""}
            return self._begin("fc_", call)
        if isinstance(part, CallArguments):
            return self._delta("response.function_call_arguments.delta", part.text)
        if isinstance(part, ReasoningPart):
            begun = b"" if self._kind == "reasoning" else self._begin("rs_", {"type": "reasoning", "summary": [], "content": []})
            return begun + self._delta("response.reasoning_text.delta", part.text)
        begun = b"" if self._kind == "message" else self._begin("msg_", {"type": "message", "role": "assistant", "content": []})
        return begun + self._delta("response.output_text.delta", part.text)

    @property
    def _kind(self) -> object:
        return self._items[-1]["type"] if self._is_open else None

    def _begin(self, prefix: str, fields: dict[str, object]) -> bytes:
        closed = self._close("completed")
        item = {"id": prefix + secrets.token_hex(12), **fields, "status": "in_progress"}
        self._items.append(item)
        self._is_open, self._text = True, ""
        written = closed + self._event("response.output_item.added", output_index=len(self._items) - 1, item=item)
        if self._kind in _PART_OF:
            written += self._event("response.content_part.added", **self._place(), part=self._content())
        return written

    def _delta(self, name: str, text: str) -> bytes:
        self._text += text
        more: dict[str, object] = {"logprobs": []} if self._kind == "message" else {}
        return self._event(name, **self._place(), delta=text, **more)

    def _close(self, status: str) -> bytes:
        if not self._is_open:
            return b""
        item, place = self._items[-1], self._place()
        if self._kind == "function_call":
            item["arguments"] = self._text
            written = self._event("response.function_call_arguments.done", **place, name=item["name"], arguments=self._text)
        else:
            part = self._content()
            item["content"] = [part]
            more: dict[str, object] = {"logprobs": []} if self._kind == "message" else {}
            written = self._event(f"response.{part['type']}.done", **place, text=self._text, **more)
            written += self._event("response.content_part.done", **place, part=part)
        item["status"] = status
        self._is_open = False
        return written + self._event("response.output_item.done", output_index=len(self._items) - 1, item=item)

    def _content(self) -> dict[str, object]:
        """The one content part of a message or of reasoning, as far as it has come."""
        if self._kind == "message":
            return {"type": "output_text", "text": self._text, "annotations": [], "logprobs": []}
        return {"type": "reasoning_text", "text": self._text}

    def _place(self) -> dict[str, object]:
        place: dict[str, object] = {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}
        return place if self._kind == "function_call" else {**place, "content_index": 0}

    def _event(self, name: str, /, **fields: object) -> bytes:
        event = {"type": name, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return b"event: %s\ndata: %s\n\n" % (name.encode(), _json(event))

    def _object(self, usage: Usage | None) -> dict[str, object]:
        is_cut = self._status == "incomplete"
        return {
            "id": self._head.answer_id,
            "object": "response",
            "created_at": self._head.created_s,
            "status": self._status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "model": self._head.model,
            "output": self._items if self._status != "in_progress" else [],
            **self._echo,
            "usage": None if usage is None else self._usage(usage),
        }

    def _usage(self, usage: Usage) -> dict[str, object]:
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens or 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self._reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }
