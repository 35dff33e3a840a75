"""Owns fp8 e4m3 weights with block scales, as DeepSeek-V3 and Qwen3-FP8 ship them. Knows nothing of files.

w[i, j] = float(q[i, j]) * scale[i // block_rows, j // block_cols]      edges may be shorter than a block
"""

from __future__ import annotations

import torch
from torch import Tensor


def quant_fp8_reference(q_NK: Tensor, scale_nk: Tensor, block: tuple[int, int]) -> Tensor:
    """The formula, block by block."""
    out_NK = torch.empty(q_NK.shape, dtype=torch.float32)
    for i in range(0, q_NK.shape[0], block[0]):
        for j in range(0, q_NK.shape[1], block[1]):
            out_NK[i : i + block[0], j : j + block[1]] = (
                q_NK[i : i + block[0], j : j + block[1]].float() * scale_nk[i // block[0], j // block[1]]
            )
    return out_NK


def num_scales(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """Scales that a weight of this shape carries."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def quant_fp8(q_NK: Tensor, scale_nk: Tensor, block: tuple[int, int]) -> Tensor:
    """Dequantise [N, K] float8_e4m3fn with scales [ceil(N / b0), ceil(K / b1)] to float32, rounded once."""
    assert tuple(scale_nk.shape) == num_scales((q_NK.shape[0], q_NK.shape[1]), block), (q_NK.shape, scale_nk.shape, block)
    wide = scale_nk.float().repeat_interleave(block[0], 0)[: q_NK.shape[0]].repeat_interleave(block[1], 1)[:, : q_NK.shape[1]]
    return q_NK.float().mul_(wide)
