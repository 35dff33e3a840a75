"""A whole layer against float64 in every path, padding and capacity included, and bit for bit free of its company where it promises so."""

from __future__ import annotations

import pytest
import torch

from duomo_kernels._bounds import bound, error
from duomo_kernels._gate_capacity import Capacity, Overflow
from duomo_kernels._routing import GateRule
from duomo_kernels._weights import ExpertWeights
from duomo_kernels._weights_fp8 import quantise_weights_fp8
from duomo_kernels.expert_direct import DirectTiles
from duomo_kernels.expert_gemm import GemmTile
from duomo_kernels.expert_gemm_fp8 import Fp8Tiles
from duomo_kernels.moe_layer import (
    GemmTiles,
    LayerOptions,
    LayerPlan,
    gemm_tiles,
    heuristic_plan,
    layer_plan,
    moe_layer,
    moe_layer_reference,
    plan_from,
)

RULE = GateRule(top_k=2, normalise=True)
SMALL = GemmTile(block_m=16, block_n=16, block_k=32, num_warps=4, num_stages=2)
PLANS: list[LayerPlan] = [
    GemmTiles(up=SMALL, down=SMALL),
    DirectTiles(gate_up_rows=8, gate_up_steps=3, down_rows=32, down_width=32, down_depth=2),
]


def layer_of(num_tokens: int, half: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, ExpertWeights]:
    """Logits and x of so many tokens, and 5 experts of 64 x 48."""
    gate_up, down = torch.randn(5, 96, 64, device=device) / 8, torch.randn(5, 64, 48, device=device) / 7
    logits, x = torch.randn(num_tokens, 5, device=device), torch.randn(num_tokens, 64, device=device)
    return logits, x.to(half), ExpertWeights(gate_up_EFD=gate_up.to(half), down_EDF=down.to(half))


def poisoned(x_TD: torch.Tensor) -> torch.Tensor:
    """Room for the answer to x in which what is not written shows."""
    return torch.full_like(x_TD, torch.nan)


@pytest.mark.parametrize("num_tokens", [1, 7])
@pytest.mark.parametrize("plan", [*PLANS, None], ids=["gemm", "direct", "heuristic"])
def test_close_to_float64(plan: LayerPlan | None, num_tokens: int, device: torch.device, half: torch.dtype) -> None:
    logits, x, weights = layer_of(num_tokens, half, device)
    answer = moe_layer(logits, x, weights, RULE, plan=plan, out_TD=poisoned(x))
    assert error(answer.y_TD, moe_layer_reference(logits, x, weights, RULE)) <= bound(half)
    assert answer.counts_E.tolist() == torch.bincount(answer.ids_TK.flatten(), minlength=5).tolist()


@pytest.mark.parametrize("num_tokens", [1, 21])
def test_float32_is_multiplied_whole(num_tokens: int, device: torch.device) -> None:
    """Not as TF32, on a GPU: its eleven bits of precision would show."""
    logits, x, weights = layer_of(num_tokens, torch.float32, device)
    for options in (LayerOptions(), LayerOptions(is_deterministic=True)):
        y = moe_layer(logits, x, weights, RULE, options=options, out_TD=poisoned(x)).y_TD
        assert error(y, moe_layer_reference(logits, x, weights, RULE)) <= bound(torch.float32)


@pytest.mark.parametrize("plan", PLANS, ids=["gemm", "direct"])
def test_padded_rows_are_zero_and_counted_nowhere(plan: LayerPlan, device: torch.device, half: torch.dtype) -> None:
    logits, x, weights = layer_of(6, half, device)
    valid = torch.tensor([4], dtype=torch.int32, device=device)
    answer = moe_layer(logits, x, weights, RULE, plan=plan, options=LayerOptions(num_valid=valid), out_TD=poisoned(x))
    assert error(answer.y_TD, moe_layer_reference(logits, x, weights, RULE, num_valid=4)) <= bound(half)
    assert int(answer.counts_E.sum()) == 4 * RULE.top_k


def test_fp8_weights_close_to_what_they_stand_for(device: torch.device) -> None:
    logits, x, wide = layer_of(5, torch.float32, device)
    weights = quantise_weights_fp8(wide.gate_up_EFD, wide.down_EDF)
    x = x.bfloat16()
    answer = moe_layer(logits, x, weights, RULE, out_TD=poisoned(x))
    assert isinstance(layer_plan(weights, 2, 5), Fp8Tiles)
    assert error(answer.y_TD, moe_layer_reference(logits, x, weights, RULE)) <= bound(torch.float8_e4m3fn)


def test_residual_capacity_carries_the_input_over(device: torch.device, half: torch.dtype) -> None:
    """Nobody fits: the layer is the input times the weights that were lost."""
    logits, x, weights = layer_of(40, half, device)
    logits = torch.tensor([3.0, 2, 1, 0, -1], device=device).repeat(40, 1)
    overflow = Overflow.empty(40, 5, device)
    options = LayerOptions(capacity=Capacity(factor=0.05, overflow="residual"), overflow=overflow)
    y = moe_layer(logits, x, weights, RULE, options=options, out_TD=poisoned(x)).y_TD
    kept = 40 - int((overflow.lost_T > 0.99).sum())
    assert 0 < kept <= 4 and int(overflow.dropped) == 80 - 2
    assert error(y[kept:], x[kept:].double()) <= bound(half)


def test_deterministic_rows_do_not_know_their_company(device: torch.device, half: torch.dtype) -> None:
    logits, x, weights = layer_of(70, half, device)
    options = LayerOptions(is_deterministic=True)
    whole = moe_layer(logits, x, weights, RULE, options=options, out_TD=poisoned(x)).y_TD
    assert not whole.isnan().any()
    for rows in (slice(0, 1), slice(33, 40), slice(69, 70)):
        part = moe_layer(logits[rows].contiguous(), x[rows].contiguous(), weights, RULE, options=options).y_TD
        assert torch.equal(part, whole[rows])


def test_a_broken_layer_is_caught(device: torch.device, half: torch.dtype) -> None:
    logits, x, weights = layer_of(7, half, device)
    y = moe_layer(logits, x, weights, GateRule(top_k=2), plan=PLANS[0], out_TD=poisoned(x)).y_TD
    assert y.isfinite().all() and error(y, moe_layer_reference(logits, x, weights, RULE)) > bound(half)


def test_the_plan_follows_the_rows_of_an_expert(device: torch.device, half: torch.dtype) -> None:
    weights = layer_of(1, half, device)[2]
    assert isinstance(heuristic_plan(weights, 2, 1), DirectTiles)
    assert not isinstance(heuristic_plan(weights, 2, 1, may_be_direct=False), DirectTiles)
    assert [gemm_tiles(rows).tile_rows for rows in (0.5, 3, 4, 20, 40, 100, 4096)] == [16, 16, 64, 64, 64, 128, 128]


def test_a_table_names_any_plan() -> None:
    tile = {"block_m": 16, "block_n": 32, "block_k": 64, "num_warps": 4, "num_stages": 3}
    assert plan_from({"path": "gemm", "up": tile, "down": tile}) == GemmTiles(up=GemmTile(**tile), down=GemmTile(**tile))
    assert plan_from({"path": "direct", "direct": {"gate_up_rows": 4}}) == DirectTiles(gate_up_rows=4)
    with pytest.raises(AssertionError, match="path"):
        plan_from({"path": "indirect"})


def test_an_empty_batch_and_a_given_output(device: torch.device, half: torch.dtype) -> None:
    logits, x, weights = layer_of(6, half, device)
    for num_tokens, plan in ((0, PLANS[0]), (6, PLANS[0]), (6, PLANS[1])):
        out = torch.full((num_tokens, 64), torch.nan, dtype=half, device=device)
        answer = moe_layer(logits[:num_tokens].contiguous(), x[:num_tokens].contiguous(), weights, RULE, plan=plan, out_TD=out)
        assert answer.y_TD.data_ptr() == out.data_ptr()
        assert error(out, moe_layer_reference(logits[:num_tokens], x[:num_tokens], weights, RULE)) <= bound(half)


def true_size(num_tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, ExpertWeights]:
    """OLMoE's widths with 16 experts."""
    gate_up = torch.randn(16, 2048, 2048, device=device, dtype=torch.bfloat16).mul_(2048**-0.5)
    down = torch.randn(16, 2048, 1024, device=device, dtype=torch.bfloat16).mul_(1024**-0.5)
    x = torch.randn(num_tokens, 2048, device=device).bfloat16()
    return torch.randn(num_tokens, 16, device=device), x, ExpertWeights(gate_up_EFD=gate_up, down_EDF=down)


@pytest.mark.gpu
@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 8, 64, 257, 1500, 4096])
def test_true_widths_captured_and_replayed(num_tokens: int, is_deterministic: bool, device: torch.device) -> None:
    """Every plan of the heuristic, with touches and dependent launch, replayed from a graph on other inputs than it was captured with."""
    rule, options = GateRule(top_k=4, normalise=True), LayerOptions(is_deterministic=is_deterministic)
    logits, x, weights = true_size(num_tokens, device)
    out = torch.empty_like(x)
    moe_layer(logits, x, weights, rule, options=options, out_TD=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(2):
            moe_layer(logits, x, weights, rule, options=options, out_TD=out)
    for skew in (0.0, 4.0):
        logits.normal_().add_(torch.linspace(0, skew, 16, device=device))
        x.normal_()
        out.fill_(torch.nan)
        graph.replay()
        sample = torch.arange(0, num_tokens, max(1, num_tokens // 64), device=device)
        expected = moe_layer_reference(logits[sample], x[sample], weights, rule)
        assert bool(out.isfinite().all()) and error(out[sample], expected) <= bound(torch.bfloat16)
