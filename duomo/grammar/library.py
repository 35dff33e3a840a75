"""Owns llguidance: constraints as its grammars, a model's tokens as its tokenizer, both as matchers. Knows no request and no choice.

JSON is written on one line, with at most one space behind a comma or a colon: a model may fill wider room with spaces until its tokens are
spent.
A schema means what it says: a keyword that cannot be kept is refused by its name, none is ignored, nor is `oneOf` made `anyOf`.

llguidance computes what may come next as it goes along; what it may spend on one grammar, and on one token, is bounded by its own limits.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark
from llguidance.numpy import fill_next_token_bitmask
from numpy.typing import NDArray

from duomo.errors import RequestError
from duomo.grammar.depth import MAX_LEVELS, grammar_levels, schema_levels
from duomo.wire.values import Constraint

if TYPE_CHECKING:  # of the stub alone
    from llguidance._lib import JsonCompileOptions

MAX_CHARS: Final = 256 * 1024
MAX_STATES: Final = 50_000
ITEM_SEPARATOR: Final = r",[ ]?"
KEY_SEPARATOR: Final = r":[ ]?"
BAD_CONSTRAINT: Final = "bad_constraint"  # the client's fault: it says nothing that can be kept
UNSUPPORTED: Final = "unsupported_constraint"  # of this model
_MAX_DETAIL_CHARS: Final = 400
_JSON_OPTIONS: Final[JsonCompileOptions] = {
    "whitespace_flexible": False,
    "item_separator": ITEM_SEPARATOR,
    "key_separator": KEY_SEPARATOR,
    "coerce_one_of": False,
    "lenient": False,
}


def check(constraint: Constraint, param: str) -> None:
    """Raises RequestError, naming `param` and what is wrong, for what no answer of any model can be held to."""
    warnings = LLMatcher.validate_grammar(grammar_of(constraint, param), limits=_limits())
    if warnings:
        raise _refusal(constraint, param, warnings)


def grammar_of(constraint: Constraint, param: str) -> str:
    """The constraint as llguidance reads it. Raises RequestError for what is none; what is inside shows when it is compiled."""
    text = constraint.text
    if len(text) > MAX_CHARS:
        raise RequestError(f"'{param}' has {len(text)} characters, at most {MAX_CHARS} are compiled.", param=param, code=BAD_CONSTRAINT)
    match constraint.kind:
        case "json_schema":
            _refuse_depth(constraint, param, schema_levels(text))
            try:
                return str(LLMatcher.grammar_from_json_schema(text, overrides=_JSON_OPTIONS))
            except ValueError as error:
                raise _refusal(constraint, param, str(error)) from error
        case "regex":
            return str(LLMatcher.grammar_from_regex(text))
        case "choice":
            return str(LLMatcher.grammar_from_lark(_any_of(_strings(constraint, param))))
        case "grammar":
            _refuse_depth(constraint, param, grammar_levels(text))
            try:
                return str(LLMatcher.grammar_from_lark(any_to_lark(text)))
            except Exception as error:  # a converter of text that raises whatever it meets
                raise _refusal(constraint, param, str(error) or type(error).__name__) from error


class Matcher:
    """A place in a compiled grammar. One thread at a time; copy() from any, of one that does not move."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def copy(self) -> Matcher:
        """At the same place, and free of this one from there on."""
        return Matcher(self._matcher.deep_copy())

    def take(self, token_ids: list[int]) -> int:
        """Go on by these tokens; how many of them the grammar allows."""
        return self._matcher.try_consume_tokens(token_ids)

    def fill(self, mask_W: NDArray[np.int32]) -> None:
        """What may come next; the first eos id stands for the end."""
        fill_next_token_bitmask(self._matcher, mask_W[None])

    def error(self) -> str | None:
        """Why it can say nothing any more."""
        return self._matcher.get_error() if self._matcher.is_error() else None


class GrammarTokens:
    """A model's tokens as grammars see them. Immutable; shared by threads."""

    def __init__(self, file: Path, vocab: int, eos_ids: tuple[int, ...]) -> None:
        if not eos_ids:
            raise RequestError("this model names no end-of-sequence token (eos_token_id): nothing could end an answer", code=UNSUPPORTED)
        try:
            text = file.read_text(encoding="utf-8")
            self._tokenizer = LLTokenizer(text, n_vocab=vocab, eos_token=eos_ids[0])
        except Exception as error:  # the library raises bare exceptions for what it does not read
            raise RequestError(f"structured output needs {file}, which cannot be used for it: {error}", code=UNSUPPORTED) from error
        self.vocab = vocab
        self.eos_ids = eos_ids

    def matcher(self, constraint: Constraint) -> Matcher:
        """Compiled; in any thread, others run meanwhile. Raises RequestError."""
        matcher = LLMatcher(self._tokenizer, grammar_of(constraint, "constraint"), log_level=0, limits=_limits())
        if matcher.is_error():
            raise _refusal(constraint, "constraint", matcher.get_error())
        return Matcher(matcher)

    def specials(self, token_ids: Sequence[int]) -> tuple[int, ...]:
        """Those of them that are no text: no grammar holds them, so they can only end an answer."""
        return tuple(token_id for token_id in token_ids if token_id < self.vocab and self._tokenizer.is_special_token(token_id))


@lru_cache(maxsize=2)
def tokens_of(file: Path, vocab: int, eos_ids: tuple[int, ...]) -> GrammarTokens:
    """Of a model's tokenizer.json: read once a process, which may hold both pools. Raises RequestError where it cannot be."""
    return GrammarTokens(file, vocab, eos_ids)


def _limits() -> LLParserLimits:
    """The library's own, but for what one choice may hold: it counts up to two KB for a state, and allows five times as many. Verbose
    errors would repeat the answer so far."""
    return LLParserLimits(max_lexer_states=MAX_STATES, verbose_errors=False)


def _refuse_depth(constraint: Constraint, param: str, levels: int) -> None:
    if levels > MAX_LEVELS:
        raise _refusal(
            constraint, param, f"its rules, references and groups may lead {levels} levels deep, at most {MAX_LEVELS} are compiled"
        )


def _any_of(strings: Sequence[str]) -> str:
    return "start: " + " | ".join(json.dumps(string, ensure_ascii=False) for string in strings)


def _strings(constraint: Constraint, param: str) -> list[str]:
    try:
        strings: object = json.loads(constraint.text)
    except ValueError as error:
        raise _refusal(constraint, param, str(error)) from error
    if not isinstance(strings, list) or not strings or not all(isinstance(string, str) and string for string in strings):
        raise _refusal(constraint, param, "it must be an array of at least one string, none of them empty")
    return strings


def _refusal(constraint: Constraint, param: str, why: str) -> RequestError:
    kind = constraint.kind.replace("_", " ")
    detail = f"'{param}' is no {kind} that can be kept: {' '.join(why.split())[:_MAX_DETAIL_CHARS]}"
    return RequestError(detail, param=param, code=BAD_CONSTRAINT)
