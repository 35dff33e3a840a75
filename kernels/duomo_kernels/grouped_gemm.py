"""Owns the experts' feed-forward over rows sorted by expert. Knows nothing of gates or tokens.

    y[r] = (silu(x[r] @ gate[e]) * (x[r] @ up[e])) @ down[e]        e the expert of row r

Legend: R routed rows, D model, F expert hidden, E experts. Weights are stored with the summed axis first ([D, 2F], [F, D]): that is the
layout in which products are row-exact and fastest (row_gemm.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from duomo_kernels.row_gemm import TILE_ROWS, RowGemm


def grouped_gemm_reference(x_RD: Tensor, counts: list[int], gate_up_EDF: Tensor, down_EFD: Tensor) -> Tensor:
    """The formula, expert by expert, in float64."""
    rows, out = torch.split(x_RD.double(), counts), []
    for expert, x in enumerate(rows):
        gate, up = (x @ gate_up_EDF[expert].double()).chunk(2, -1)
        out.append(gate * torch.sigmoid(gate) * up @ down_EFD[expert].double())
    return torch.cat(out).to(x_RD.dtype)


def silu_mul(gate_up_RF: Tensor) -> Tensor:
    """[R, 2F] -> silu(first half) * second half, [R, F].

    Written out as g / (1 + exp(-g)) * u: torch's own silu rounds otherwise in the last lanes of a tensor, exp does not.
    """
    gate_RF, up_RF = gate_up_RF.chunk(2, -1)
    denominator_RF = torch.neg(gate_RF).exp_().add_(1.0)
    return torch.div(gate_RF, denominator_RF, out=denominator_RF).mul_(up_RF)


def grouped_gemm(gemm: RowGemm, x_RD: Tensor, counts: list[int], gate_up_EDF: list[Tensor], down_EFD: list[Tensor]) -> Tensor:
    """x [R + TILE_ROWS, D], its first sum(counts) rows sorted by expert -> y of the same shape (spare rows are scratch)."""
    assert x_RD.shape[0] == sum(counts) + TILE_ROWS, (x_RD.shape, sum(counts))
    hidden_RF = x_RD.new_zeros(x_RD.shape[0], gate_up_EDF[0].shape[1])
    gemm.mm_segments(x_RD, counts, gate_up_EDF, hidden_RF)
    act_RF = silu_mul(hidden_RF)
    out_RD = torch.empty_like(x_RD)
    gemm.mm_segments(act_RF, counts, down_EFD, out_RD)
    return out_RD
