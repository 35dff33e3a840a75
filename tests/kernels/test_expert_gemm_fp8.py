"""The experts' products in fp8: within the bounds of their own operands, of the unquantised ones, and a broken one is noticed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from duomo_kernels._bounds import bound, error
from duomo_kernels._routing import Routing, routing_reference
from duomo_kernels._weights import ExpertWeights, dequantised
from duomo_kernels._weights_fp8 import quantise_weights_fp8
from duomo_kernels.expert_gemm_fp8 import (
    FP8,
    Fp8Tile,
    Fp8Tiles,
    expert_down_fp8,
    expert_down_fp8_reference,
    expert_gemm_fp8,
    expert_gemm_fp8_reference,
    expert_up_fp8,
    expert_up_fp8_reference,
    fp8_tiles,
)
from duomo_kernels.quantise_rows_fp8 import dequantise_rows, num_groups
from duomo_kernels.quantise_rows_fp8 import quantise_rows_fp8_reference as quantise_rows  # quick on a CPU


@dataclass(frozen=True)
class Case:
    """tokens, top-k, experts, D, F, rows a tile, down's columns. choice: spread over experts, all to the last, or only even experts."""

    tokens: int
    top_k: int
    experts: int
    dim: int
    hidden: int
    rows: int = 16
    columns: int = 128
    choice: str = "spread"


CASES = [
    Case(1, 2, 3, 128, 128),
    Case(9, 2, 3, 272, 144),  # blocks cut short in D and F, TMA's alignment kept: up's tile meets two rows of scales
    Case(5, 1, 4, 63, 65, columns=64),  # no alignment at all
    Case(40, 1, 2, 128, 129, rows=32, columns=256, choice="last"),  # full tiles, an empty expert
    Case(63, 2, 4, 257, 96, rows=64, columns=256, choice="even"),
    Case(161, 1, 3, 128, 128, rows=128, columns=256, choice="last"),
]


@dataclass(frozen=True)
class Inputs:
    x_TD: Tensor
    routing: Routing
    weights: ExpertWeights
    wide: tuple[Tensor, Tensor]
    tiles: Fp8Tiles


def tiles_of(rows: int, columns: int, use_tma: bool, num_programs: int = 0) -> Fp8Tiles:
    warps = 8 if rows == 128 else 4
    up = Fp8Tile(block_m=rows, block_n=128, num_warps=warps, num_stages=3, use_tma=use_tma, num_programs=num_programs)
    return Fp8Tiles(up=up, down=replace(up, block_n=columns))


def inputs_of(case: Case, device: torch.device, use_tma: bool = False, num_programs: int = 0, seed: int = 0) -> Inputs:
    """Columns of x and blocks of the weights differ in size, so that a scale from elsewhere is felt. Gates are of order one: silu turns an
    absolute error of its operand into a relative one, and large gates would measure that, not the kernel."""
    torch.manual_seed(seed)
    x_TD = torch.randn(case.tokens, case.dim) * torch.exp2(torch.arange(case.dim) // 128 % 3)
    wide = (torch.randn(case.experts, 2 * case.hidden, case.dim) / 4 / case.dim**0.5, torch.randn(case.experts, case.dim, case.hidden))
    wide[0].mul_(torch.exp2(torch.arange(2 * case.hidden) // 128 % 2 - torch.arange(case.experts)[:, None] % 2)[:, :, None])
    wide[1].mul_(torch.exp2(torch.arange(case.dim) // 128 % 3)[None, :, None])
    ids = torch.rand(case.tokens, case.experts).argsort(1)[:, : case.top_k]
    if case.choice != "spread":
        ids = torch.full_like(ids, case.experts - 1) if case.choice == "last" else ids // 2 * 2
    routing = routing_reference(ids.to(device), torch.ones(ids.shape, device=device), case.experts, case.rows)
    wide = (wide[0].to(device), wide[1].to(device))
    tiles = tiles_of(case.rows, case.columns, use_tma, num_programs)
    return Inputs(x_TD.bfloat16().to(device), routing, quantise_weights_fp8(*wide), wide, tiles)


def poisoned_act(it: Inputs) -> tuple[Tensor, Tensor]:
    """Outputs that hold NaN."""
    num_routed, device = it.routing.routed_R.shape[0], it.x_TD.device
    nan = torch.full((num_routed, it.weights.hidden), 0x7F, dtype=torch.uint8, device=device).view(FP8)
    return nan, torch.full((num_routed, num_groups(it.weights.hidden)), torch.nan, device=device)


def poisoned_rows(it: Inputs) -> Tensor:
    return torch.full((it.routing.routed_R.shape[0], it.weights.dim), torch.nan, dtype=torch.bfloat16, device=it.x_TD.device)


def run(it: Inputs, weights: ExpertWeights | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(act as float64, rows, what rows should be of that very act)."""
    weights = weights or it.weights
    x = quantise_rows(it.x_TD)
    act = expert_up_fp8(*x, it.routing, weights, it.tiles.up, out=poisoned_act(it))
    rows = expert_down_fp8(*act, it.routing, weights, it.tiles.down, out=poisoned_rows(it))
    wide = dequantise_rows(*act)
    return wide, rows, expert_down_fp8_reference(wide, it.routing, it.weights)


@pytest.mark.parametrize("use_tma", [False, True], ids=["loads", "tma"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_close_to_the_references(case: Case, use_tma: bool, device: torch.device) -> None:
    it = inputs_of(case, device, use_tma)
    act, rows, expected_rows = run(it)
    x = dequantise_rows(*quantise_rows(it.x_TD))
    expected_act = expert_up_fp8_reference(x, it.routing, it.weights)
    assert error(act, expected_act) <= bound(FP8)  # one rounding to e4m3
    assert error(rows, expected_rows) <= bound(torch.bfloat16)  # same operands, one rounding to bf16
    # From x and weights as they were: x, weights, act, so three roundings to e4m3, whose squares add up within the bound of few.
    exact = inputs_reference(it)
    assert error(rows, exact) <= bound(FP8)


def inputs_reference(it: Inputs) -> Tensor:
    """rows in float64 of bf16 x and unquantised weights."""
    offsets, out = it.routing.offsets_E1.tolist(), []
    for expert, (lo, hi) in enumerate(zip(offsets, offsets[1:], strict=False)):
        x = it.x_TD[(it.routing.routed_R[lo:hi] // it.routing.top_k).long()].double()
        gate, up = (x @ it.wide[0][expert].double().T).chunk(2, -1)
        out.append((gate * torch.sigmoid(gate) * up) @ it.wide[1][expert].double().T)
    return torch.cat(out)


@pytest.mark.parametrize("num_programs", [1, 2])
def test_persistent_is_the_same(num_programs: int, device: torch.device) -> None:
    case = Case(20, 2, 5, 144, 144, choice="even")
    one, other = (run(inputs_of(case, device, num_programs=n)) for n in (0, num_programs))
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_lower_bodies_are_within_the_bound(device: torch.device) -> None:
    """Tiles of 64 with 1 to 16, 17 to 32 and more rows, whose products are computed in the other orientation."""
    case = Case(60, 1, 3, 144, 130, rows=64)
    it = inputs_of(case, device)
    ids = torch.tensor([0] * 3 + [1] * 20 + [2] * 37, device=device)[:, None]
    routing = routing_reference(ids, torch.ones(ids.shape, device=device), 3, 64)
    whole = replace(it.tiles, up=replace(it.tiles.up, shrinks=False), down=replace(it.tiles.down, shrinks=False))
    for tiles in (it.tiles, whole):
        act, rows, expected = run(replace(it, routing=routing, tiles=tiles))
        assert error(act, expert_up_fp8_reference(dequantise_rows(*quantise_rows(it.x_TD)), routing, it.weights)) <= bound(FP8)
        assert error(rows, expected) <= bound(torch.bfloat16)


def test_empty_places_are_not_written(device: torch.device) -> None:
    it = inputs_of(Case(20, 2, 4, 128, 128), device)
    ids = it.routing.ids_TK
    routing = routing_reference(ids, torch.ones(ids.shape, device=device), 4, 16, num_valid=7)
    _, rows, expected = run(replace(it, routing=routing))
    assert error(rows[:14], expected[:14]) <= bound(torch.bfloat16) and bool(rows[14:].isnan().all())


@pytest.mark.parametrize("name", ["gate_up_EFD", "down_EDF", "gate_up_scale_Efd", "down_scale_Edf"])
def test_a_wrong_weight_is_noticed(name: str, device: torch.device) -> None:
    it = inputs_of(Case(9, 2, 3, 272, 144), device)
    right = getattr(it.weights, name)
    wrong = right.view(torch.uint8).roll(1, 1).view(FP8) if right.dtype == FP8 else right.roll(1, 1)
    act, rows, expected = run(it, replace(it.weights, **{name: wrong}))
    expected_act = expert_up_fp8_reference(dequantise_rows(*quantise_rows(it.x_TD)), it.routing, it.weights)
    assert error(act, expected_act) > bound(FP8) or error(rows, expected) > bound(torch.bfloat16)


def test_the_wrong_row_or_scale_is_noticed(device: torch.device) -> None:
    it = inputs_of(Case(9, 2, 3, 272, 144), device)
    q_TD, scale_TG = quantise_rows(it.x_TD)
    expected = expert_up_fp8_reference(dequantise_rows(q_TD, scale_TG), it.routing, it.weights)
    for routing, scale in ((replace(it.routing, routed_R=it.routing.routed_R.roll(1)), scale_TG), (it.routing, scale_TG.roll(1, 1))):
        act = expert_up_fp8(q_TD, scale, routing, it.weights, it.tiles.up)
        assert error(dequantise_rows(*act), expected) > bound(FP8)


@pytest.mark.parametrize("num_routed", [1, 256, 2048, 8192, 131072])
def test_heuristic_gives_tiles_that_launch(num_routed: int) -> None:
    tiles = fp8_tiles(num_routed, 64)
    assert tiles.tile_rows in (16, 32, 64, 128) and tiles.up.block_n == 128 and tiles.down.block_n in (128, 256)


def test_both_products_in_one_call(device: torch.device) -> None:
    it = inputs_of(Case(3, 2, 5, 144, 128), device)
    q_TD, scale_TG = quantise_rows(it.x_TD)
    rows = expert_gemm_fp8(q_TD, scale_TG, it.routing, it.weights)
    assert error(rows, expert_gemm_fp8_reference(q_TD, scale_TG, it.routing, it.weights)) <= bound(FP8)


def test_weights_are_quantised_by_blocks(device: torch.device) -> None:
    wide = (torch.randn(2, 260, 129, device=device), torch.randn(2, 129, 130, device=device))
    wide[0][1, :128, :128] = 0
    for stored, right in zip(dequantised(quantise_weights_fp8(*wide)), wide, strict=True):
        assert error(stored, right.double()) <= bound(FP8)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 80, 129, 2048])
def test_true_sizes(tokens: int, device: torch.device) -> None:
    """OLMoE's matrices, fewer experts, each of the heuristic's heights."""
    torch.manual_seed(tokens)
    wide = (torch.randn(8, 2048, 2048, device=device) * 0.02, torch.randn(8, 2048, 1024, device=device) * 0.02)
    weights = quantise_weights_fp8(*wide)
    x_TD = torch.randn(tokens, 2048, device=device).bfloat16()
    tiles = fp8_tiles(tokens * 2, 8)
    ids = torch.rand(tokens, 8).argsort(1)[:, :2]
    routing = routing_reference(ids.to(device), torch.ones(ids.shape, device=device), 8, tiles.tile_rows)
    act, rows, expected = run(Inputs(x_TD, routing, weights, wide, tiles))
    x = dequantise_rows(*quantise_rows(x_TD))
    assert error(act, expert_up_fp8_reference(x, routing, weights)) <= bound(FP8)
    assert error(rows, expected) <= bound(torch.bfloat16)
