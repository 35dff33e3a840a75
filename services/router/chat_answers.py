"""chat.completion and chat.completion.chunk as bytes. Knows no request and no socket.

Chunks are joined from parts made once for each answer, since they are written for every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, cast

import msgspec

from duomo.errors import DuomoError
from services.router.answers import AnswerHead, ChunkEnds, FinishedChoice, error_event, object_head, token_ids_of, usage_end, usage_object
from services.router.generation import EmittedPiece, TextEmitted, Usage
from services.router.logprobs import finite
from services.router.markup import OutputReader, OutputStyle
from services.router.output_parts import (
    CallBlock,
    CallOpened,
    OutputBlock,
    OutputPart,
    ReasoningBlock,
    ReasoningPart,
    TextBlock,
    TextPart,
    blocks_of,
)
from services.router.scored_prompt import ScoredPrompt

_json: Final = msgspec.json.Encoder().encode


class ChatShape:
    """chat.completion and chat.completion.chunk. style: the markup that is read out of the text, if the model writes any.

    scored: the prompt, where its own log-probabilities are shown: in whole answers.
    """

    def __init__(
        self, head: AnswerHead, style: OutputStyle | None = None, scored: ScoredPrompt | None = None, *, num_choices: int = 1
    ) -> None:
        self._head = head
        self._scored = scored
        self._style = style if style is not None and style.has_markup else None
        self._readers: dict[int, OutputReader] = {}
        self._chunk_head = object_head(head, "chat.completion.chunk")
        self._ends = ChunkEnds(head, num_choices)
        self._is_plain = self._style is None and not (head.shows_logprobs or head.shows_token_ids or self._ends.counts)
        self._before_text: dict[int, bytes] = {}  # of a choice's plain chunks: all but the text is the same in each
        self._behind_text = b'},"logprobs":null,"finish_reason":null}]' + self._ends.plain

    def opening(self, choice: int) -> bytes:
        """The first chunk of a choice: its role."""
        body = b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]' % choice
        return b'data: %s,"choices":[%s%s' % (self._chunk_head, body, self._ends.after(choice, 0))

    def chunk(self, event: TextEmitted) -> bytes:
        """Nothing where all of a token's text is held back and nothing else is shown of it."""
        finish: str | None = event.finish_reason
        if self._is_plain and finish is None:
            return self._plain_head(event.choice) + _json(event.text) + self._behind_text
        if self._style is None:
            delta = b'{"content":%s}' % _json(event.text) if event.text or finish is None else b"{}"
        else:
            reader = self._readers.setdefault(event.choice, OutputReader(self._style))
            parts = reader.push(event.text) + (reader.finish() if finish is not None else [])
            if not parts and finish is None and not event.pieces:
                return b""
            delta = _json(_delta(parts))
            finish = _finish_reason(finish, reader)
        return b'data: %s,"choices":[{"index":%d,"delta":%s,"logprobs":%s,"finish_reason":%s%s}]%s' % (
            self._chunk_head,
            event.choice,
            delta,
            self._logprobs(event.pieces),
            b"null" if finish is None else b'"%s"' % finish.encode(),
            token_ids_of(self._head, event.pieces),
            self._ends.after(event.choice, len(event.pieces)),
        )

    def _plain_head(self, choice: int) -> bytes:
        before = self._before_text.get(choice)
        if before is None:
            before = b'data: %s,"choices":[{"index":%d,"delta":{"content":' % (self._chunk_head, choice)
            self._before_text[choice] = before
        return before

    def ending(self, usage: Usage) -> bytes:
        return usage_end(self._chunk_head, self._head.includes_usage, usage)

    def failure(self, error: DuomoError) -> bytes:
        return error_event(error)

    def whole(self, choices: Sequence[FinishedChoice], usage: Usage) -> bytes:
        shown = b",".join(
            b'{"index":%d,%s,"logprobs":%s%s}'
            % (choice.number, self._message(choice), self._logprobs(choice.pieces), token_ids_of(self._head, choice.pieces))
            for choice in choices
        )
        listed = b"" if self._scored is None else b',"prompt_logprobs":%s' % self._scored.listed
        head, usage_json = object_head(self._head, "chat.completion"), _json(usage_object(usage))
        return b'%s,"choices":[%s],"usage":%s%s}' % (head, shown, usage_json, listed)

    def _message(self, choice: FinishedChoice) -> bytes:
        """The choice's message and its finish reason."""
        text, finish = "".join(choice.texts), choice.finish_reason
        if self._style is None:
            return b'"message":{"role":"assistant","content":%s,"refusal":null},"finish_reason":%s' % (_json(text), _json(finish))
        reader = OutputReader(self._style)
        message = _message(blocks_of(reader.push(text) + reader.finish()))
        return b'"message":%s,"finish_reason":%s' % (_json(message), _json(_finish_reason(finish, reader)))

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
        return {"token": raw.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(raw)}


def _finish_reason(finish: str | None, reader: OutputReader) -> str | None:
    """A choice that ended by itself after a call waits for that call's result."""
    return "tool_calls" if finish == "stop" and reader.has_called else finish


def _delta(parts: Sequence[OutputPart]) -> dict[str, object]:
    """One chunk's delta: each call that it adds to stands in it once."""
    delta: dict[str, object] = {}
    calls: dict[int, dict[str, object]] = {}
    for part in parts:
        if isinstance(part, ReasoningPart):
            delta["reasoning_content"] = f"{delta.get('reasoning_content', '')}{part.text}"
        elif isinstance(part, TextPart):
            delta["content"] = f"{delta.get('content', '')}{part.text}"
        elif isinstance(part, CallOpened):
            function = {"name": part.name, "arguments": ""}
            calls[part.index] = {"index": part.index, "id": part.call_id, "type": "function", "function": function}
        else:
            call = calls.setdefault(part.index, {"index": part.index, "function": {"arguments": ""}})
            function = cast(dict[str, str], call["function"])
            function["arguments"] += part.text
    if calls:
        delta["tool_calls"] = list(calls.values())
    return delta


def _message(blocks: Sequence[OutputBlock]) -> dict[str, object]:
    texts = [block.text for block in blocks if isinstance(block, TextBlock)]
    message: dict[str, object] = {"role": "assistant", "content": "".join(texts) if texts or not blocks else None, "refusal": None}
    reasoning = [block.text for block in blocks if isinstance(block, ReasoningBlock)]
    if reasoning:
        message["reasoning_content"] = "".join(reasoning)
    calls = [block for block in blocks if isinstance(block, CallBlock)]
    if calls:
        message["tool_calls"] = [
            {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in calls
        ]
    return message
