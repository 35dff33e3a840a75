"""Owns the one error metric of the kernels and the one table of bounds. Knows no operation.

    error(out, ref) = max over rows of ||out[r] - ref[r]|| / ||ref[r]||      rows along the last axis, ref in float64

NaN or infinity anywhere makes it infinite, and so does anything but zeros where ref's row is zero: a poisoned output that was not
written, or one wrong row among thousands, cannot hide in an average.

Bounds count roundings. One rounding to a format with p bits of precision moves each element by at most 2^-p of itself, and, spread
evenly, by 2^-p / sqrt(3) in the mean square; independent roundings add in squares, so n of them stay near sqrt(n / 3) 2^-p and below
2^(1-p) for n up to twelve. A fully fused operation rounds once; the longest chain, a MoE layer, rounds four times (activation, expert
row, product with the gate's weight where that is in bf16, output).
"""

from __future__ import annotations

import torch
from torch import Tensor

BOUNDS: dict[torch.dtype, float] = {
    torch.float64: 2.0**-40,
    torch.float32: 2.0**-16,  # p = 24; sums of up to 2^14 terms whose partial sums round: sqrt(2^14) 2^-24 = 2^-17, one bit spare
    torch.float16: 2.0**-10,  # p = 11
    torch.bfloat16: 2.0**-7,  # p = 8
    torch.float8_e4m3fn: 2.0**-3,  # p = 4, against the unquantised operand
}


def error(out: Tensor, ref: Tensor) -> float:
    """The metric above; `ref` of the same shape, computed in float64."""
    assert out.shape == ref.shape, (out.shape, ref.shape)
    if out.numel() == 0:
        return 0.0
    out_RN, ref_RN = (t.detach().to(torch.float64).reshape(-1, t.shape[-1] if t.ndim else 1) for t in (out, ref.to(out.device)))
    if not bool(torch.isfinite(out_RN).all()):
        return float("inf")
    wrong_R, size_R = (out_RN - ref_RN).norm(dim=-1), ref_RN.norm(dim=-1)
    ratio_R = torch.where(size_R > 0, wrong_R / size_R, torch.where(wrong_R > 0, torch.inf, 0.0))
    return float(ratio_R.max())


def bound(dtype: torch.dtype) -> float:
    """The largest error() of an operation whose operands and output are of this dtype."""
    return BOUNDS[dtype]
