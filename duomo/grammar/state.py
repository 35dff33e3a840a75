"""Owns one choice's place in its grammar, and the mask of the tokens that may come next. Knows no logits.

The place follows from the choice's tokens alone: whoever samples shows all of them, and what is new is taken in. So a choice that goes on
elsewhere, or again, begins with a new state.

How an answer ends. eos ids, and stop ids that are no text, may come where the grammar may end. With ignore_eos, or while fewer than
min_tokens are out, they may not, unless nothing else may come. Stop ids that are text come as the grammar lets text come.

Legend: W words of 32 ids; id v is bit v % 32 of word v // 32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from duomo.errors import EngineError
from duomo.wire.values import Sampling

if TYPE_CHECKING:  # an engine alone, asked for no constraint, runs without llguidance
    from duomo.grammar.library import GrammarTokens, Matcher

NOT_KEPT = "constraint_not_kept"
EVERYTHING = -1  # a word of a mask that masks nothing


def num_words(vocab: int) -> int:
    return (vocab + 31) // 32


@dataclass(frozen=True, slots=True)
class Grammar:
    """A compiled constraint. Immutable; shared by threads."""

    tokens: GrammarTokens
    start: Matcher

    def state(self, sampling: Sampling) -> GrammarState:
        """Of a choice that has no token yet, or whose tokens will be shown."""
        return GrammarState(self.start.copy(), self.tokens, sampling)


class GrammarState:
    """One choice's. One thread at a time. error: why nothing can be said any more; masks then let everything through."""

    def __init__(self, matcher: Matcher, tokens: GrammarTokens, sampling: Sampling) -> None:
        self.error: EngineError | None = None
        self._matcher = matcher
        self._vocab = tokens.vocab
        self._eos_ids = tokens.eos_ids
        self._stop_ids = sampling.stop_token_ids
        self._end_ids = (*tokens.eos_ids, *tokens.specials(sampling.stop_token_ids))
        self._min_tokens = sampling.min_tokens
        self._ignores_eos = sampling.ignore_eos
        self._num_taken = 0

    def fill(self, mask_W: NDArray[np.int32], output_ids: Sequence[int], following: int | None = None) -> None:
        """What may come behind output_ids, which are those of the call before and more, and `following`, one that is not in them yet.

        Lets everything through behind a token that ended the choice (or is none: -1), and where `error` is set.
        """
        assert mask_W.shape == (num_words(self._vocab),) and mask_W.dtype == np.int32 and mask_W.flags.c_contiguous, mask_W.shape
        new_ids = [*output_ids[self._num_taken :]]
        if following is not None and self._num_taken <= len(output_ids):
            new_ids.append(following)
        if new_ids and (new_ids[-1] < 0 or new_ids[-1] in self._eos_ids or new_ids[-1] in self._stop_ids):
            mask_W.fill(EVERYTHING)
            return
        if self._take(new_ids):
            self._matcher.fill(mask_W)
            self._check()
        if self.error is None:
            self._settle_ends(mask_W.view(np.uint32), len(output_ids) + (following is not None))
        if self.error is not None:
            mask_W.fill(EVERYTHING)

    def _take(self, new_ids: list[int]) -> bool:
        """Whether all of them are what the grammar allows."""
        if self.error is None and new_ids:
            num_taken = self._matcher.take(new_ids)
            self._num_taken += num_taken
            self._check()
            if self.error is None and num_taken < len(new_ids):
                self.error = _fault(f"token {new_ids[num_taken]} is not what it allows there")
        return self.error is None

    def _check(self) -> None:
        why = self._matcher.error()
        if self.error is None and why is not None:
            self.error = _fault(why)

    def _settle_ends(self, bits_W: NDArray[np.uint32], num_output: int) -> None:
        may_end = _has(bits_W, self._eos_ids[0])
        is_early = num_output < self._min_tokens
        taken_out = [token_id for token_id in self._stop_ids if is_early and _has(bits_W, token_id)]
        _forbid(bits_W, (*self._eos_ids, *taken_out))
        if may_end and not is_early and not self._ignores_eos:
            _allow(bits_W, self._end_ids)
        elif not bits_W.any():
            _allow(bits_W, self._eos_ids if may_end else taken_out)
        if not bits_W.any():
            self.error = _fault("no token of this model goes on as it asks")


def _has(bits_W: NDArray[np.uint32], token_id: int) -> bool:
    return bool(int(bits_W[token_id >> 5]) >> (token_id & 31) & 1)


def _allow(bits_W: NDArray[np.uint32], token_ids: Sequence[int]) -> None:
    for token_id in token_ids:
        bits_W[token_id >> 5] |= np.uint32(1 << (token_id & 31))


def _forbid(bits_W: NDArray[np.uint32], token_ids: Sequence[int]) -> None:
    for token_id in token_ids:
        bits_W[token_id >> 5] &= np.uint32(~(1 << (token_id & 31)) & 0xFFFFFFFF)


def _fault(why: str) -> EngineError:
    detail = f"the answer cannot be held to its constraint any further: {' '.join(why.split())[:400]}"
    return EngineError(detail, code=NOT_KEPT, phase="decode.stream", retryable=False)
