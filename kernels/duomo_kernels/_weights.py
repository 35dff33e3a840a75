"""Owns the tensors of one layer's experts, as the GPU kernels read them. Knows no kernel and no file format.

The summed axis lies last, so that a program streams rows of contiguous weights. Gate and up are one tensor: rows 0 .. F-1 of
gate_up_EFD are the gate, rows F .. 2F-1 the up projection. In fp8 every block of 128 x 128 weights (edges may be shorter) has a scale:

    weight[e, i, j] = float(stored[e, i, j]) * scale[e, i // 128, j // 128]      rows i of gate and up counted through, 0 .. 2F-1

Legend: E experts, F expert hidden, D model; f, d blocks of 128 (of gate_up's 2F rows too: ceil(2F / 128)).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from duomo_kernels._launch import check

SCALE_BLOCK = 128  # both sides of the block that shares a scale, as DeepSeek-V3 and Qwen3-FP8 ship it


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertWeights:
    """gate_up_EFD [E, 2F, D], down_EDF [E, D, F]: both bf16 without scales, or both float8_e4m3fn with float32 scales
    gate_up_scale_Efd [E, ceil(2F / 128), ceil(D / 128)] and down_scale_Edf [E, ceil(D / 128), ceil(F / 128)]."""

    gate_up_EFD: Tensor
    down_EDF: Tensor
    gate_up_scale_Efd: Tensor | None = None
    down_scale_Edf: Tensor | None = None

    def __post_init__(self) -> None:
        num_experts, dim, hidden = self.down_EDF.shape
        dtype, device = self.down_EDF.dtype, self.down_EDF.device
        check("gate_up_EFD", self.gate_up_EFD, dtype, num_experts, 2 * hidden, dim, device=device)
        check("down_EDF", self.down_EDF, dtype, num_experts, dim, hidden)
        if dtype != torch.float8_e4m3fn:
            assert self.gate_up_scale_Efd is None and self.down_scale_Edf is None, f"scales beside {dtype} weights"
            return
        assert self.gate_up_scale_Efd is not None and self.down_scale_Edf is not None, "fp8 weights without scales"
        dim_blocks, hidden_blocks, joined_blocks = (-(-n // SCALE_BLOCK) for n in (dim, hidden, 2 * hidden))
        check("gate_up_scale_Efd", self.gate_up_scale_Efd, torch.float32, num_experts, joined_blocks, dim_blocks, device=device)
        check("down_scale_Edf", self.down_scale_Edf, torch.float32, num_experts, dim_blocks, hidden_blocks, device=device)

    @property
    def num_experts(self) -> int:
        return self.down_EDF.shape[0]

    @property
    def dim(self) -> int:
        return self.down_EDF.shape[1]

    @property
    def hidden(self) -> int:
        return self.down_EDF.shape[2]

    @property
    def is_fp8(self) -> bool:
        return self.down_EDF.dtype == torch.float8_e4m3fn


def dequantised(weights: ExpertWeights, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """(gate_up_EFD, down_EDF) with the scales multiplied in: what the references compute with."""

    def widen(stored: Tensor, scale: Tensor | None) -> Tensor:
        if scale is None:
            return stored.to(dtype)
        rows = scale.to(dtype).repeat_interleave(SCALE_BLOCK, 1)[:, : stored.shape[1]]
        return stored.to(dtype) * rows.repeat_interleave(SCALE_BLOCK, 2)[:, :, : stored.shape[2]]

    return widen(weights.gate_up_EFD, weights.gate_up_scale_Efd), widen(weights.down_EDF, weights.down_scale_Edf)
