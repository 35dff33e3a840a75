"""Owns what a decode step of a GPU is asked and what it answers, as the host sees them. Knows no tensor and no graph.

A running sequence keeps a row from step to step; what it is fed is the token that its row sampled last, which the host has not seen when it
plans. So a row says where its token comes from: a row of the step launched before, or, for a sequence that was not in it, the id itself.

Legend: R rows, L layers, K experts a token, N likeliest tokens listed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from duomo.engine.decode_buckets import MAX_BATCH
from duomo.errors import EngineError, RequestError

if TYPE_CHECKING:
    from duomo.engine.sampler import RowSampling
    from duomo.wire.values import Sampling

MAX_ENDINGS = 32  # ids that min_tokens can mask in one row: eos and the request's own
MAX_LOGPROBS = 20
MAX_BIASES = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeLimits:
    """Sizes of a decode runner, fixed when it starts. is_deterministic: a row's bits depend on nothing beside it (decoder must agree)."""

    max_batch: int
    max_model_tokens: int
    is_deterministic: bool = False

    def __post_init__(self) -> None:
        assert 1 <= self.max_batch <= MAX_BATCH and self.max_model_tokens >= 1, self


@dataclass(frozen=True, kw_only=True, slots=True)
class Joining:
    """A sequence that was not in the step before: the id to feed, which is the last of sampling's prompt and output."""

    token_id: int
    sampling: RowSampling


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeRow:
    """One token of one sequence. source: the row of the step launched before whose sampled token is fed (no two rows name the same), or
    who joins. position: of the fed token, whose KV goes into `table`, which covers it; one token is sampled after it.

    A row that goes on is fed at the next position, and of its table only the block that the token is written to may be another than before.
    """

    source: int | Joining
    position: int
    table: Sequence[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeStep:
    """At least one row. A sequence that leaves is not named any more: rows close up, so that live ones stand in front."""

    rows: tuple[DecodeRow, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepLogprobs:
    """Of the raw distribution, for rows that asked: their token's, and as many of the likeliest as they asked for, best first."""

    logprob_R: NDArray[np.float32]
    top_id_RN: NDArray[np.int32]
    top_logprob_RN: NDArray[np.float32]

    def top(self, row: int, num_top: int) -> tuple[tuple[int, float], ...]:
        """(id, logprob) of the row's likeliest."""
        ids, values = self.top_id_RN[row, :num_top].tolist(), self.top_logprob_RN[row, :num_top].tolist()
        return tuple(zip(ids, values, strict=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What a step gave. A row in `errors` has no token: its sequence cannot go on. logprobs None: no row asked.

    A row whose sequence had ended (its host did not know when it planned) has a token all the same: whoever asked drops it.
    """

    token_id_R: NDArray[np.int32]
    errors: Mapping[int, EngineError]
    routed_LRK: NDArray[np.int16]
    logprobs: StepLogprobs | None

    @property
    def routed_RE(self) -> NDArray[np.int16]:
        """Expert ids of each row, all layers side by side: [R, L * K]."""
        routed: NDArray[np.int16] = self.routed_LRK.transpose(1, 0, 2).reshape(self.routed_LRK.shape[1], -1)
        return routed


def check_sampling(sampling: Sampling, num_endings: int) -> None:
    """Raises RequestError for what no captured step can hold. Before a row joins. num_endings: ids that end it."""
    if sampling.min_tokens > 0 and num_endings > MAX_ENDINGS:
        raise RequestError(f"min_tokens with {num_endings} ending ids: at most {MAX_ENDINGS} can be masked", param="stop_token_ids")
    if sampling.logprobs is not None and sampling.logprobs > MAX_LOGPROBS:
        raise RequestError(f"{sampling.logprobs} logprobs: at most {MAX_LOGPROBS}", param="logprobs")
    if sampling.prompt_logprobs is not None and sampling.prompt_logprobs > MAX_LOGPROBS:
        raise RequestError(f"{sampling.prompt_logprobs} prompt_logprobs: at most {MAX_LOGPROBS}", param="prompt_logprobs")
    if len(sampling.logit_bias) > MAX_BIASES:
        raise RequestError(f"{len(sampling.logit_bias)} biases: at most {MAX_BIASES}", param="logit_bias")
