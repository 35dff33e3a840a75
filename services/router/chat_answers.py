"""chat.completion and chat.completion.chunk as bytes. Knows no request and no socket.

Chunks are joined from parts made once for each answer, since they are written for every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from duomo.errors import DuomoError
from services.router.answers import AnswerHead, FinishedChoice, error_event, finite, object_head, token_ids_of, usage_end, usage_object
from services.router.generation import EmittedPiece, TextEmitted, Usage

_json: Final = msgspec.json.Encoder().encode


class ChatShape:
    """chat.completion and chat.completion.chunk."""

    def __init__(self, head: AnswerHead) -> None:
        self._head = head
        self._chunk_head = object_head(head, "chat.completion.chunk")
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
            token_ids_of(self._head, event.pieces),
            self._tail,
        )

    def ending(self, usage: Usage) -> bytes:
        return usage_end(self._chunk_head, self._head.includes_usage, usage)

    def failure(self, error: DuomoError) -> bytes:
        return error_event(error)

    def whole(self, choices: Sequence[FinishedChoice], usage: Usage) -> bytes:
        shown = b",".join(
            b'{"index":%d,"message":{"role":"assistant","content":%s,"refusal":null},"logprobs":%s,"finish_reason":%s%s}'
            % (
                choice.number,
                _json("".join(choice.texts)),
                self._logprobs(choice.pieces),
                _json(choice.finish_reason),
                token_ids_of(self._head, choice.pieces),
            )
            for choice in choices
        )
        return b'%s,"choices":[%s],"usage":%s}' % (object_head(self._head, "chat.completion"), shown, _json(usage_object(usage)))

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
