"""The weighted sum against index_add_ in float32, as transformers sums."""

from __future__ import annotations

import torch

from bench.stopwatch import Measured, refuse_unless, report, side_by_side
from duomo_kernels.combine import combine, combine_reference


def measure(repeats: int) -> list[Measured]:
    results = []
    for tokens in (1, 16, 1500):
        rows, weights, routed = torch.randn(tokens * 4, 256), torch.rand(tokens, 4), torch.randperm(tokens * 4)
        refuse_unless(torch.allclose(combine(rows, routed, weights), combine_reference(rows, routed, weights), atol=1e-5), "combine")
        token, scale = routed // 4, weights.flatten()[routed, None]
        ours = lambda r=rows, i=routed, w=weights: combine(r, i, w)  # noqa: E731 - a case, not a function
        theirs = lambda n=tokens, r=rows, t=token, s=scale: torch.zeros(n, 256).index_add_(0, t, r * s)  # noqa: E731 - a case, not a function
        results.append(side_by_side(f"{tokens} tokens top 4", ours, "index_add_", theirs, repeats=repeats))
    return results


if __name__ == "__main__":
    report("combine", measure)
