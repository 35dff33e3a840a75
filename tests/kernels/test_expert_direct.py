"""The two-launch MoE layer: every rule, shared and dropped rows, odd sizes, both weight formats, poisoned outputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from duomo_kernels._bounds import bound, error
from duomo_kernels._routing import GateRule
from duomo_kernels._weights import SCALE_BLOCK, ExpertWeights
from duomo_kernels.expert_direct import DirectAnswer, DirectTiles, default_tiles, expert_direct, expert_direct_reference

SMALL = DirectTiles(gate_up_rows=4, gate_up_steps=12, down_rows=32, down_width=64, down_depth=2)


def half(device: torch.device) -> torch.dtype:
    """bf16 on a GPU. Triton's interpreter cuts digits off where it converts to bf16 instead of rounding, which no bound allows for."""
    return torch.bfloat16 if device.type == "cuda" else torch.float16


def random_weights(num_experts: int, dim: int, hidden: int, device: torch.device, is_fp8: bool = False) -> ExpertWeights:
    gate_up = torch.randn(num_experts, 2 * hidden, dim, device=device)
    down = torch.randn(num_experts, dim, hidden, device=device)
    if not is_fp8:
        return ExpertWeights(gate_up_EFD=(gate_up / dim**0.5).to(half(device)), down_EDF=(down / hidden**0.5).to(half(device)))

    def scales(rows: int, columns: int) -> Tensor:
        blocks = torch.rand(num_experts, -(-rows // SCALE_BLOCK), -(-columns // SCALE_BLOCK), device=device)
        return blocks.add(0.5).mul(columns**-0.5)

    return ExpertWeights(
        gate_up_EFD=gate_up.to(torch.float8_e4m3fn),
        down_EDF=down.to(torch.float8_e4m3fn),
        gate_up_scale_Efd=scales(2 * hidden, dim),
        down_scale_Edf=scales(dim, hidden),
    )


def poisoned(x_TD: Tensor, num_experts: int, top_k: int) -> DirectAnswer:
    num_tokens, device = x_TD.shape[0], x_TD.device
    return DirectAnswer(
        y_TD=torch.full_like(x_TD, torch.nan),
        counts_E=torch.full((num_experts,), -7, dtype=torch.int32, device=device),
        ids_TK=torch.full((num_tokens, top_k), -7, dtype=torch.int32, device=device),
        weights_TK=torch.full((num_tokens, top_k), torch.nan, device=device),
    )


def assert_right(
    logits_TE: Tensor, x_TD: Tensor, weights: ExpertWeights, rule: GateRule, tiles: DirectTiles | None, num_valid: int | None = None
) -> DirectAnswer:
    out = poisoned(x_TD, weights.num_experts, rule.top_k)
    valid = None if num_valid is None else torch.tensor([num_valid], dtype=torch.int32, device=x_TD.device)
    got = expert_direct(logits_TE, x_TD, weights, rule, out, tiles, valid)
    want = expert_direct_reference(logits_TE, x_TD, weights, rule, num_valid)
    assert got is out and torch.equal(got.ids_TK, want.ids_TK) and torch.equal(got.counts_E, want.counts_E)
    assert error(got.weights_TK, want.weights_TK) <= bound(torch.float32)
    assert error(got.y_TD, want.y_TD) <= bound(got.y_TD.dtype)
    return got


def inputs(num_tokens: int, num_experts: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.randn(num_tokens, num_experts, device=device), torch.randn(num_tokens, dim, device=device).to(half(device))


def chosen_reference(logits_TE: Tensor, x_TD: Tensor, weights: ExpertWeights, rule: GateRule) -> Tensor:
    """y_TD of the reference, one chosen expert after the other: all weights in float64 would fill a GPU."""
    weights_TK, ids_TK = torch.softmax(logits_TE.double(), -1).topk(rule.top_k)
    weights_TK /= weights_TK.sum(-1, keepdim=True)
    y_TD = torch.zeros(x_TD.shape, dtype=torch.float64, device=x_TD.device)
    for expert in ids_TK.unique().tolist():
        chose_T = (ids_TK == expert).any(-1)
        alone = ExpertWeights(gate_up_EFD=weights.gate_up_EFD[expert : expert + 1], down_EDF=weights.down_EDF[expert : expert + 1])
        own = expert_direct_reference(torch.zeros(int(chose_T.sum()), 1, device=x_TD.device), x_TD[chose_T], alone, GateRule(top_k=1))
        y_TD[chose_T] += own.y_TD * (weights_TK * (ids_TK == expert)).sum(-1)[chose_T, None]
    return y_TD


def test_the_sum_over_chosen_experts_is_the_reference() -> None:
    cpu, rule = torch.device("cpu"), GateRule(top_k=3, normalise=True)
    (logits_TE, x_TD), weights = inputs(5, 6, 16, cpu), random_weights(6, 16, 24, cpu)
    expected = expert_direct_reference(logits_TE, x_TD, weights, rule).y_TD
    assert error(chosen_reference(logits_TE, x_TD, weights, rule), expected) <= bound(torch.float64)


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "dim", "hidden", "rule"),
    [
        (1, 8, 64, 64, GateRule(top_k=2, normalise=True)),
        (1, 5, 1, 1, GateRule(top_k=1)),
        (3, 7, 33, 63, GateRule(top_k=3)),
        (2, 4, 17, 257, GateRule(top_k=2, normalise=True, routed_scale=2.5)),
        (2, 1, 257, 7, GateRule(top_k=1)),
        (1, 150, 16, 24, GateRule(top_k=6, normalise=True)),
    ],
)
@pytest.mark.parametrize("is_grouped", [True, False])
def test_equal_to_the_reference(
    num_tokens: int, num_experts: int, dim: int, hidden: int, rule: GateRule, is_grouped: bool, device: torch.device
) -> None:
    weights = random_weights(num_experts, dim, hidden, device)
    assert_right(*inputs(num_tokens, num_experts, dim, device), weights, rule, replace(SMALL, is_grouped=is_grouped))


@pytest.mark.parametrize(("dim", "hidden"), [(128, 128), (160, 144), (136, 130)])
def test_fp8_weights_with_block_scales(dim: int, hidden: int, device: torch.device) -> None:
    weights = random_weights(3, dim, hidden, device, is_fp8=True)
    tiles = DirectTiles(gate_up_rows=2, gate_up_steps=48, down_rows=32, down_width=128, down_depth=2)
    assert_right(*inputs(1, 3, dim, device), weights, GateRule(top_k=2, normalise=True), tiles)


@pytest.mark.parametrize("num_tokens", [1, 2])
def test_default_tiles(num_tokens: int, device: torch.device) -> None:
    weights = random_weights(8, 128, 48, device)
    assert_right(*inputs(num_tokens, 8, 128, device), weights, GateRule(top_k=2), None)


def test_one_expert_takes_every_token(device: torch.device) -> None:
    logits_TE, x_TD = inputs(6, 8, 32, device)
    logits_TE[:, 3] = 50
    got = assert_right(logits_TE, x_TD, random_weights(8, 32, 24, device), GateRule(top_k=1), SMALL)
    assert got.counts_E.tolist() == [0, 0, 0, 6, 0, 0, 0, 0]


def test_ties_go_to_the_lowest_expert(device: torch.device) -> None:
    logits_TE, x_TD = inputs(3, 8, 32, device)
    logits_TE[0], logits_TE[1, 2:6], logits_TE[2] = 0, 9, torch.tensor([0, -torch.inf] * 4)
    got = assert_right(logits_TE, x_TD, random_weights(8, 32, 24, device), GateRule(top_k=3, normalise=True), SMALL)
    assert got.ids_TK.tolist() == [[0, 1, 2], [2, 3, 4], [0, 2, 4]]


@pytest.mark.parametrize(("num_valid", "is_grouped"), [(0, True), (1, False), (3, True), (4, True)])
def test_padded_rows_give_zeros_and_are_not_counted(num_valid: int, is_grouped: bool, device: torch.device) -> None:
    logits_TE, x_TD = inputs(4, 6, 32, device)
    logits_TE[num_valid:], x_TD[num_valid:] = 0, torch.nan
    got = assert_right(
        logits_TE, x_TD, random_weights(6, 32, 24, device), GateRule(top_k=2), replace(SMALL, is_grouped=is_grouped), num_valid
    )
    assert int(got.counts_E.sum()) == 2 * num_valid and not got.y_TD[num_valid:].any()


def test_logits_of_padded_rows_that_are_not_numbers_keep_ids_in_range(device: torch.device) -> None:
    logits_TE, x_TD = inputs(2, 6, 32, device)
    logits_TE[1] = torch.nan
    out = poisoned(x_TD, 6, 2)
    valid = torch.ones(1, dtype=torch.int32, device=device)
    got = expert_direct(logits_TE, x_TD, random_weights(6, 32, 24, device), GateRule(top_k=2), out, SMALL, valid)
    assert got.ids_TK[1].tolist() == [0, 1] and not got.weights_TK[1].any() and not got.y_TD[1].any()


def test_a_token_does_not_depend_on_its_company(device: torch.device) -> None:
    weights, (logits_TE, x_TD) = random_weights(6, 64, 24, device), inputs(3, 6, 64, device)
    rule = GateRule(top_k=3)
    together = expert_direct(logits_TE, x_TD, weights, rule, tiles=SMALL)
    alone = expert_direct(logits_TE[2:], x_TD[2:].clone(), weights, rule, tiles=SMALL)
    assert torch.equal(together.y_TD[2:], alone.y_TD)


@pytest.mark.parametrize("broken", ["weight", "order", "rows"])
def test_a_wrong_layer_exceeds_the_bound(broken: str, device: torch.device) -> None:
    weights, (logits_TE, x_TD), rule = random_weights(4, 64, 24, device), inputs(2, 4, 64, device), GateRule(top_k=2, normalise=True)
    got = expert_direct(logits_TE, x_TD, weights, rule, tiles=SMALL)
    if broken == "weight":
        logits_TE = logits_TE + 0.1 * torch.arange(4, device=device)
    elif broken == "order":
        weights = replace(weights, gate_up_EFD=weights.gate_up_EFD.roll(24, 1))
    else:
        weights = replace(weights, down_EDF=weights.down_EDF.roll(1, 1))
    assert error(got.y_TD, expert_direct_reference(logits_TE, x_TD, weights, rule).y_TD) > bound(got.y_TD.dtype)


@pytest.mark.parametrize("rule", [GateRule(top_k=1, scoring="sigmoid"), GateRule(top_k=1, num_groups=2), GateRule(top_k=9)])
def test_rules_of_others_are_refused(rule: GateRule, device: torch.device) -> None:
    logits_TE, x_TD = inputs(1, 8, 32, device)
    with pytest.raises(AssertionError):
        expert_direct(logits_TE, x_TD, random_weights(8, 32, 16, device), rule)


@pytest.mark.gpu
@pytest.mark.parametrize(("num_experts", "dim", "hidden", "top_k"), [(64, 2048, 1024, 8), (128, 2048, 768, 8), (3, 4096, 14336, 2)])
@pytest.mark.parametrize("num_tokens", [1, 2, 8])
def test_real_shapes(num_experts: int, dim: int, hidden: int, top_k: int, num_tokens: int, device: torch.device) -> None:
    """At most 2 GB on the device."""
    rule, (logits_TE, x_TD) = GateRule(top_k=top_k, normalise=True), inputs(num_tokens, num_experts, dim, device)
    weights = ExpertWeights(
        gate_up_EFD=torch.randn(num_experts, 2 * hidden, dim, device=device, dtype=x_TD.dtype).mul_(dim**-0.5),
        down_EDF=torch.randn(num_experts, dim, hidden, device=device, dtype=x_TD.dtype).mul_(hidden**-0.5),
    )
    out = poisoned(x_TD, num_experts, top_k)
    got = expert_direct(logits_TE, x_TD, weights, rule, out, default_tiles(weights, num_tokens, top_k))
    assert torch.equal(got.ids_TK.long(), logits_TE.topk(top_k).indices)
    assert torch.equal(got.counts_E.long(), torch.bincount(got.ids_TK.flatten(), minlength=num_experts))
    assert error(got.y_TD, chosen_reference(logits_TE, x_TD, weights, rule)) <= bound(got.y_TD.dtype)
