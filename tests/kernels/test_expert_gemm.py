"""The experts' products against float64, for odd sizes, empty experts, one expert that takes all, outputs poisoned beforehand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from duomo_kernels._bounds import bound, error
from duomo_kernels._routing import Routing, routing_reference
from duomo_kernels._weights import ExpertWeights
from duomo_kernels.expert_gemm import GemmTile, expert_down, expert_gemm_reference, expert_up

SMALL = GemmTile(block_m=16, block_n=16, block_k=32, num_warps=4, num_stages=2)
SHRINKING = GemmTile(block_m=64, block_n=32, block_k=64, num_warps=4, num_stages=3)
POINTERS = GemmTile(block_m=16, block_n=32, block_k=32, num_warps=4, num_stages=2, use_tma=False)
PERSISTENT = GemmTile(block_m=32, block_n=16, block_k=16, num_warps=4, num_stages=2, num_programs=1)
BANDS = GemmTile(block_m=16, block_n=16, block_k=32, num_warps=4, num_stages=2, band=3)
FLAT = GemmTile(block_m=32, block_n=16, block_k=16, num_warps=4, num_stages=3, is_flat=True)
TILES = [SMALL, SHRINKING, POINTERS, PERSISTENT, BANDS, FLAT]


def weights_of(num_experts: int, dim: int, hidden: int, device: torch.device, half: torch.dtype) -> ExpertWeights:
    gate_up = torch.randn(num_experts, 2 * hidden, dim, device=device) * dim**-0.5
    down = torch.randn(num_experts, dim, hidden, device=device) * hidden**-0.5
    return ExpertWeights(gate_up_EFD=gate_up.to(half), down_EDF=down.to(half))


def routing_of(num_tokens: int, top_k: int, num_experts: int, tile_rows: int, device: torch.device, kind: str = "random") -> Routing:
    ids = torch.rand(num_tokens, num_experts).topk(top_k).indices
    if kind == "one expert":
        ids[:] = torch.arange(top_k)
    if kind == "empty experts":
        ids = torch.rand(num_tokens, top_k + 1).topk(top_k).indices
    valid = num_tokens - 2 if kind == "padded rows" else None
    return routing_reference(ids.to(device), torch.rand(num_tokens, top_k, device=device), num_experts, tile_rows, valid)


def run(x: torch.Tensor, routing: Routing, weights: ExpertWeights, tile: GemmTile) -> tuple[float, float]:
    """Errors of act and rows at the places that hold something; the others must keep their poison."""
    num_placed = int(routing.offsets_E1[-1])
    act = x.new_full((routing.routed_R.shape[0], weights.hidden), torch.nan)
    rows = x.new_full((routing.routed_R.shape[0], weights.dim), torch.nan)
    expert_up(x, routing, weights, tile, out=act)
    expert_down(act, routing, weights, tile, out=rows)
    expected_act, expected_rows = expert_gemm_reference(x, routing, weights)
    assert act[num_placed:].isnan().all() and rows[num_placed:].isnan().all()
    return error(act[:num_placed], expected_act[:num_placed]), error(rows[:num_placed], expected_rows[:num_placed])


@pytest.mark.parametrize("tile", TILES, ids=["small", "shrinking", "pointers", "persistent", "bands", "flat"])
@pytest.mark.parametrize("kind", ["random", "one expert", "empty experts", "padded rows"])
def test_close_to_float64(tile: GemmTile, kind: str, device: torch.device, half: torch.dtype) -> None:
    x = torch.randn(37, 72, device=device).to(half)
    errors = run(x, routing_of(37, 2, 5, tile.block_m, device, kind), weights_of(5, 72, 40, device, half), tile)
    assert max(errors) <= bound(half), errors


@pytest.mark.parametrize("num_tokens", [1, 63, 257])
@pytest.mark.parametrize(("dim", "hidden"), [(63, 33), (64, 96)])
def test_odd_sizes(num_tokens: int, dim: int, hidden: int, device: torch.device, half: torch.dtype) -> None:
    x = torch.randn(num_tokens, dim, device=device).to(half)
    errors = run(x, routing_of(num_tokens, 1, 3, SHRINKING.block_m, device), weights_of(3, dim, hidden, device, half), SHRINKING)
    assert max(errors) <= bound(half), errors


def test_groups_of_many_tiles_visit_every_tile(device: torch.device, half: torch.dtype) -> None:
    """More than GROUP_TILES tiles of one expert."""
    x = torch.randn(300, 32, device=device).to(half)
    errors = run(x, routing_of(300, 1, 2, SMALL.block_m, device, "one expert"), weights_of(2, 32, 48, device, half), SMALL)
    assert max(errors) <= bound(half), errors


def test_an_empty_routing_writes_nothing(device: torch.device, half: torch.dtype) -> None:
    x = torch.randn(3, 32, device=device).to(half)
    routing = routing_reference(torch.zeros(3, 1, dtype=torch.int64, device=device), torch.ones(3, 1, device=device), 2, 16, num_valid=0)
    assert run(x, routing, weights_of(2, 32, 16, device, half), SMALL) == (0.0, 0.0)


def test_a_flat_loop_without_tma(device: torch.device, half: torch.dtype) -> None:
    """Asked for it is refused; where the weights' strides rule TMA out, whole tiles are computed instead."""
    with pytest.raises(AssertionError, match="TMA alone"):
        replace(FLAT, use_tma=False)
    x = torch.randn(40, 63, device=device).to(half)
    errors = run(x, routing_of(40, 2, 3, FLAT.block_m, device), weights_of(3, 63, 33, device, half), FLAT)
    assert max(errors) <= bound(half), errors


def test_rows_of_another_batch_are_refused(device: torch.device, half: torch.dtype) -> None:
    x, routing = torch.randn(21, 64, device=device).to(half), routing_of(20, 2, 3, SMALL.block_m, device)
    for rows in (x, x[:19]):
        with pytest.raises(AssertionError, match="x_TD: shape"):
            expert_up(rows, routing, weights_of(3, 64, 32, device, half), SMALL)


@pytest.mark.parametrize("broken", ["another expert", "one weight", "another token"])
def test_a_broken_product_is_caught(broken: str, device: torch.device, half: torch.dtype) -> None:
    x = torch.randn(20, 64, device=device).to(half)
    weights, routing = weights_of(3, 64, 32, device, half), routing_of(20, 2, 3, 16, device)
    act, rows = expert_gemm_reference(x, routing, weights)
    if broken == "another expert":
        weights = ExpertWeights(gate_up_EFD=weights.gate_up_EFD.flip(0).contiguous(), down_EDF=weights.down_EDF)
    elif broken == "one weight":
        weights.gate_up_EFD[1, 3, 5] += 0.5
    else:
        x = x.roll(1, 0)
    out = expert_up(x, routing, weights, SMALL)
    assert error(out, act) > bound(half)


def test_a_row_is_the_same_in_any_company(device: torch.device, half: torch.dtype) -> None:
    """The same bits alone and among others, in whatever place of whatever tile, at one tile configuration."""
    weights, tile = (
        weights_of(4, 64, 32, device, half),
        GemmTile(block_m=64, block_n=32, block_k=32, num_warps=4, num_stages=2, shrinks=False),
    )
    x, ids = torch.randn(70, 64, device=device).to(half), torch.randint(0, 4, (70, 1), device=device)

    def answer(rows: slice) -> torch.Tensor:
        routing = routing_reference(ids[rows], torch.ones(1, 1, device=device).expand(len(ids[rows]), 1), 4, tile.block_m)
        out = expert_down(expert_up(x[rows].contiguous(), routing, weights, tile), routing, weights, tile)
        return out[routing.place_R.long()]

    whole = answer(slice(0, 70))
    for at in (0, 33, 69):
        assert torch.equal(answer(slice(at, at + 1)), whole[at : at + 1])
