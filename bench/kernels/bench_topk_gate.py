"""The gate against a full sort."""

from __future__ import annotations

import torch

from bench.stopwatch import Measured, refuse_unless, report, side_by_side
from duomo_kernels.topk_gate import topk_gate, topk_gate_reference


def measure(repeats: int) -> list[Measured]:
    results = []
    for rows in (1, 16, 1500):
        logits = torch.randn(rows, 16)
        refuse_unless(torch.equal(topk_gate(logits, 4, True)[1], topk_gate_reference(logits, 4, True)[1]), "topk_gate")
        ours, peer = (lambda x=logits: topk_gate(x, 4, True)), (lambda x=logits: topk_gate_reference(x, 4, True))
        results.append(side_by_side(f"{rows}x16 top 4", ours, "full sort", peer, repeats=repeats))
    return results


if __name__ == "__main__":
    report("topk_gate", measure)
