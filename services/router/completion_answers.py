"""text_completion as bytes, streamed or whole: echoed prompts, the best of several choices. Knows no request and no socket."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from duomo.errors import DuomoError
from services.router.answers import AnswerHead, ChunkEnds, FinishedChoice, error_event, object_head, token_ids_of, usage_end, usage_object
from services.router.generation import EmittedPiece, TextEmitted, Usage
from services.router.logprobs import finite, token_name
from services.router.scored_prompt import EchoedLogprobs, ScoredPrompt
from services.router.text import Detokenizer

_json: Final = msgspec.json.Encoder().encode


class CompletionShape:
    """text_completion, streamed or whole. Offsets of logprobs count the characters shown, for each choice: those of a character that
    several tokens write are where it stands, and a special token, which is not shown, takes no room.

    echoes: each prompt's text where choices begin with it, else empty. Of each prompt's num_sampled choices the num_shown with the highest
    log-probability per token are shown, best first, in whole answers. scored: the prompts, where their own log-probabilities are shown.
    """

    def __init__(
        self,
        head: AnswerHead,
        echoes: Sequence[str] = (),
        *,
        scored: Sequence[ScoredPrompt] = (),
        num_sampled: int = 1,
        num_shown: int = 1,
    ) -> None:
        self._head = head
        self._echoes = echoes
        self._scored = scored
        self._num_sampled = num_sampled
        self._num_shown = num_shown
        self._object_head = object_head(head, "text_completion")
        self._ends = ChunkEnds(head, num_sampled)
        self._is_plain = not (head.shows_logprobs or head.shows_token_ids or self._ends.counts)
        self._before_text: dict[int, bytes] = {}  # of a choice's plain chunks: all but the text is the same in each
        self._behind_text = b',"logprobs":null,"finish_reason":null}]' + self._ends.plain
        self._offsets: dict[int, int] = {}
        self._readers: dict[int, Detokenizer] = {}

    def opening(self, choice: int) -> bytes:
        """Nothing but the prompt, where it is echoed."""
        echo, echoed = self._echo(choice), self._echoed(choice)
        return self._chunk(TextEmitted(choice, echo, ()), echoed) if echo or echoed is not None else b""

    def chunk(self, event: TextEmitted) -> bytes:
        if not self._is_plain or event.finish_reason is not None:
            return self._chunk(event, None)
        before = self._before_text.get(event.choice)
        if before is None:
            before = b'data: %s,"choices":[{"index":%d,"text":' % (self._object_head, event.choice)
            self._before_text[event.choice] = before
        return before + _json(event.text) + self._behind_text

    def _chunk(self, event: TextEmitted, echoed: EchoedLogprobs | None) -> bytes:
        finish = b"null" if event.finish_reason is None else b'"%s"' % event.finish_reason.encode()
        return b'data: %s,"choices":[{"index":%d,"text":%s,"logprobs":%s,"finish_reason":%s%s}]%s' % (
            self._object_head,
            event.choice,
            _json(event.text),
            self._logprobs(event.choice, event.pieces, echoed),
            finish,
            token_ids_of(self._head, event.pieces),
            self._ends.after(event.choice, len(event.pieces)),
        )

    def ending(self, usage: Usage) -> bytes:
        return usage_end(self._object_head, self._head.includes_usage, usage)

    def failure(self, error: DuomoError) -> bytes:
        return error_event(error)

    def whole(self, choices: Sequence[FinishedChoice], usage: Usage) -> bytes:
        shown = b",".join(
            b'{"index":%d,"text":%s,"logprobs":%s,"finish_reason":%s%s%s}'
            % (
                index,
                _json(self._echo(choice.number) + "".join(choice.texts)),
                self._logprobs(choice.number, choice.pieces, self._echoed(choice.number)),
                _json(choice.finish_reason),
                token_ids_of(self._head, choice.pieces),
                self._listed(choice.number),
            )
            for index, choice in enumerate(self._best(choices))
        )
        return b'%s,"choices":[%s],"usage":%s}' % (self._object_head, shown, _json(usage_object(usage)))

    def _echo(self, choice: int) -> str:
        return self._echoes[choice // self._num_sampled] if self._echoes else ""

    def _echoed(self, choice: int) -> EchoedLogprobs | None:
        return self._scored[choice // self._num_sampled].echoed if self._scored else None

    def _listed(self, choice: int) -> bytes:
        listed = self._scored[choice // self._num_sampled].listed if self._scored else b""
        return b',"prompt_logprobs":%s' % listed if listed else b""

    def _best(self, choices: Sequence[FinishedChoice]) -> list[FinishedChoice]:
        """Prompt after prompt; ties go to the choice that was numbered first."""
        if self._num_sampled == self._num_shown:
            return list(choices)
        ranked = sorted(choices, key=lambda choice: (choice.number // self._num_sampled, -_logprob_per_token(choice), choice.number))
        return [choice for rank, choice in enumerate(ranked) if rank % self._num_sampled < self._num_shown]

    def _logprobs(self, choice: int, pieces: Sequence[EmittedPiece], echoed: EchoedLogprobs | None) -> bytes:
        """echoed: the prompt's, where it stands before them."""
        if not self._head.shows_logprobs:
            return b"null"
        if echoed is not None:
            self._offsets[choice] = echoed.end
        offset = self._offsets.get(choice, len(self._echo(choice)))
        reader = self._readers.setdefault(choice, self._head.text.detokenizer())
        tokens, values, tops, offsets = [], [], [], []
        for piece in pieces:
            if piece.logprob is None:
                continue
            name = self._name(piece.token_id)
            tokens.append(name)
            values.append(finite(piece.logprob.logprob))
            ranked = {self._name(token_id): finite(logprob) for token_id, logprob in piece.logprob.top}
            tops.append({name: values[-1]} | ranked)
            offsets.append(offset)
            offset += len(reader.push(piece.token_id))
        self._offsets[choice] = offset
        if echoed is None:
            return _json({"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets})
        lists = (
            _joined(echoed.tokens, tokens),
            _joined(echoed.values, values),
            _joined(echoed.tops, tops),
            _joined(echoed.offsets, offsets),
        )
        return b'{"tokens":%s,"token_logprobs":%s,"top_logprobs":%s,"text_offset":%s}' % lists

    def _name(self, token_id: int) -> str:
        return token_name(self._head.text.token_bytes(token_id))


def _joined(before: bytes, values: Sequence[object]) -> bytes:
    """A JSON list of what was written already (at least one), and these."""
    return b"[%s%s]" % (before, b"".join(b"," + _json(value) for value in values))


def _logprob_per_token(choice: FinishedChoice) -> float:
    logprobs = [piece.logprob.logprob for piece in choice.pieces if piece.logprob is not None]
    assert logprobs, "who ranks choices asks for log-probabilities"
    return sum(logprobs) / len(logprobs)
