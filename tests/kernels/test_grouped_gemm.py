"""The experts' feed-forward against its formula, and bit for bit free of the rows beside it."""

from __future__ import annotations

import pytest
import torch

from duomo_kernels.grouped_gemm import grouped_gemm, grouped_gemm_reference, silu_mul
from duomo_kernels.row_gemm import TILE_ROWS, RowGemm, row_gemm_for

WAYS = [row_gemm_for(((96, 80), (40, 96)), 64), RowGemm(is_chain=False)]
BOTH = pytest.mark.parametrize("gemm", WAYS, ids=lambda gemm: gemm.name)
GATE_UP, DOWN = torch.randn(5, 96, 80) / 10, torch.randn(5, 40, 96) / 10


def run(gemm: RowGemm, x: torch.Tensor, counts: list[int]) -> torch.Tensor:
    padded = torch.cat((x, torch.zeros(TILE_ROWS, x.shape[1])))
    return grouped_gemm(gemm, padded, counts, list(GATE_UP), list(DOWN))[: x.shape[0]]


@BOTH
@pytest.mark.parametrize("counts", [[1, 0, 0, 0, 0], [0, 3, 17, 0, 1], [63, 1, 1, 1, 191]])
def test_close_to_the_reference(gemm: RowGemm, counts: list[int]) -> None:
    x = torch.randn(sum(counts), 96)
    out, expected = run(gemm, x, counts), grouped_gemm_reference(x, counts, GATE_UP, DOWN)
    # 96 + 40 products summed and an exp: at most some 150 roundings of values of order one
    assert (out - expected).abs().max() <= 150 * 2.0**-24 * max(1.0, float(expected.abs().max()))
    assert not torch.equal(run(gemm, x, counts[::-1]), out) or counts == counts[::-1]  # the wrong experts are noticed


@BOTH
def test_rows_stand_alone(gemm: RowGemm) -> None:
    x = torch.randn(40, 96)
    whole = run(gemm, x, [0, 40, 0, 0, 0])
    for row in (0, 1, 15, 16, 39):
        assert torch.equal(run(gemm, x[row : row + 1], [0, 1, 0, 0, 0]), whole[row : row + 1])
        assert torch.equal(run(gemm, torch.cat((x[:7], x[row : row + 1], x[:3])), [7, 1, 0, 0, 3])[7:8], whole[row : row + 1])


@pytest.mark.parametrize("rows", [1, 2, 3, 15, 31, 63])
def test_silu_is_the_same_in_the_last_lanes(rows: int) -> None:
    x = torch.randn(257, 50)
    assert torch.equal(silu_mul(x[:rows]), silu_mul(x)[:rows])
    gate, up = x.double().chunk(2, -1)
    assert torch.allclose(silu_mul(x).double(), torch.nn.functional.silu(gate) * up, rtol=1e-6, atol=1e-7)
