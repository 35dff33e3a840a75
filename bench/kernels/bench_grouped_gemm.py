"""The experts' feed-forward against torch.nn.functional.linear expert by expert, as transformers runs it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from bench.stopwatch import Measured, refuse_unless, report, side_by_side
from duomo_kernels.grouped_gemm import grouped_gemm, grouped_gemm_reference
from duomo_kernels.row_gemm import TILE_ROWS, row_gemm_for


def peer(x: Tensor, counts: list[int], gate_up: Tensor, down: Tensor) -> Tensor:
    """Weights [E, 2F, D] and [E, D, F], torch's usual layout."""
    out = []
    for expert, rows in enumerate(torch.split(x, counts)):
        gate, up = linear(rows, gate_up[expert]).chunk(2, -1)
        out.append(linear(silu(gate) * up, down[expert]))
    return torch.cat(out)


def measure(repeats: int) -> list[Measured]:
    gemm = row_gemm_for(((256, 256), (128, 256)), 64)
    gate_up, down = torch.randn(16, 256, 256) / 16, torch.randn(16, 128, 256) / 12
    usual = gate_up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    results = []
    for tokens in (1, 16, 1500):
        counts = torch.bincount(torch.rand(tokens, 16).topk(4).indices.flatten(), minlength=16).tolist()
        x = torch.cat((torch.randn(tokens * 4, 256), torch.zeros(TILE_ROWS, 256)))
        expected = grouped_gemm_reference(x[:-TILE_ROWS], counts, gate_up, down)
        out = grouped_gemm(gemm, x, counts, list(gate_up), list(down))[:-TILE_ROWS]
        refuse_unless(torch.allclose(out, expected, atol=1e-4), "grouped_gemm")
        ours = lambda x=x, c=counts: grouped_gemm(gemm, x, c, list(gate_up), list(down))  # noqa: E731 - a case, not a function
        theirs = lambda x=x[:-TILE_ROWS], c=counts: peer(x, c, *usual)  # noqa: E731 - a case, not a function
        results.append(side_by_side(f"{gemm.name} {tokens} tokens top 4 of 16", ours, "F.linear", theirs, repeats=repeats))
    return results


if __name__ == "__main__":
    report("grouped_gemm", measure)
