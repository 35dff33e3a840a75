"""Owns the forward of a decoder on one GPU, layer by layer, over rows that lie on the device. Knows no sequence, batch or pool.

Pre-norm decoder: h += attention(norm(h)); h += experts(norm(h)); logits = norm(h) @ head.T. The sum is taken by the next norm, so rows
travel as a pair: what the last block gave, and the residual that has not received it yet.

Nothing here waits for the device or looks at a value on it: every call may be captured in a CUDA graph after one call without.

Legend: T rows, D model, V vocabulary, H query heads, N kv heads, Dh head dim, C = (H + 2N) * Dh, E experts, K experts a token, B blocks,
S block tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from duomo.models.gpu_weights import GpuLayer, GpuWeights, LinearWeights
from duomo_kernels._routing import GateRule
from duomo_kernels.add_rms_norm import add_rms_norm
from duomo_kernels.linear import linear
from duomo_kernels.moe_layer import LayerOptions, moe_layer
from duomo_kernels.qk_rope_write import qk_rope_write

MAX_DENSE_ROWS = 131072  # zeros kept for the one expert of a dense model: half a MiB

Attend = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
"""(q [T, H, Dh], k [T, N, Dh], v [T, N, Dh]) -> [T, H, Dh]; k and v are there where the place wants them packed, v as columns of qkv."""


@dataclass(slots=True)
class RowState:
    """Rows between two layers: x_TD is not yet added to the residual; before the first layer there is none. Both are overwritten."""

    x_TD: Tensor
    residual_TD: Tensor | None = None

    def select(self, row_S: Tensor) -> RowState:
        """Copies of these rows (int64): this state is left as it is."""
        residual_TD = self.residual_TD
        return RowState(take_rows(self.x_TD, row_S), None if residual_TD is None else take_rows(residual_TD, row_S))


@dataclass(frozen=True, kw_only=True, slots=True)
class KvPlace:
    """Where rows stand. slot_T int64 (block * S + offset; -1: no key is written), position_T int32; rows from num_valid [1] int32 on, on
    the device, take no expert. wants_packed: attention is given keys and values side by side, beside those in the pool."""

    slot_T: Tensor
    position_T: Tensor
    num_valid: Tensor | None = None
    wants_packed: bool = False


def take_rows(from_RD: Tensor, row_T: Tensor, out_TD: Tensor | None = None) -> Tensor:
    """Rows [T, D] of from_RD, whose numbers (int64) are row_T, in out_TD where given.

    Not index_select: of 16 rows or fewer its kernel on a GPU reads one after another (indexSelectSmallIndex,
    ATen/native/cuda/Indexing.cu), while gather reads all at once.
    """
    assert row_T.dtype == torch.int64, f"row_T: {row_T.dtype}, and gather takes int32 for what it is not"
    return torch.gather(from_RD, 0, row_T[:, None].expand(-1, from_RD.shape[1]), out=out_TD)


class GpuDecoder:
    """Weights and the forward of one layer; the caller owns the order of layers and the attention over keys of a sequence.

    With is_deterministic a row's bits depend on that row and its sequence alone, whatever the batch.
    """

    def __init__(self, weights: GpuWeights, *, is_deterministic: bool = False) -> None:
        self.weights = weights
        self.config = weights.config
        self.is_deterministic = is_deterministic
        self._rule = GateRule(top_k=self.config.top_k, normalise=self.config.normalises_topk)
        is_dense = any(layer.router_ED is None for layer in weights.layers)
        self._one_choice_T1 = torch.zeros(MAX_DENSE_ROWS, 1, device=weights.device) if is_dense else None

    @property
    def attention_scale(self) -> float:
        """What scores are multiplied with before softmax."""
        return float(self.config.head_dim**-0.5)

    def embed(self, token_id_T: Tensor, out_TD: Tensor | None = None) -> Tensor:
        """Token ids int64 [T], below the vocabulary -> rows [T, D] for a RowState, in out_TD where given."""
        return take_rows(self.weights.embed_VD, token_id_T, out_TD)

    def layer(
        self, layer_idx: int, rows: RowState, place: KvPlace, pool_B2NSD: Tensor, attend: Attend, *, out_TD: Tensor | None = None
    ) -> Tensor:
        """One layer over the rows, in place; writes their keys and values. Returns the experts' ids int32 [T, K], best first.

        out_TD: where rows.x_TD shall lie afterwards; it may be what it is now, unless that is the residual (before the first layer).
        """
        layer = self.weights.layers[layer_idx]
        heads_TC = self._attention(layer, self._normed(rows, layer.input_norm_D), place, pool_B2NSD, attend)
        rows.x_TD = self._product(heads_TC, layer.out)
        normed_TD = self._normed(rows, layer.post_norm_D)
        options = LayerOptions(num_valid=place.num_valid, is_deterministic=self.is_deterministic)
        logits_TE = self._router_logits(normed_TD, layer)
        answer = moe_layer(logits_TE, normed_TD, layer.experts, self._rule, options=options, out_TD=out_TD)
        rows.x_TD = answer.y_TD
        return answer.ids_TK

    def logits(self, rows: RowState, out: Tensor | None = None) -> Tensor:
        """float32 [T, V] of rows after the last layer, in `out` where given; their sum is taken here, so once."""
        normed_TD = self._normed(rows, self.weights.norm_D)
        return linear(normed_TD, self.weights.head_VD, out=out, out_dtype=torch.float32, is_deterministic=self.is_deterministic)

    def _normed(self, rows: RowState, weight_D: Tensor) -> Tensor:
        """Add what the last block gave to the residual, and norm the sum."""
        normed_TD = add_rms_norm(rows.x_TD, weight_D, self.config.norm_eps, rows.residual_TD)
        if rows.residual_TD is None:
            rows.residual_TD = rows.x_TD
        return normed_TD

    def _attention(self, layer: GpuLayer, normed_TD: Tensor, place: KvPlace, pool_B2NSD: Tensor, attend: Attend) -> Tensor:
        """Rows -> the heads' outputs, side by side [T, H * Dh]."""
        num_heads, num_kv_heads, dim = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        num_tokens = normed_TD.shape[0]
        qkv_TC = self._product(normed_TD, layer.qkv)
        k_TND, v_TND = None, None
        if place.wants_packed:
            k_TND = qkv_TC.new_empty(num_tokens, num_kv_heads, dim)
            v_TND = qkv_TC.view(num_tokens, -1, dim)[:, num_heads + num_kv_heads :]
        q_THD = qk_rope_write(
            qkv_TC, num_heads, pool_B2NSD, place.slot_T, place.position_T, self.weights.rope, layer.qk_norm, k_out_TND=k_TND
        )
        return attend(q_THD, k_TND, v_TND).view(num_tokens, num_heads * dim)

    def _product(self, x_TK: Tensor, weights: LinearWeights) -> Tensor:
        return linear(x_TK, weights.weight_NK, weights.scale_nk, is_deterministic=self.is_deterministic)

    def _router_logits(self, normed_TD: Tensor, layer: GpuLayer) -> Tensor:
        """float32 [T, E]; a dense layer's one expert has nothing to be weighed against."""
        num_tokens = normed_TD.shape[0]
        if layer.router_ED is not None:
            return linear(normed_TD, layer.router_ED, out_dtype=torch.float32, is_deterministic=self.is_deterministic)
        assert self._one_choice_T1 is not None and num_tokens <= MAX_DENSE_ROWS, num_tokens
        return self._one_choice_T1[:num_tokens]
