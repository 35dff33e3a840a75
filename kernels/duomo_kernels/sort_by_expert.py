"""Owns the order in which routed tokens visit the experts. Knows nothing of weights.

    R = T * K routed tokens, expert by expert, in token order within an expert (stable).

Legend: T tokens, K experts a token, R routed tokens, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ExpertOrder:
    """routed_R: the flat (token * K + rank) index at each sorted place; token_R: its token; counts: routed tokens of each expert."""

    routed_R: Tensor
    token_R: Tensor
    counts: list[int]


def sort_by_expert_reference(ids_TK: Tensor, num_experts: int) -> ExpertOrder:
    """Plain Python: walk the experts, then the tokens."""
    flat = ids_TK.flatten().tolist()
    routed = [i for expert in range(num_experts) for i, e in enumerate(flat) if e == expert]
    counts = [flat.count(expert) for expert in range(num_experts)]
    return ExpertOrder(torch.tensor(routed), torch.tensor([i // ids_TK.shape[1] for i in routed]), counts)


def sort_by_expert(ids_TK: Tensor, num_experts: int) -> ExpertOrder:
    """ids [T, K] int64 -> the stable order by expert."""
    flat_R = ids_TK.flatten()
    routed_R = torch.argsort(flat_R, stable=True)
    counts = torch.bincount(flat_R, minlength=num_experts).tolist()
    return ExpertOrder(routed_R, routed_R.div(ids_TK.shape[1], rounding_mode="floor"), counts)
