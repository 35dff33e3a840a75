"""Owns the float64 answer of a whole MoE layer on sampled tokens, and what a gate should choose. Knows no kernel.

All rows of a prefill in float64 would take longer than the benchmark. The sample holds, for every expert that was chosen, the first token
that chose it, and then tokens spread over the rest; rows outside the sample are compared with a peer's, where one ran.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from duomo_kernels._routing import GateRule
from duomo_kernels._weights import SCALE_BLOCK, ExpertWeights

SAMPLE = 64


@dataclass(frozen=True, slots=True)
class Choice:
    """weights [T, K] float64, ids [T, K] int64, best first."""

    weights_TK: Tensor
    ids_TK: Tensor

    @property
    def num_distinct(self) -> int:
        return int(torch.bincount(self.ids_TK.flatten()).count_nonzero())


def choose(logits_TE: Tensor, rule: GateRule, bias_E: Tensor | None = None) -> Choice:
    """The rule in float64, by sorting."""
    logits_TE = logits_TE.double()
    score_TE = logits_TE.sigmoid() if rule.scoring == "sigmoid" else logits_TE.softmax(-1)
    choice_TE = score_TE if bias_E is None else score_TE + bias_E.double()
    if rule.num_groups > 1:
        choice_TGI = choice_TE.reshape(choice_TE.shape[0], rule.num_groups, -1)
        worth_TG = choice_TGI.topk(min(2, choice_TGI.shape[-1]), -1).values.sum(-1)
        stays_TG = torch.zeros_like(worth_TG, dtype=torch.bool).scatter_(1, worth_TG.topk(rule.top_groups, -1).indices, True)
        choice_TE = choice_TGI.masked_fill(~stays_TG[..., None], float("-inf")).flatten(1)
    ids_TK = choice_TE.sort(dim=-1, descending=True, stable=True).indices[:, : rule.top_k]
    weights_TK = score_TE.gather(1, ids_TK)
    if rule.normalise:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return Choice(weights_TK * rule.routed_scale, ids_TK)


def sample_tokens(choice: Choice, num_experts: int) -> Tensor:
    """Token indices: the first token of each chosen expert, then others evenly, at least SAMPLE where there are so many."""
    num_tokens, top_k = choice.ids_TK.shape
    device = choice.ids_TK.device
    token_R = torch.arange(num_tokens, device=device).repeat_interleave(top_k)
    first_E = torch.full((num_experts,), num_tokens, device=device).scatter_reduce_(0, choice.ids_TK.flatten(), token_R, "amin")
    spread = torch.linspace(0, num_tokens - 1, min(SAMPLE, num_tokens), device=device).long()
    is_taken_T = torch.zeros(num_tokens, dtype=torch.bool, device=device)
    is_taken_T[torch.cat([first_E[first_E < num_tokens], spread])] = True
    return is_taken_T.nonzero().flatten()


def layer_reference(x_TD: Tensor, choice: Choice, weights: ExpertWeights, tokens_S: Tensor) -> Tensor:
    """[S, D] float64: the layer's output for the sampled tokens, expert by expert."""
    x_SD, ids_SK, weights_SK = x_TD[tokens_S].double(), choice.ids_TK[tokens_S], choice.weights_TK[tokens_S]
    out_SD = torch.zeros_like(x_SD)
    for expert in torch.bincount(ids_SK.flatten()).nonzero().flatten().tolist():
        row_N, rank_N = (ids_SK == expert).nonzero(as_tuple=True)
        gate, up = (x_SD[row_N] @ _expert(weights.gate_up_EFD, weights.gate_up_scale_Efd, expert).T).chunk(2, -1)
        rows = (gate * torch.sigmoid(gate) * up) @ _expert(weights.down_EDF, weights.down_scale_Edf, expert).T
        out_SD.index_add_(0, row_N, rows * weights_SK[row_N, rank_N, None])
    return out_SD


def _expert(stored: Tensor, scale: Tensor | None, expert: int) -> Tensor:
    """One expert's matrix in float64; all of a layer's would not fit."""
    matrix = stored[expert].double()
    if scale is None:
        return matrix
    rows = scale[expert].double().repeat_interleave(SCALE_BLOCK, 0)[: matrix.shape[0]]
    return matrix * rows.repeat_interleave(SCALE_BLOCK, 1)[:, : matrix.shape[1]]
