"""Owns the choice of experts for each token. Knows nothing of the experts.

    p = softmax(logits) over E experts; the K largest, best first; weights divided by their sum where the model normalises.

Legend: T tokens, E experts, K experts a token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def topk_gate_reference(logits_TE: Tensor, top_k: int, normalise: bool) -> tuple[Tensor, Tensor]:
    """The formula by a full stable sort (lowest expert first among equals)."""
    probs_TE = torch.exp(logits_TE.double() - logits_TE.double().logsumexp(-1, keepdim=True))
    weights, ids = probs_TE.sort(dim=-1, descending=True, stable=True)
    weights_TK, ids_TK = weights[:, :top_k], ids[:, :top_k]
    return (weights_TK / weights_TK.sum(-1, keepdim=True) if normalise else weights_TK).float(), ids_TK


def topk_gate(logits_TE: Tensor, top_k: int, normalise: bool) -> tuple[Tensor, Tensor]:
    """logits [T, E] float32 -> (weights [T, K] float32, expert ids [T, K] int64), best first."""
    weights_TK, ids_TK = torch.topk(torch.softmax(logits_TE, -1), top_k)
    if normalise:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return weights_TK, ids_TK
