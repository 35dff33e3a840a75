"""Owns the log-probabilities of one prompt's own tokens: gathered as prefill tells them, then written as the answers show them.

Two forms: vLLM's `prompt_logprobs`, an object of token ids for each token, and the lists of OpenAI's older completions, where the prompt is
echoed. The first token has none: nothing stands before it. Knows no request, no socket and no answer's other fields.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from duomo.errors import WireError
from duomo.wire.prompt_logprobs import PromptScores, unpacked
from duomo.wire.values import PromptLogprobs
from services.router.logprobs import finite, token_name
from services.router.text import ModelText

_json: Final = msgspec.json.Encoder().encode
FEW_ENTRIES: Final = 2048  # an entry takes 1 to 2 us: more are written in a thread, so that the loop's streams do not stall


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptForms:
    """What is shown of a prompt, each with so many of the likeliest; None: not that.

    listed: as `prompt_logprobs`. echoed: before the answer's own `logprobs`, where the prompt is echoed.
    """

    listed: int | None = None
    echoed: int | None = None

    @property
    def num_top(self) -> int | None:
        """What is asked of prefill."""
        return max((num for num in (self.listed, self.echoed) if num is not None), default=None)


NOT_SHOWN: Final = PromptForms()


@dataclass(frozen=True, slots=True, kw_only=True)
class EchoedLogprobs:
    """The prompt's part of each list of a completion's `logprobs`, without brackets; end: characters of the prompt that is shown."""

    tokens: bytes
    values: bytes
    tops: bytes
    offsets: bytes
    end: int


class ScoredPrompt:
    """Of one prompt. echo: how it is shown where the answer begins with it."""

    def __init__(self, prompt_ids: Sequence[int], forms: PromptForms, text: ModelText, echo: str = "") -> None:
        self._prompt_ids = prompt_ids
        self._forms = forms
        self._text = text
        self._echo = echo
        self._parts: list[PromptScores] = []
        self._attempt = -1
        self._next = 1
        self._listed = b""
        self._echoed: EchoedLogprobs | None = None
        self._is_written = False
        if self.is_whole:  # of one token nothing comes
            self.write()

    @property
    def is_whole(self) -> bool:
        """Whether every token but the first has come."""
        return self._next >= len(self._prompt_ids)

    @property
    def num_entries(self) -> int:
        """How many an answer shows, in all its forms together."""
        return len(self._prompt_ids) * sum(1 + num for num in (self._forms.listed, self._forms.echoed) if num is not None)

    @property
    def listed(self) -> bytes:
        """The value of `prompt_logprobs`, once it is written."""
        assert self._is_written, "a prompt is shown before it is written"
        return self._listed

    @property
    def echoed(self) -> EchoedLogprobs | None:
        """None where the answer does not show it so."""
        assert self._is_written, "a prompt is shown before it is written"
        return self._echoed

    def take(self, attempt: int, message: PromptLogprobs) -> None:
        """The next tokens, of one attempt; a later attempt begins anew. Raises WireError for what is not the next of this prompt."""
        if attempt > self._attempt:
            self._attempt, self._parts, self._next = attempt, [], 1
        scores = unpacked(message)
        end = scores.first + scores.num_tokens
        if scores.first != self._next or end > len(self._prompt_ids) or scores.top_ids_TK.shape[1] < self._least_top():
            raise WireError(
                f"log-probabilities of prompt tokens {scores.first} to {end - 1} with {scores.top_ids_TK.shape[1]} of the likeliest, where "
                f"{self._least_top()} of each from {self._next} to {len(self._prompt_ids) - 1} were to come",
                code="bad_prompt_scores",
            )
        self._parts.append(scores)
        self._next = end

    def write(self) -> None:
        """Make what the answer shows, once it is whole; in any thread, once."""
        assert self.is_whole and not self._is_written
        if self._forms.listed is not None:
            self._listed = b"[null%s]" % b"".join(b"," + entry for entry in self._entries(self._forms.listed))
        if self._forms.echoed is not None:
            self._echoed = self._as_echoed(self._forms.echoed)
        self._parts = []
        self._is_written = True

    def _least_top(self) -> int:
        return min(self._forms.num_top or 0, self._text.vocab_size)

    def _tokens(self, num_top: int) -> Iterator[tuple[int, float, int, list[tuple[int, float]]]]:
        """From the second on: id, log-probability, rank, and the likeliest, best first."""
        for part in self._parts:
            owns, ranks = part.own_T.tolist(), part.rank_T.tolist()
            ids, values = part.top_ids_TK[:, :num_top].tolist(), part.top_TK[:, :num_top].tolist()
            for at, token_id in enumerate(self._prompt_ids[part.first : part.first + part.num_tokens]):
                likeliest = [(each, finite(value)) for each, value in zip(ids[at], values[at], strict=True)]
                yield token_id, finite(owns[at]), ranks[at], likeliest

    def _entries(self, num_top: int) -> Iterator[bytes]:
        for token_id, own, rank, likeliest in self._tokens(num_top):
            shown = {str(token_id): self._entry(token_id, own, rank)}
            for place, (other, value) in enumerate(likeliest, 1):
                shown[str(other)] = self._entry(other, value, place)
            yield _json(shown)

    def _entry(self, token_id: int, logprob: float, rank: int) -> dict[str, object]:
        return {"logprob": logprob, "rank": rank, "decoded_token": self._text.token_bytes(token_id).decode("utf-8", "replace")}

    def _as_echoed(self, num_top: int) -> EchoedLogprobs:
        raws = [self._text.token_bytes(token_id) for token_id in self._prompt_ids]
        values: list[float | None] = [None]
        tops: list[dict[str, float] | None] = [None]
        for token_id, own, _, likeliest in self._tokens(num_top):
            values.append(own)
            tops.append({self._name(token_id): own} | {self._name(other): value for other, value in likeliest})
        return EchoedLogprobs(
            tokens=_listed(map(token_name, raws)),
            values=_listed(values),
            tops=_listed(tops),
            offsets=_listed(_offsets(raws, self._echo)),
            end=len(self._echo),
        )

    def _name(self, token_id: int) -> str:
        return token_name(self._text.token_bytes(token_id))


def _listed(values: Iterable[object]) -> bytes:
    return b",".join(map(_json, values))


def _offsets(raws: Sequence[bytes], echo: str) -> list[int]:
    """Where each token begins in the prompt as it is shown. What the tokenizer put before it (a token of its own, a space) begins at 0."""
    decode, at, offsets = codecs.getincrementaldecoder("utf-8")("replace").decode, 0, []
    for raw in raws:
        offsets.append(at)
        at += len(decode(raw))
    at += len(decode(b"", True))
    hidden = max(at - len(echo), 0)
    return [min(max(offset - hidden, 0), len(echo)) for offset in offsets]
