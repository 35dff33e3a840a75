"""Owns the log-probabilities of a prompt's own tokens, from the logits of the rows before them. Knows no wave, no request and no device.

    own(i) = log softmax(logits of row i - 1)[token i]        in float64 of float32 logits, as the sampler reports a sampled token's

A row at a time, as the sampler takes them: the same logits give the same bits whether the token was in the prompt or was sampled.

Legend: T rows, V vocabulary, K likeliest listed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from duomo.engine.sampler import likeliest
from duomo.wire.prompt_logprobs import PromptScores


@dataclass(frozen=True, kw_only=True, slots=True)
class RowsToScore:
    """Successive rows of a wave, [row_lo, row_lo + len(next_ids)), and the token that stands behind each in the prompt.

    first: the position of the first of these tokens in its prompt. num_top: how many of the likeliest are listed.
    """

    row_lo: int
    next_ids: Sequence[int]
    first: int
    num_top: int

    @property
    def rows(self) -> list[int]:
        return list(range(self.row_lo, self.row_lo + len(self.next_ids)))


@torch.inference_mode()
def prompt_scores(logits_TV: Tensor, asked: RowsToScore) -> PromptScores:
    """Of every row. logits float32 [T, V], not changed."""
    num_tokens, num_top = len(asked.next_ids), min(asked.num_top, logits_TV.shape[1])
    assert logits_TV.shape[0] == num_tokens, (logits_TV.shape, num_tokens)
    own_T, rank_T = np.empty(num_tokens, np.float64), np.empty(num_tokens, np.int32)
    top_TK, top_ids_TK = np.empty((num_tokens, num_top), np.float64), np.empty((num_tokens, num_top), np.int32)
    for at, token_id in enumerate(asked.next_ids):
        logits_V = logits_TV[at]
        logprobs_V, values, ids = likeliest(logits_V, num_top)
        own_T[at], top_TK[at], top_ids_TK[at] = logprobs_V[token_id], values.numpy(), ids.numpy()
        rank_T[at] = int((logits_V >= logits_V[token_id]).sum())
    return PromptScores(first=asked.first, own_T=own_T, rank_T=rank_T, top_TK=top_TK, top_ids_TK=top_ids_TK)
