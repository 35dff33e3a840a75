"""Row-exact products against torch.mm of the same shape. A decode step's and a prefill's rows."""

from __future__ import annotations

import torch

from bench.stopwatch import Measured, refuse_unless, report, side_by_side
from duomo_kernels.row_gemm import row_gemm_for, row_gemm_reference

SHAPES = ((1, 256, 512), (16, 256, 512), (16, 256, 8192), (1500, 256, 512))


def measure(repeats: int) -> list[Measured]:
    return [shape_case(*shape, repeats) for shape in SHAPES]


def shape_case(num_rows: int, num_k: int, num_n: int, repeats: int) -> Measured:
    gemm = row_gemm_for(((256, 512), (256, 8192)), 64)
    x, w = torch.randn(num_rows, num_k), torch.randn(num_k, num_n)
    is_close = torch.allclose(gemm.mm(x[:16], w[:, :64].contiguous()), row_gemm_reference(x[:16], w[:, :64]), atol=1e-3)
    refuse_unless(is_close and torch.equal(gemm.mm(x, w)[:1], gemm.mm(x[:1], w)), "row_gemm")
    case = f"{gemm.name} {num_rows}x{num_k}x{num_n}"
    return side_by_side(case, lambda: gemm.mm(x, w), "torch.mm", lambda: torch.mm(x, w), repeats=repeats)


if __name__ == "__main__":
    report("row_gemm", measure)
