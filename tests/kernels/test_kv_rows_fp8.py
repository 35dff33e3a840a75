"""KV in fp8: the bytes are the definition's, errors stay in the derived bounds, what landed packs to itself, poison stays poison."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from duomo_kernels._bounds import bound, error
from duomo_kernels.kv_rows_fp8 import (
    MIN_EXPONENT,
    NAN_EXPONENT,
    kv_rows_fp8,
    kv_rows_fp8_reference,
    kv_rows_of_fp8,
    packed_bytes,
    split_packed,
)

FP8 = torch.float8_e4m3fn
SHAPES = [(1, 1), (1, 8), (15, 24), (63, 63), (64, 64), (64, 128), (257, 80)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def packed(x_RD: Tensor) -> Tensor:
    """Into memory that held something else."""
    packed_P = torch.full((packed_bytes(*x_RD.shape),), 0xA5, dtype=torch.uint8)
    kv_rows_fp8(x_RD, packed_P)
    return packed_P


def landed(packed_P: Tensor, head_dim: int) -> Tensor:
    x_RD = torch.full((packed_P.numel() // (head_dim + 1), head_dim), 5.0)
    kv_rows_of_fp8(packed_P, x_RD)
    return x_RD


def exponents(packed_P: Tensor, head_dim: int) -> Tensor:
    return split_packed(packed_P, head_dim)[1].int()


def of_many_sizes(num_rows: int, head_dim: int) -> Tensor:
    """Numbers over 20 binades within a row, so that e4m3's subnormals and its zero are met, in rows over 20 binades."""
    rows = torch.randint(-10, 10, (num_rows, 1)).float()
    return torch.randn(num_rows, head_dim) * torch.exp2(torch.randint(-20, 1, (num_rows, head_dim)).float() + rows)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_are_the_definitions(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x_RD = of_many_sizes(*shape).to(dtype)
    assert torch.equal(packed(x_RD), kv_rows_fp8_reference(x_RD))


def test_ties_and_the_last_number_below_a_scale() -> None:
    """Every number of e4m3 and the middle of every two of them, each in rows whose largest is just in reach, and just beyond."""
    number_C = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    middle_C = (number_C[1:] + number_C[:-1]) / 2
    row_D = torch.cat((number_C, middle_C, -number_C, -middle_C, torch.zeros(1)))
    beyond = torch.nextafter(torch.tensor(448.0), torch.tensor(1e9))
    x_RD = torch.stack((row_D, torch.cat((row_D[:-1], beyond[None]))))
    assert torch.equal(packed(x_RD), kv_rows_fp8_reference(x_RD))
    assert exponents(packed(x_RD), len(row_D)).tolist() == [127, 128]


@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_stay_in_the_derived_bounds(dtype: torch.dtype) -> None:
    x_RD = of_many_sizes(128, 128).to(dtype)
    packed_P = packed(x_RD)
    back_RD, wide_RD = landed(packed_P, 128).double(), x_RD.double()
    scale_R1 = torch.exp2(exponents(packed_P, 128).double() - 127)[:, None]
    assert bool((scale_R1 < wide_RD.abs().amax(dim=1, keepdim=True) / 224).all())
    assert bool(((back_RD - wide_RD).abs() <= torch.maximum(wide_RD.abs() * 2**-4, scale_R1 * 2**-10)).all())
    assert error(back_RD, wide_RD) <= bound(FP8)


def test_another_rows_scale_is_noticed() -> None:
    x_RD = torch.randn(16, 128) * torch.exp2(torch.arange(16.0))[:, None]
    packed_P = packed(x_RD)
    packed_P[16 * 128 :] = packed_P[16 * 128 :].roll(1)
    assert error(landed(packed_P, 128), x_RD.double()) > bound(FP8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_has_landed_is_held_exactly_and_packs_to_itself(dtype: torch.dtype) -> None:
    x_RD = of_many_sizes(96, 64).to(dtype)
    once_RD = landed(packed(x_RD), 64)
    kept_RD = once_RD.to(dtype)
    assert torch.equal(kept_RD.float(), once_RD)
    assert torch.equal(landed(packed(kept_RD), 64), once_RD)


def test_zeros_and_the_smallest_numbers() -> None:
    x_RD = torch.zeros(5, 8)
    x_RD[1, 3] = -0.0
    x_RD[2] = torch.tensor([2.0**-108, -(2.0**-110), 2.0**-126, 2.0**-149, 0, 0, 0, 0])
    x_RD[3, 0], x_RD[4, 0] = 2.0**-149, 2.0**-127  # alone in their rows, and below what their scale reaches
    packed_P = packed(x_RD)
    assert torch.equal(packed_P, kv_rows_fp8_reference(x_RD))
    assert exponents(packed_P, 8).tolist() == [MIN_EXPONENT, MIN_EXPONENT, 11, MIN_EXPONENT, MIN_EXPONENT]
    back_RD = landed(packed_P, 8)
    assert back_RD[2].tolist() == [2.0**-108, -(2.0**-110), 0, 0, 0, 0, 0, 0]
    assert not back_RD[[0, 1, 3, 4]].any()


@pytest.mark.parametrize("poison", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_poisoned_row_lands_as_nan_and_its_neighbours_as_themselves(poison: float, dtype: torch.dtype) -> None:
    x_RD = torch.randn(18, 24).to(dtype)
    clean_RD = landed(packed(x_RD), 24)
    x_RD[13, 23] = poison
    packed_P = packed(x_RD)
    assert torch.equal(packed_P, kv_rows_fp8_reference(x_RD)) and int(exponents(packed_P, 24)[13]) == NAN_EXPONENT
    back_RD = landed(packed_P, 24)
    assert bool(back_RD[13].isnan().all())
    back_RD[13] = clean_RD[13]
    assert torch.equal(back_RD, clean_RD)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_numbers_land_as_numbers_or_as_infinity(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    x_RD = torch.tensor([[most] + [0.0] * 7, [most * (1 - 2**-4)] + [0.0] * 7]).to(dtype)
    back_RD = landed(packed(x_RD), 8).to(dtype)
    assert float(back_RD[0, 0]) == float("inf") and not back_RD[:, 1:].isnan().any(), "1.99 rounds up to 2"
    assert 0.9 * most < float(back_RD[1, 0]) <= most


def test_wrong_arguments_are_refused() -> None:
    for x_RD, packed_P in (
        (torch.zeros(4, 8), torch.zeros(35, dtype=torch.uint8)),
        (torch.zeros(4, 8), torch.zeros(45, dtype=torch.uint8)),
        (torch.zeros(4, 8), torch.zeros(36)),
    ):
        with pytest.raises(AssertionError):
            kv_rows_fp8(x_RD, packed_P)
    with pytest.raises(AssertionError):
        kv_rows_of_fp8(torch.zeros(36, dtype=torch.uint8), torch.zeros(4, 8, dtype=torch.float16))
