"""RMS norm and rope against their formulas, and free of the rows beside them."""

from __future__ import annotations

import pytest
import torch

from duomo_kernels.norm_rope import rms_norm, rms_norm_reference, rms_weight, rope, rope_reference, rope_tables

ULP = 2.0**-23


@pytest.mark.parametrize("shape", [(1, 256), (17, 63), (5, 6, 64)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape), torch.randn(shape[-1:] if len(shape) == 2 else shape[1:])
    expected = rms_norm_reference(x, weight, 1e-6)
    # the mean of D squares, a root and two products: D/2 + 4 roundings at most
    assert ((rms_norm(x, rms_weight(weight, 1e-6)) - expected).abs() <= (shape[-1] / 2 + 4) * ULP * expected.abs()).all()


def test_rope() -> None:
    x = torch.randn(257, 3, 64)
    cos, sin = rope_tables(300, 64, 10000.0)
    picked = torch.arange(257) + 40
    out = rope(x, cos[picked].unsqueeze(1), sin[picked].unsqueeze(1))
    assert torch.equal(out, rope_reference(x, cos[picked], sin[picked]))
    assert torch.allclose(out.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)  # a rotation


def test_position_zero_turns_nothing() -> None:
    x = torch.randn(1, 2, 64)
    cos, sin = rope_tables(1, 64, 1e6)
    assert torch.equal(rope(x, cos.unsqueeze(1), sin.unsqueeze(1)), x)


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 63])
def test_rows_stand_alone(rows: int) -> None:
    x, weight = torch.randn(257, 6, 64), rms_weight(torch.randn(6, 64), 1e-6)
    cos, sin = (table.unsqueeze(1) for table in rope_tables(257, 64, 10000.0))
    whole = rope(rms_norm(x, weight), cos, sin)
    for start in (0, 1, 31):
        part = slice(start, start + rows)
        assert torch.equal(rope(rms_norm(x[part], weight), cos[part], sin[part]), whole[part])
