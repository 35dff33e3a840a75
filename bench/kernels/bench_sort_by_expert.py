"""The order by expert against torch.sort alone, its floor."""

from __future__ import annotations

import torch

from bench.stopwatch import Measured, refuse_unless, report, side_by_side
from duomo_kernels.sort_by_expert import sort_by_expert, sort_by_expert_reference


def measure(repeats: int) -> list[Measured]:
    results = []
    for rows in (1, 16, 1500):
        ids = torch.rand(rows, 16).topk(4).indices
        refuse_unless(torch.equal(sort_by_expert(ids, 16).routed_R, sort_by_expert_reference(ids, 16).routed_R), "sort_by_expert")
        ours, peer = (lambda x=ids: sort_by_expert(x, 16)), (lambda x=ids: torch.argsort(x.flatten(), stable=True))
        results.append(side_by_side(f"{rows} tokens top 4", ours, "torch.argsort", peer, repeats=repeats))
    return results


if __name__ == "__main__":
    report("sort_by_expert", measure)
