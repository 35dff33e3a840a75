"""Owns the packed form of a prompt's log-probabilities: arrays to and from `PromptLogprobs`. Knows no model and no request.

Names of shapes: T prompt tokens, K likeliest listed of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from duomo.errors import WireError
from duomo.wire.codec import BAD_FIELD
from duomo.wire.values import PromptLogprobs


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PromptScores:
    """Of tokens first, first + 1, ... of a prompt. own_T: natural-log probability of the token itself, given all before it; top_TK and
    top_ids_TK: of the likeliest in its place, best first; rank_T: how many are at least as likely as it, itself included."""

    first: int
    own_T: NDArray[np.floating]
    rank_T: NDArray[np.int32]
    top_TK: NDArray[np.floating]
    top_ids_TK: NDArray[np.int32]

    @property
    def num_tokens(self) -> int:
        return int(self.own_T.shape[0])

    @property
    def has_nan(self) -> bool:
        """Whether some of it is no number: the logits were none."""
        return bool(np.isnan(self.own_T).any() or np.isnan(self.top_TK).any())


def packed(scores: PromptScores) -> PromptLogprobs:
    """The arrays as they travel: float64 where they are, else float32."""
    num_tokens, num_top = scores.top_TK.shape
    float_bytes = 8 if scores.own_T.dtype == np.float64 else 4
    together = np.concatenate([scores.own_T[:, None], scores.top_TK], axis=1)
    return PromptLogprobs(
        first=scores.first,
        num_tokens=num_tokens,
        num_top=num_top,
        logprobs=np.ascontiguousarray(together, f"<f{float_bytes}").tobytes(),
        top_ids=np.ascontiguousarray(scores.top_ids_TK, "<i4").tobytes(),
        ranks=np.ascontiguousarray(scores.rank_T, "<i4").tobytes(),
        float_bytes=8 if float_bytes == 8 else 4,
    )


def unpacked(message: PromptLogprobs) -> PromptScores:
    """Over the message's own bytes: read-only. Raises WireError where they are not what its sizes say, or hold what is no probability."""
    num_tokens, num_top = message.num_tokens, message.num_top
    if message.first < 1 or num_tokens < 1 or num_top < 0:
        raise WireError(f"log-probabilities of {num_tokens} prompt tokens from {message.first} on, {num_top} listed", code=BAD_FIELD)
    needed = {
        "logprobs": (message.logprobs, num_tokens * (1 + num_top) * message.float_bytes),
        "top_ids": (message.top_ids, num_tokens * num_top * 4),
        "ranks": (message.ranks, num_tokens * 4),
    }
    for name, (found, num_bytes) in needed.items():
        if len(found) != num_bytes:
            raise WireError(
                f"{name} of {num_tokens} prompt tokens, {num_top} listed, has {num_bytes} bytes, not {len(found)}", code=BAD_FIELD
            )
    together = np.frombuffer(message.logprobs, f"<f{message.float_bytes}").reshape(num_tokens, 1 + num_top)
    scores = PromptScores(
        first=message.first,
        own_T=together[:, 0],
        rank_T=np.frombuffer(message.ranks, "<i4"),
        top_TK=together[:, 1:],
        top_ids_TK=np.frombuffer(message.top_ids, "<i4").reshape(num_tokens, num_top),
    )
    if scores.has_nan or (scores.rank_T < 1).any() or (scores.top_ids_TK < 0).any():
        raise WireError("a log-probability that is no number, a rank below 1, or a token id below 0", code=BAD_FIELD)
    return scores
