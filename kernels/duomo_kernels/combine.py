"""Owns the weighted sum of the experts' answers. Knows nothing of gates or weights of experts.

    y[t] = sum over k of weight[t, k] * row[place of (t, k)]         in the gate's order of k

Legend: T tokens, K experts a token, R = T * K routed rows, D model.
"""

from __future__ import annotations

import torch
from torch import Tensor


def combine_reference(rows_RD: Tensor, routed_R: Tensor, weights_TK: Tensor) -> Tensor:
    """Token by token, in float64."""
    out_TD = torch.zeros(weights_TK.shape[0], rows_RD.shape[1], dtype=torch.float64)
    for place, routed in enumerate(routed_R.tolist()):
        token, rank = divmod(routed, weights_TK.shape[1])
        out_TD[token] += weights_TK[token, rank].double() * rows_RD[place].double()
    return out_TD.to(rows_RD.dtype)


def combine(rows_RD: Tensor, routed_R: Tensor, weights_TK: Tensor) -> Tensor:
    """Sorted rows [>= R, D] back in token order, weighted and summed -> [T, D]."""
    num_tokens, top_k = weights_TK.shape
    num_routed = num_tokens * top_k
    place_R = torch.empty_like(routed_R).scatter_(0, routed_R, torch.arange(num_routed))  # a gather takes half the time of a scatter
    by_token_RD = rows_RD.index_select(0, place_R)
    # one product of fixed shape [1, K] x [K, D] for each token: the same bits in every batch
    return torch.bmm(weights_TK.unsqueeze(1), by_token_RD.view(num_tokens, top_k, -1)).squeeze(1)
