"""What stub prefill replicas say of a prompt's own log-probabilities: a pure function of position and token, in parts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from duomo.wire.messages import PromptScored, StartPrefill
from duomo.wire.prompt_logprobs import PromptScores, packed

PART_TOKENS = 64


def own_logprob(position: int) -> float:
    return -0.25 * (1 + position % 8)


def rank(position: int) -> int:
    return 1 + position % 5


def likeliest(position: int, token_id: int, num_top: int) -> list[tuple[int, float]]:
    """Best first; the token itself at its rank, where so many are listed."""
    others = [(3000 + 16 * (position % 4) + place, -0.25 * (1 + position % 8) + 0.01 * (rank(position) - place)) for place in range(1, 21)]
    others[rank(position) - 1] = (token_id, own_logprob(position))
    return others[:num_top]


def scored_frames(start: StartPrefill) -> Iterator[PromptScored]:
    """All of them, in order, where the request asks."""
    num_top, prompt_ids = start.sampling.prompt_logprobs, start.prompt_ids
    for first in range(1, len(prompt_ids) if num_top is not None else 0, PART_TOKENS):
        assert num_top is not None
        positions = range(first, min(first + PART_TOKENS, len(prompt_ids)))
        tops = [likeliest(position, prompt_ids[position], num_top) for position in positions]
        scores = PromptScores(
            first=first,
            own_T=np.array([own_logprob(position) for position in positions]),
            rank_T=np.array([rank(position) for position in positions], np.int32),
            top_TK=np.array([[value for _, value in top] for top in tops]).reshape(len(positions), num_top),
            top_ids_TK=np.array([[token_id for token_id, _ in top] for top in tops], np.int32).reshape(len(positions), num_top),
        )
        yield PromptScored(
            request_id=start.request_id, attempt=start.attempt, traceparent="", remaining_s=start.remaining_s, scores=packed(scores)
        )
