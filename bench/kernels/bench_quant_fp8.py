"""Dequantisation against a plain conversion of the same elements, its floor."""

from __future__ import annotations

import torch

from bench.stopwatch import Measured, refuse_unless, report, side_by_side
from duomo_kernels.quant_fp8 import num_scales, quant_fp8, quant_fp8_reference


def measure(repeats: int) -> list[Measured]:
    results = []
    for shape in ((128, 256), (2048, 2048)):
        q, scale = torch.randn(shape).to(torch.float8_e4m3fn), torch.rand(num_scales(shape, (128, 128)))
        refuse_unless(torch.equal(quant_fp8(q, scale, (128, 128)), quant_fp8_reference(q, scale, (128, 128))), "quant_fp8")
        ours, peer = (lambda q=q, s=scale: quant_fp8(q, s, (128, 128))), (lambda q=q: q.float())
        results.append(side_by_side(f"{shape[0]}x{shape[1]}", ours, "float()", peer, repeats=repeats))
    return results


if __name__ == "__main__":
    report("quant_fp8", measure)
