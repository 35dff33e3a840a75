"""RMS norm against torch's own, and rope against its formula in two halves."""

from __future__ import annotations

import torch

from bench.stopwatch import Measured, refuse_unless, report, side_by_side
from duomo_kernels.norm_rope import rms_norm, rms_norm_reference, rms_weight, rope, rope_reference, rope_tables


def measure(repeats: int) -> list[Measured]:
    results = []
    cos, sin = rope_tables(1500, 64, 1e4)
    for rows in (1, 16, 1500):
        x, weight, heads = torch.randn(rows, 256), torch.rand(256), torch.randn(rows, 6, 64)
        scaled = rms_weight(weight, 1e-6)
        c, s = cos[:rows], sin[:rows]
        c1, s1 = c.unsqueeze(1), s.unsqueeze(1)
        refuse_unless(torch.allclose(rms_norm(x, scaled), rms_norm_reference(x, weight, 1e-6), rtol=1e-4), "rms_norm")
        refuse_unless(torch.equal(rope(heads, c1, s1), rope_reference(heads, c, s)), "rope")
        norm = (lambda x=x, w=scaled: rms_norm(x, w), lambda x=x, w=weight: torch.nn.functional.rms_norm(x, (256,), w, 1e-6))
        results.append(side_by_side(f"rms_norm {rows}x256", norm[0], "F.rms_norm", norm[1], repeats=repeats))
        turn = (lambda h=heads, c=c1, s=s1: rope(h, c, s), lambda h=heads, c=c, s=s: rope_reference(h, c, s))
        results.append(side_by_side(f"rope {rows}x6x64", turn[0], "two halves", turn[1], repeats=repeats))
    return results


if __name__ == "__main__":
    report("norm_rope", measure)
