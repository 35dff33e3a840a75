"""Owns one mixture-of-experts layer: gate, order, experts, combine. Knows no sequences, only rows.

Legend: T rows, D model, E experts, F expert hidden, K experts a token, R = T * K routed rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from duomo_kernels.combine import combine
from duomo_kernels.grouped_gemm import grouped_gemm
from duomo_kernels.row_gemm import TILE_ROWS, RowGemm
from duomo_kernels.sort_by_expert import sort_by_expert
from duomo_kernels.topk_gate import topk_gate


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """gate [D, E]; gate_up one [D, 2F] for each expert (gate first); down one [F, D] for each expert."""

    gate_DE: Tensor
    gate_up_EDF: list[Tensor]
    down_EFD: list[Tensor]

    @property
    def expert_bytes(self) -> int:
        """Of one expert, as held."""
        return self.gate_up_EDF[0].nbytes + self.down_EFD[0].nbytes


def expert_layer(gemm: RowGemm, x_TD: Tensor, weights: ExpertWeights, top_k: int, normalise: bool) -> tuple[Tensor, Tensor]:
    """Normed input [T, D] -> (output [T, D] before the residual, expert ids [T, K])."""
    weights_TK, ids_TK = topk_gate(gemm.mm(x_TD, weights.gate_DE), top_k, normalise)
    order = sort_by_expert(ids_TK, len(weights.gate_up_EDF))
    x_RD = x_TD.index_select(0, torch.cat((order.token_R, order.token_R[:1].expand(TILE_ROWS))))  # spare rows: any token, never read
    rows_RD = grouped_gemm(gemm, x_RD, order.counts, weights.gate_up_EDF, weights.down_EFD)
    return combine(rows_RD, order.routed_R, weights_TK), ids_TK
