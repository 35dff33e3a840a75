"""The warp-specialised products. Without a GPU: the walk over cells and its addresses in plain torch, and the compiler's answer for Hopper
(Gluon has no interpreter). On a Hopper GPU: against float64, for odd sizes and every kind of routing, outputs poisoned beforehand."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from duomo_kernels._bounds import bound, error
from duomo_kernels._expert_gemm_ws import TILE_COLS, TILE_ROWS, WsTile, _cell, down_ws, has_ws, up_ws
from duomo_kernels._routing import Routing, routing_reference
from duomo_kernels._weights import ExpertWeights
from duomo_kernels.expert_gemm import expert_gemm_reference

KINDS = ["random", "one expert", "empty experts", "padded rows", "nothing"]
TILES = {"plain": WsTile(), "skewed": WsTile(skew=2), "registers": WsTile(skew=1, tma_store=False), "short ring": WsTile(num_stages=3)}


def weights_of(num_experts: int, dim: int, hidden: int, device: torch.device) -> ExpertWeights:
    gate_up = torch.randn(num_experts, 2 * hidden, dim, device=device) * dim**-0.5
    down = torch.randn(num_experts, dim, hidden, device=device) * hidden**-0.5
    return ExpertWeights(gate_up_EFD=gate_up.bfloat16(), down_EDF=down.bfloat16())


def routing_of(num_tokens: int, top_k: int, num_experts: int, device: torch.device, kind: str = "random") -> Routing:
    ids = torch.rand(num_tokens, num_experts).topk(top_k).indices
    if kind == "one expert":
        ids[:] = torch.arange(top_k)
    if kind == "empty experts":
        ids = torch.rand(num_tokens, top_k + 1).topk(top_k).indices
    valid = {"padded rows": num_tokens - 2, "nothing": 0}.get(kind)
    return routing_reference(ids.to(device), torch.rand(num_tokens, top_k, device=device), num_experts, TILE_ROWS, valid)


def cells_of(routing: Routing, num_columns: int, num_programs: int) -> Iterator[tuple[int, int, int, int]]:
    """(expert, first place, rows, column) as the kernels' roles find them: by _cell, from the group of tile work // num_columns."""
    tiles, num_work = routing.tiles_M5.tolist(), int(routing.num_tiles) * num_columns
    for program in range(num_programs):
        for work in range(program, num_work, num_programs):
            tile, column = _cell.fn(work, tiles[work // num_columns][3], tiles[work // num_columns][4], num_columns)
            yield (*tiles[tile][:3], column)


def walk(x: Tensor, routing: Routing, weights: ExpertWeights, is_up: bool) -> Tensor:
    """The kernels' addresses in float64: weight tiles cut from all experts' rows as TMA cuts them, zeros behind the end."""
    width = TILE_COLS // 2 if is_up else TILE_COLS
    num_cols = weights.hidden if is_up else weights.dim
    flat = (weights.gate_up_EFD if is_up else weights.down_EDF).double().flatten(0, 1)
    flat = torch.cat([flat, flat.new_zeros(TILE_COLS, flat.shape[1])])
    out = torch.full((routing.routed_R.shape[0], num_cols), torch.nan, dtype=torch.float64)
    for expert, first, rows, column in cells_of(routing, -(-num_cols // width), 3):
        places = slice(first, first + rows)
        part = x[routing.routed_R[places] // routing.top_k].double() if is_up else x[places]
        if is_up:
            row = expert * 2 * num_cols + column * width
            gate, up = part @ flat[row : row + width].T, part @ flat[row + num_cols : row + num_cols + width].T
            tile = gate * torch.sigmoid(gate) * up
        else:
            row = expert * num_cols + column * width
            tile = part @ flat[row : row + width].T
        box = out[places, column * width : (column + 1) * width]
        assert box.isnan().all(), "a cell was visited twice"
        box[:] = tile[:, : box.shape[1]]
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_the_walk_meets_every_cell_once(kind: str) -> None:
    x, weights, routing = (
        torch.randn(700, 24),
        weights_of(5, 24, 200, torch.device("cpu")),
        routing_of(700, 2, 5, torch.device("cpu"), kind),
    )
    placed = int(routing.offsets_E1[-1])
    act, rows = expert_gemm_reference(x, routing, weights)
    up, down = walk(x, routing, weights, is_up=True), walk(act, routing, weights, is_up=False)
    assert up[placed:].isnan().all() and down[placed:].isnan().all()
    assert error(up[:placed], act[:placed]) < bound(torch.float64) and error(down[:placed], rows[:placed]) < bound(torch.float64)


def test_groups_keep_an_experts_weights_together() -> None:
    """2,500 rows of one expert are 20 tiles: a group of 16, column by column, then one of 4."""
    routing = routing_of(2500, 1, 2, torch.device("cpu"), "one expert")
    cells = list(cells_of(routing, 3, 1))
    assert [column for *_, column in cells] == [0] * 16 + [1] * 16 + [2] * 16 + [0] * 4 + [1] * 4 + [2] * 4
    assert len(set(cells)) == 60


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import compile
from triton.experimental.gluon._runtime import GluonASTSource
from duomo_kernels import _expert_gemm_ws as ws

def box(rows): return f"tensordesc<bf16[{rows}, 64],{ws.SWIZZLED.value!r}>"

def build(kernel, constants, **types):
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in types if types[name][0] == "*"}
    source = GluonASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    built = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert built.metadata.shared <= 227 * 1024, built.metadata.shared
    assert "wgmma.mma_async.sync.aligned.m64n256k16" in built.asm["ptx"] and "ld.local" not in built.asm["ptx"]

rest = dict(STAGES=4, SKEW=1, TMA_STORE=True, USE_PDL=True)
more = dict(tiles="*i32", num_tiles="*i32")
build(ws._up_kernel, dict(TOP_K=8, K=2048, N=768, **rest), x="*bf16", w_desc=box(128), act_desc=box(64), act="*bf16", routed="*i32", **more)
build(ws._down_kernel, dict(K=768, N=2048, **rest), act_desc=box(64), w_desc=box(256), out_desc=box(64), out="*bf16", **more)
"""


@pytest.mark.slow
def test_compiles_for_hopper_without_one() -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def run(x: Tensor, routing: Routing, weights: ExpertWeights, tile: WsTile) -> tuple[float, float]:
    """Errors of act and rows at the places that hold something; the others must keep their poison."""
    placed = int(routing.offsets_E1[-1])
    act = x.new_full((routing.routed_R.shape[0], weights.hidden), torch.nan)
    rows = x.new_full((routing.routed_R.shape[0], weights.dim), torch.nan)
    up_ws(x, routing, weights, tile, out=act)
    down_ws(act, routing, weights, tile, out=rows)
    expected_act, expected_rows = expert_gemm_reference(x, routing, weights)
    assert act[placed:].isnan().all() and rows[placed:].isnan().all()
    return error(act[:placed], expected_act[:placed]), error(rows[:placed], expected_rows[:placed])


def on_hopper(num_tokens: int, weights: ExpertWeights) -> Tensor:
    x = torch.randn(num_tokens, weights.dim, device=weights.down_EDF.device).bfloat16()
    if not has_ws(x, weights):
        pytest.skip("needs a Hopper GPU")
    return x


@pytest.mark.gpu
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES.keys())
def test_close_to_float64(tile: WsTile, device: torch.device) -> None:
    """Every kind of routing, at counts around a tile's 128 rows and a consumer's 64."""
    weights = weights_of(5, 320, 192, device)
    for kind in KINDS:
        for num_tokens in (1, 63, 65, 257, 700):
            errors = run(on_hopper(num_tokens, weights), routing_of(num_tokens, 2, 5, device, kind), weights, tile)
            assert max(errors) <= bound(torch.bfloat16), (kind, num_tokens, errors)


@pytest.mark.gpu
@pytest.mark.parametrize(("dim", "hidden"), [(72, 40), (2048, 768)])
def test_odd_and_real_widths(dim: int, hidden: int, device: torch.device) -> None:
    weights = weights_of(3, dim, hidden, device)
    for num_tokens in (2, 1500):
        errors = run(on_hopper(num_tokens, weights), routing_of(num_tokens, 2, 3, device), weights, WsTile())
        assert max(errors) <= bound(torch.bfloat16), (num_tokens, errors)


@pytest.mark.gpu
@pytest.mark.parametrize("broken", ["another expert", "one weight", "another token"])
def test_a_broken_product_is_caught(broken: str, device: torch.device) -> None:
    weights, routing = weights_of(5, 320, 192, device), routing_of(257, 2, 5, device)
    x = on_hopper(257, weights)
    act, _ = expert_gemm_reference(x, routing, weights)
    if broken == "another expert":
        weights = ExpertWeights(gate_up_EFD=weights.gate_up_EFD.flip(0).contiguous(), down_EDF=weights.down_EDF)
    elif broken == "one weight":
        weights.gate_up_EFD[1, 3, 5] += 8.0
    else:
        x = x.roll(1, 0)
    assert error(up_ws(x, routing, weights, WsTile()), act) > bound(torch.bfloat16)
