"""Owns the quantisation of experts' weights to fp8 with a scale for every block of 128 x 128, and one expert's way back. Knows no kernel.

scale[e, i, j] = max |w[e, 128 i : 128 i + 128, 128 j : 128 j + 128]| / 448,   stored = e4m3(w / scale)
"""

from __future__ import annotations

import torch
from torch import Tensor

from duomo_kernels._weights import SCALE_BLOCK, ExpertWeights, dequantised


def quantise_blocks_fp8(wide_ENK: Tensor) -> tuple[Tensor, Tensor]:
    """[E, N, K] -> (float8_e4m3fn of that shape, scales [E, ceil(N / 128), ceil(K / 128)]): each block's largest number is stored as 448,
    a block of zeros has scale 1."""
    num_experts, rows, columns = wide_ENK.shape
    r, c = -(-rows // SCALE_BLOCK), -(-columns // SCALE_BLOCK)
    padded = torch.nn.functional.pad(wide_ENK.float(), (0, c * SCALE_BLOCK - columns, 0, r * SCALE_BLOCK - rows))
    blocks = padded.view(num_experts, r, SCALE_BLOCK, c, SCALE_BLOCK)
    top = blocks.abs().amax(dim=(2, 4), keepdim=True)
    scale = torch.where(top > 0, top / 448.0, 1.0)
    stored = (blocks / scale).clamp_(-448.0, 448.0).view(padded.shape)[:, :rows, :columns].to(torch.float8_e4m3fn)
    return stored.contiguous(), scale.view(num_experts, r, c).contiguous()


def quantise_weights_fp8(gate_up_EFD: Tensor, down_EDF: Tensor) -> ExpertWeights:
    """A layer's experts, each tensor as quantise_blocks_fp8 does it."""
    (gate_up, gate_up_scale), (down, down_scale) = quantise_blocks_fp8(gate_up_EFD), quantise_blocks_fp8(down_EDF)
    return ExpertWeights(gate_up_EFD=gate_up, down_EDF=down, gate_up_scale_Efd=gate_up_scale, down_scale_Edf=down_scale)


def dequantised_expert(weights: ExpertWeights, expert: int) -> tuple[Tensor, Tensor]:
    """One expert's matrices in float64: all of a large layer would not fit."""
    assert weights.gate_up_scale_Efd is not None and weights.down_scale_Edf is not None, "fp8 weights have scales"
    one = slice(expert, expert + 1)
    gate_up_EFD, down_EDF = dequantised(
        ExpertWeights(
            gate_up_EFD=weights.gate_up_EFD[one],
            down_EDF=weights.down_EDF[one],
            gate_up_scale_Efd=weights.gate_up_scale_Efd[one],
            down_scale_Edf=weights.down_scale_Edf[one],
        )
    )
    return gate_up_EFD[0], down_EDF[0]
