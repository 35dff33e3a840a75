"""Owns a decoder's forward in float64, from the same tensors as the GPU's: one prompt, whole, without cache. Knows nothing of kernels.

Which experts a row takes is a jump: two that are nearly level may swap under any rounding, and everything after differs. So the experts may
be given (those that the engine took); then only their weights are computed here, and `misrouted` says whether the engine was allowed to.

Legend: T tokens, D model, H query heads, N kv heads, Dh head dim, E experts, K experts a token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from duomo.models.gpu_weights import GpuLayer, GpuWeights, LinearWeights
from duomo_kernels._weights import SCALE_BLOCK, dequantised


@dataclass(slots=True)
class Float64Run:
    """logits_TV of every position; for each layer the router's logits_TE and the ids_TK that were taken."""

    logits_TV: Tensor
    router_logits: list[Tensor] = field(default_factory=list)
    ids: list[Tensor] = field(default_factory=list)

    def misrouted(self, relative: float) -> int:
        """Rows and layers where a taken expert's logit lies below one that was left, by more than an error of `relative` in the row of
        logits (by its norm) can explain in both."""
        wrong = 0
        for logits_TE, ids_TK in zip(self.router_logits, self.ids, strict=True):
            if logits_TE.shape[1] == ids_TK.shape[1]:
                continue
            least_T = logits_TE.gather(1, ids_TK).amin(1)
            most_T = logits_TE.scatter(1, ids_TK, -torch.inf).amax(1)
            wrong += int((least_T < most_T - 2 * relative * logits_TE.norm(dim=1)).sum())
        return wrong


@torch.inference_mode()
def float64_run(weights: GpuWeights, token_ids: Sequence[int], forced_ids: Sequence[Tensor] | None = None) -> Float64Run:
    """The forward of one prompt. forced_ids: for each layer the experts [T, K] that every row takes."""
    run = Float64Run(torch.empty(0))
    eps = weights.config.norm_eps
    x_TD = weights.embed_VD[torch.tensor(token_ids, device=weights.device)].double()
    for layer_idx, layer in enumerate(weights.layers):
        x_TD = x_TD + _attention(weights, layer, _normed(x_TD, layer.input_norm_D, eps))
        normed_TD = _normed(x_TD, layer.post_norm_D, eps)
        x_TD = x_TD + _experts(weights, layer, normed_TD, run, None if forced_ids is None else forced_ids[layer_idx].long())
    run.logits_TV = _normed(x_TD, weights.norm_D, eps) @ weights.head_VD.double().T
    return run


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight.double()


def _wide(linear: LinearWeights) -> Tensor:
    if linear.scale_nk is None:
        return linear.weight_NK.double()
    num_rows, num_columns = linear.weight_NK.shape
    scale_NK = linear.scale_nk.double().repeat_interleave(SCALE_BLOCK, 0)[:num_rows].repeat_interleave(SCALE_BLOCK, 1)[:, :num_columns]
    return linear.weight_NK.double() * scale_NK


def _attention(weights: GpuWeights, layer: GpuLayer, normed_TD: Tensor) -> Tensor:
    config, num_tokens = weights.config, normed_TD.shape[0]
    num_heads, num_kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    q_TC, k_TC, v_TC = torch.split(normed_TD @ _wide(layer.qkv).T, [n * dim for n in (num_heads, num_kv_heads, num_kv_heads)], -1)

    def heads(x_TC: Tensor, weight: Tensor | None) -> Tensor:
        """Normed over the head or over all of them, as the weight is wide, and turned: [heads, T, Dh]."""
        if weight is not None and layer.qk_norm is not None:
            row = x_TC if weight.numel() == x_TC.shape[1] else x_TC.view(num_tokens, -1, dim)
            x_TC = _normed(row, weight, layer.qk_norm.eps)
        x_HTD = x_TC.reshape(num_tokens, -1, dim).transpose(0, 1)
        cos_TD, sin_TD = weights.rope.cos_PD[:num_tokens].double(), weights.rope.sin_PD[:num_tokens].double()
        return x_HTD * cos_TD + torch.cat((x_HTD[..., dim // 2 :], x_HTD[..., : dim // 2]), -1) * sin_TD

    norm = layer.qk_norm
    q_HTD, k_NTD = heads(q_TC, norm.q_weight if norm else None), heads(k_TC, norm.k_weight if norm else None)
    v_NTD = v_TC.view(num_tokens, num_kv_heads, dim).transpose(0, 1)
    k_HTD, v_HTD = (x.repeat_interleave(num_heads // num_kv_heads, 0) for x in (k_NTD, v_NTD))
    hidden_TT = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=normed_TD.device).triu_(1)
    out_HTD = torch.softmax((q_HTD @ k_HTD.mT * dim**-0.5).masked_fill_(hidden_TT, -torch.inf), -1) @ v_HTD
    return out_HTD.transpose(0, 1).reshape(num_tokens, -1) @ _wide(layer.out).T


def _experts(weights: GpuWeights, layer: GpuLayer, x_TD: Tensor, run: Float64Run, ids_TK: Tensor | None) -> Tensor:
    config, num_tokens = weights.config, x_TD.shape[0]
    logits_TE = x_TD.new_zeros(num_tokens, 1) if layer.router_ED is None else x_TD @ layer.router_ED.double().T
    if ids_TK is None:
        ids_TK = logits_TE.sort(dim=-1, descending=True, stable=True).indices[:, : config.top_k]
    run.router_logits.append(logits_TE)
    run.ids.append(ids_TK)
    share_TK = logits_TE.softmax(-1).gather(1, ids_TK)
    if config.normalises_topk:
        share_TK = share_TK / share_TK.sum(-1, keepdim=True)
    gate_up_EFD, down_EDF = dequantised(layer.experts)
    y_TD = torch.zeros_like(x_TD)
    for expert in range(config.num_experts):
        token_X, rank_X = (ids_TK == expert).nonzero(as_tuple=True)
        gate_XF, up_XF = (x_TD[token_X] @ gate_up_EFD[expert].T).chunk(2, -1)
        rows_XD = (gate_XF * torch.sigmoid(gate_XF) * up_XF) @ down_EDF[expert].T
        y_TD.index_add_(0, token_X, share_TK[token_X, rank_X, None] * rows_XD)
    return y_TD
