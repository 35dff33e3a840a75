"""Activations in fp8: the formula to the last bit but for ties, scales exact, nothing saturated, zeros kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from duomo_kernels._bounds import bound, error
from duomo_kernels.quantise_rows_fp8 import dequantise_rows, num_groups, quantise_rows_fp8, quantise_rows_fp8_reference

FP8 = torch.float8_e4m3fn


def poisoned(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise into outputs that hold NaN."""
    q_TD = torch.full(x_TD.shape, 0x7F, dtype=torch.uint8, device=x_TD.device).view(FP8)
    scale_TG = torch.full((x_TD.shape[0], num_groups(x_TD.shape[1])), torch.nan, device=x_TD.device)
    out = quantise_rows_fp8(x_TD, q_TD=q_TD, scale_TG=scale_TG)
    assert out[0] is q_TD and out[1] is scale_TG
    return out


def place_of(q: Tensor) -> Tensor:
    """Where a number of e4m3 stands among all of them; both zeros at 0."""
    bits = q.view(torch.uint8).int()
    return torch.where(bits >= 128, 128 - bits, bits)


@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (2, 128), (5, 257), (2, 2049)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equal_to_the_reference(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    # Sizes over 13 binades, so that e4m3's subnormals are met too.
    x_TD = (torch.randn(shape) * torch.exp2(torch.randint(-12, 2, shape).float())).to(dtype).to(device)
    q_TD, scale_TG = poisoned(x_TD)
    expected_q, expected_scale = quantise_rows_fp8_reference(x_TD)
    assert float((scale_TG / expected_scale - 1).abs().max()) <= 2.0**-22
    # 448 / m is rounded before the product is: where that falls on the other side of a tie, the next number of e4m3 comes out.
    steps = (place_of(q_TD) - place_of(expected_q)).abs()
    assert int(steps.max()) <= 1 and float((steps > 0).float().mean()) <= 0.01
    assert error(dequantise_rows(q_TD, scale_TG), x_TD.double()) <= bound(FP8)


def test_largest_is_448_and_zeros_stay(device: torch.device) -> None:
    x_TD = torch.zeros(4, 300, dtype=torch.bfloat16)
    x_TD[1, 129], x_TD[2, 299], x_TD[3, 0] = -3.0, 1e-30, torch.finfo(torch.bfloat16).max
    q_TD, scale_TG = poisoned(x_TD.to(device))
    assert float(q_TD[1, 129]) == -448.0 and float(q_TD[2, 299]) > 0 and float(q_TD[3, 0]) == 448.0
    assert bool((scale_TG > 0).all()) and int((q_TD.float() != 0).sum()) == 3


def test_the_wrong_scale_is_noticed(device: torch.device) -> None:
    x_TD = torch.randn(3, 300, device=device).bfloat16()
    x_TD[:, 128:] *= 4
    q_TD, scale_TG = poisoned(x_TD)
    assert error(dequantise_rows(q_TD, scale_TG.roll(1, 1)), x_TD.double()) > bound(FP8)


def test_no_tokens(device: torch.device) -> None:
    q_TD, scale_TG = quantise_rows_fp8(torch.empty(0, 200, dtype=torch.bfloat16, device=device))
    assert q_TD.shape == (0, 200) and scale_TG.shape == (0, 2)


def test_strides_are_refused(device: torch.device) -> None:
    with pytest.raises(AssertionError, match="strides"):
        quantise_rows_fp8(torch.zeros(4, 8, dtype=torch.bfloat16, device=device).T)
