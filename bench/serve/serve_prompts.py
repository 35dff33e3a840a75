"""PURE: owns what is said to a server: the dialect that it takes, the body of a request, prompts drawn from keys. Knows no socket."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from bench.serve.serve_plan import Piece, Request

FIRST_ID = 10  # below are special ones, in the models served here
Api = Literal["completions", "chat"]
Counting = Literal["usage", "ids", "events"]

# Short and frequent, so that most are one token in any large vocabulary; what they come to in a server's is asked of it.
_WORDS = (
    "the of and to in is was for on that with as it by at from his an were are which this be had also or has their one first her new after "
    "who not they have two been other when all there time into may more years over only year most would world some where between later "
    "three state such then national used made known under many part became while both these him second during before since well until "
    "people city war school game between life house river music water light work home road story book group power field green hand open"
).split()


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """How a server is spoken to.

    vocab: prompt ids lie in [FIRST_ID, vocab). counting: how an event tells its tokens; by usage in each (which costs a server less than
    ids: vLLM sends the prompt's back too), by ids, or one an event. ignores_eos: it takes the field ignore_eos. tokens_per_word,
    fixed_tokens: of a chat's text and of the template around it.
    """

    model: str
    api: Api
    vocab: int
    counting: Counting = "ids"
    ignores_eos: bool = True
    tokens_per_word: float = 1.0
    fixed_tokens: float = 0.0

    @property
    def path(self) -> str:
        return "/v1/completions" if self.api == "completions" else "/v1/chat/completions"


def body_of(request: Request, dialect: Dialect) -> bytes:
    """JSON of a greedy streamed request whose answer is as long as was asked, where the server can be told so."""
    if dialect.api == "completions":
        prompt: dict[str, Any] = {"prompt": [each for piece in request.pieces for each in ids_of(piece, dialect.vocab)]}
    else:
        prompt = {"messages": [{"role": "user", "content": text_of(request, dialect)}]}
    usage = {"include_usage": True} | ({"continuous_usage_stats": True} if dialect.counting == "usage" else {})
    asked = {"model": dialect.model, "max_tokens": request.output_tokens, "temperature": 0, "stream": True, "stream_options": usage}
    options = {"return_token_ids": dialect.counting == "ids", "ignore_eos": dialect.ignores_eos}
    said = asked | {name: True for name, is_wanted in options.items() if is_wanted} | prompt
    return json.dumps(said, separators=(",", ":")).encode()


def ids_of(piece: Piece, vocab: int) -> list[int]:
    """A shorter piece of the same key is the beginning of a longer one."""
    return _draws(piece.key, vocab - FIRST_ID, piece.num_tokens, FIRST_ID)


def text_of(request: Request, dialect: Dialect) -> str:
    """About as many tokens as the request has, in the server's own count; at least a word."""
    num_words = max(1, round((request.prompt_tokens - dialect.fixed_tokens) / dialect.tokens_per_word))
    words: list[str] = []
    for piece in request.pieces:
        count = round(piece.num_tokens / dialect.tokens_per_word)
        words += [_WORDS[each] for each in _draws(piece.key, len(_WORDS), count, 0)]
    words += [_WORDS[each] for each in _draws(f"{request.pieces[-1].key} more", len(_WORDS), max(0, num_words - len(words)), 0)]
    return " ".join(words[:num_words])


def _draws(key: str, below: int, count: int, first: int) -> list[int]:
    seed = np.frombuffer(hashlib.blake2b(key.encode(), digest_size=16).digest(), np.uint32)
    drawn: list[int] = (first + np.random.default_rng(seed).integers(below, size=count)).tolist()
    return drawn
