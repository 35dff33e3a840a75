"""Residual addition and RMS norm against float64, in odd sizes, with poisoned outputs, and free of the rows beside them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from duomo_kernels._bounds import bound, error
from duomo_kernels.add_rms_norm import MAX_WIDTH, add_rms_norm, add_rms_norm_reference

EPS = 1e-6


def _inputs(tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    make = torch.Generator(device).manual_seed(tokens * 10_007 + width)
    x_TD, residual_TD = (torch.randn(tokens, width, generator=make, device=device).to(dtype) for _ in range(2))
    return x_TD, residual_TD, torch.randn(width, generator=make, device=device).to(dtype)


def _poisoned(like: Tensor) -> Tensor:
    return torch.full_like(like, float("nan"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("tokens", "width"), [(1, 256), (63, 63), (257, 1), (3, 2048), (2, MAX_WIDTH), (5, 2880)])
def test_sum_and_norm(tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    x_TD, residual_TD, weight_D = _inputs(tokens, width, dtype, device)
    expected_TD, sum_TD = add_rms_norm_reference(x_TD, weight_D, EPS, residual_TD)
    out_TD = add_rms_norm(x_TD, weight_D, EPS, residual_TD, out_TD=_poisoned(x_TD))
    assert error(out_TD, expected_TD) <= bound(dtype)
    assert error(residual_TD, sum_TD) <= bound(dtype)
    if device.type == "cuda":  # to the last bit; Triton's interpreter cuts bf16 instead of rounding it
        assert torch.equal(residual_TD, sum_TD.float().to(dtype))


@pytest.mark.parametrize(("tokens", "width"), [(1, 2048), (9, 63)])
def test_first_norm_has_no_residual(tokens: int, width: int, device: torch.device) -> None:
    x_TD, _, weight_D = _inputs(tokens, width, torch.bfloat16, device)
    before_TD = x_TD.clone()
    out_TD = add_rms_norm(x_TD, weight_D, EPS, out_TD=_poisoned(x_TD))
    assert error(out_TD, add_rms_norm_reference(x_TD, weight_D, EPS)[0]) <= bound(torch.bfloat16)
    assert torch.equal(x_TD, before_TD)


def test_weight_may_be_wider_and_out_may_be_x(device: torch.device) -> None:
    x_TD, residual_TD, _ = _inputs(7, 96, torch.bfloat16, device)
    weight_D = torch.randn(96, device=device)
    expected_TD, _ = add_rms_norm_reference(x_TD, weight_D, EPS, residual_TD)
    assert error(add_rms_norm(x_TD, weight_D, EPS, residual_TD, out_TD=x_TD), expected_TD) <= bound(torch.bfloat16)


@pytest.mark.parametrize("width", [63, 1024])
def test_a_row_has_the_same_bits_in_every_batch(width: int, device: torch.device) -> None:
    x_TD, residual_TD, weight_D = _inputs(67, width, torch.bfloat16, device)
    whole_residual_TD = residual_TD.clone()
    whole_TD = add_rms_norm(x_TD, weight_D, EPS, whole_residual_TD)
    for rows in (slice(0, 1), slice(5, 6), slice(31, 67)):
        part_residual_TD = residual_TD[rows].clone()
        assert torch.equal(add_rms_norm(x_TD[rows].clone(), weight_D, EPS, part_residual_TD), whole_TD[rows])
        assert torch.equal(part_residual_TD, whole_residual_TD[rows])


def test_memory_beside_the_rows_stays(device: torch.device) -> None:
    x_TD, residual_TD, weight_D = _inputs(5, 63, torch.bfloat16, device)
    around = torch.full((7, 63), 7.0, dtype=torch.bfloat16, device=device)
    around[1:6] = residual_TD
    out = torch.full_like(around, 7.0)
    add_rms_norm(x_TD, weight_D, EPS, around[1:6], out_TD=out[1:6])
    for edges in (around[[0, 6]], out[[0, 6]]):
        assert bool((edges == 7.0).all())


def test_zero_rows_and_no_rows(device: torch.device) -> None:
    weight_D = torch.ones(64, dtype=torch.bfloat16, device=device)
    zeros_TD = torch.zeros(3, 64, dtype=torch.bfloat16, device=device)
    assert not add_rms_norm(zeros_TD, weight_D, EPS, zeros_TD.clone(), out_TD=_poisoned(zeros_TD)).any()
    assert add_rms_norm(zeros_TD[:0], weight_D, EPS).shape == (0, 64)


def test_a_broken_norm_fails(device: torch.device) -> None:
    x_TD, residual_TD, weight_D = _inputs(63, 257, torch.bfloat16, device)
    good_TD, _ = add_rms_norm_reference(x_TD, weight_D, EPS, residual_TD)

    def run(x: Tensor = x_TD, weight: Tensor = weight_D, eps: float = EPS, residual: Tensor | None = residual_TD) -> float:
        return error(add_rms_norm(x, weight, eps, None if residual is None else residual.clone()), good_TD)

    assert run() <= bound(torch.bfloat16)
    one_off_TD = x_TD.clone()
    one_off_TD[40, 3] += 4.0
    broken = [run(residual=None), run(x=one_off_TD), run(weight=weight_D.roll(1)), run(eps=0.1), run(weight=weight_D * 1.02)]
    assert all(wrong > bound(torch.bfloat16) for wrong in broken), broken


def test_wrong_arguments_are_refused(device: torch.device) -> None:
    x_TD, residual_TD, weight_D = _inputs(4, 64, torch.bfloat16, device)
    wrong = [
        partial(add_rms_norm, x_TD.t(), weight_D, EPS),
        partial(add_rms_norm, x_TD, weight_D[:63], EPS),
        partial(add_rms_norm, x_TD, weight_D, EPS, residual_TD.float()),
        partial(add_rms_norm, x_TD, weight_D, EPS, residual_TD, out_TD=residual_TD),
    ]
    for call in wrong:
        with pytest.raises(AssertionError):
            call()


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "width"), [(16_384, 2048), (1_024, 4096), (257, 7168)])
def test_real_shapes(tokens: int, width: int, device: torch.device) -> None:
    x_TD, residual_TD, weight_D = _inputs(tokens, width, torch.bfloat16, device)
    expected_TD, _ = add_rms_norm_reference(x_TD, weight_D, EPS, residual_TD)
    again_TD = residual_TD.clone()
    out_TD = add_rms_norm(x_TD, weight_D, EPS, residual_TD, out_TD=_poisoned(x_TD))
    assert error(out_TD, expected_TD) <= bound(torch.bfloat16)
    assert torch.equal(add_rms_norm(x_TD, weight_D, EPS, again_TD), out_TD)
