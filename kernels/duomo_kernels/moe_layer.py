"""Owns one MoE layer on a GPU, from router logits to output: which kernels run, with which tiles. Knows nothing of their insides.

    y[t] = sum over k of w[t, k] * expert[ids[t, k]](x[t])        w, ids as the model's GateRule says

    direct      few tokens: two launches, no sort (expert_direct.py)
    routed      gate, up with SwiGLU, down, combine: four launches; one more for fp8 weights, which quantises x once a token

Which path and which tiles: the device's table of measurements where it holds the shape, else the heuristic here. With is_deterministic
a row's bits depend on that row alone: always the routed path with one tile configuration, in every batch of whatever size.

Legend: T tokens, K experts a token, E experts, D model, F expert hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from duomo_kernels._gate_capacity import Capacity, Overflow
from duomo_kernels._routing import GateRule
from duomo_kernels._tuning import Config, tuned
from duomo_kernels._weights import ExpertWeights, dequantised
from duomo_kernels.expert_combine import expert_combine
from duomo_kernels.expert_direct import DirectTiles, default_tiles, empty_answer, expert_direct
from duomo_kernels.expert_gemm import GemmTile, expert_down, expert_up
from duomo_kernels.expert_gemm_fp8 import Fp8Tile, Fp8Tiles, expert_gemm_fp8, fp8_tiles
from duomo_kernels.gate import gate, gate_reference
from duomo_kernels.quantise_rows_fp8 import quantise_rows_fp8

TUNING_OP = "experts"
MAX_DIRECT_ROUTED = 64  # T * K up to which the direct path may be chosen


@dataclass(frozen=True, kw_only=True, slots=True)
class GemmTiles:
    """Tiles of both products; they share the routing's rows a tile."""

    up: GemmTile
    down: GemmTile

    def __post_init__(self) -> None:
        assert self.up.block_m == self.down.block_m, self

    @property
    def tile_rows(self) -> int:
        return self.up.block_m


LayerPlan = DirectTiles | GemmTiles | Fp8Tiles


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerOptions:
    """What a model or a batch asks beyond the rule.

    bias_E float32 [E]: added to the scores where experts are chosen. num_valid [1] int32 on the device: rows from there on give zeros. A
    capacity needs an `overflow` for its counters; with overflow="residual" the lost weight carries x over. is_deterministic: see above.
    """

    bias_E: Tensor | None = None
    num_valid: Tensor | None = None
    capacity: Capacity | None = None
    overflow: Overflow | None = None
    is_deterministic: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeAnswer:
    """y_TD in x's dtype; counts_E int32: the gate's choices by expert, valid rows alone; ids_TK int32 and weights_TK float32."""

    y_TD: Tensor
    counts_E: Tensor
    ids_TK: Tensor
    weights_TK: Tensor


def moe_layer_reference(
    logits_TE: Tensor, x_TD: Tensor, weights: ExpertWeights, rule: GateRule, *, bias_E: Tensor | None = None, num_valid: int | None = None
) -> Tensor:
    """y in float64, expert by expert; rows from num_valid on are zero."""
    routing = gate_reference(logits_TE, rule, tile_rows=16, bias_E=bias_E, num_valid=num_valid)
    gate_up_EFD, down_EDF = dequantised(weights)
    y_TD = torch.zeros(x_TD.shape, dtype=torch.float64, device=x_TD.device)
    for expert in range(weights.num_experts):
        token_N, rank_N = (routing.ids_TK == expert).nonzero(as_tuple=True)
        hidden_gate, hidden_up = (x_TD[token_N].double() @ gate_up_EFD[expert].T).chunk(2, -1)
        rows_ND = (hidden_gate * torch.sigmoid(hidden_gate) * hidden_up) @ down_EDF[expert].T
        y_TD.index_add_(0, token_N, routing.weights_TK[token_N, rank_N].double()[:, None] * rows_ND)
    return y_TD


def moe_layer(
    logits_TE: Tensor,
    x_TD: Tensor,
    weights: ExpertWeights,
    rule: GateRule,
    *,
    options: LayerOptions | None = None,
    plan: LayerPlan | None = None,
    out_TD: Tensor | None = None,
) -> MoeAnswer:
    """logits [T, E], x [T, D] -> MoeAnswer. Captured by CUDA graphs after one call without: sizes depend on T alone."""
    options = LayerOptions() if options is None else options
    is_plain = options.bias_E is None and options.capacity is None and rule.scoring == "softmax" and rule.num_groups == 1
    if plan is None:
        num_tokens, is_deterministic = x_TD.shape[0], options.is_deterministic
        plan = layer_plan(weights, rule.top_k, num_tokens, may_be_direct=is_plain, is_deterministic=is_deterministic)
    if not isinstance(plan, DirectTiles):
        return _routed(logits_TE, x_TD, weights, rule, plan, options, out_TD)
    assert is_plain, "the direct path knows softmax rules without bias, groups or capacity"
    out = empty_answer(x_TD, weights.num_experts, rule.top_k, out_TD)
    answer = expert_direct(logits_TE.float(), x_TD, weights, rule, out, plan, options.num_valid)
    return MoeAnswer(y_TD=answer.y_TD, counts_E=answer.counts_E, ids_TK=answer.ids_TK, weights_TK=answer.weights_TK)


def _routed(
    logits_TE: Tensor,
    x_TD: Tensor,
    weights: ExpertWeights,
    rule: GateRule,
    plan: GemmTiles | Fp8Tiles,
    options: LayerOptions,
    out_TD: Tensor | None,
) -> MoeAnswer:
    capacity, overflow = options.capacity, options.overflow
    quantised = quantise_rows_fp8(x_TD) if isinstance(plan, Fp8Tiles) else None
    routing = gate(
        logits_TE,
        rule,
        tile_rows=plan.tile_rows,
        bias_E=options.bias_E,
        num_valid=options.num_valid,
        capacity=capacity,
        overflow=overflow,
        is_invariant=options.is_deterministic,
    )
    if isinstance(plan, Fp8Tiles):
        assert quantised is not None
        rows_RD = expert_gemm_fp8(*quantised, routing, weights, plan)
    else:
        rows_RD = expert_down(expert_up(x_TD, routing, weights, plan.up), routing, weights, plan.down)
    keeps_lost = capacity is not None and capacity.overflow == "residual"
    y_TD = expert_combine(
        rows_RD,
        routing.place_R,
        routing.weights_TK,
        lost_T=overflow.lost_T if overflow is not None and keeps_lost else None,
        x_TD=x_TD if keeps_lost else None,
        out_TD=out_TD,
    )
    return MoeAnswer(y_TD=y_TD, counts_E=routing.counts_E, ids_TK=routing.ids_TK, weights_TK=routing.weights_TK)


def layer_plan(
    weights: ExpertWeights, top_k: int, num_tokens: int, *, may_be_direct: bool = True, is_deterministic: bool = False
) -> LayerPlan:
    """The measured configuration for the nearest number of tokens, else the heuristic's."""
    if weights.down_EDF.dtype == torch.float32:
        return _FLOAT32_TILES
    if is_deterministic:
        return _deterministic_plan(weights)
    shape = {"num_experts": weights.num_experts, "top_k": top_k, "dim": weights.dim, "hidden": weights.hidden}
    config = tuned(TUNING_OP, shape, "fp8" if weights.is_fp8 else "bf16", num_tokens, weights.down_EDF.device)
    plan = None if config is None else plan_from(config)
    if plan is None or (isinstance(plan, DirectTiles) and not (may_be_direct and 0 < num_tokens * top_k <= MAX_DIRECT_ROUTED)):
        plan = heuristic_plan(weights, top_k, num_tokens, may_be_direct=may_be_direct)
    return plan


def heuristic_plan(weights: ExpertWeights, top_k: int, num_tokens: int, *, may_be_direct: bool = True) -> LayerPlan:
    """What to take where nothing was measured: by the rows that an expert has in the mean."""
    if may_be_direct and num_tokens == 1:
        return default_tiles(weights, num_tokens, top_k)
    if weights.is_fp8:
        return fp8_tiles(num_tokens * top_k, weights.num_experts)
    return gemm_tiles(num_tokens * top_k / weights.num_experts)


def gemm_tiles(mean_rows: float) -> GemmTiles:
    """Tiles for experts of so many rows in the mean: what was fast on an H100 (bench/results/expert_gemm_sweep.json, _ways.json)."""
    if mean_rows <= 3:  # weights stream: few rows, and long pieces of each weight row, which HBM likes better than many short ones
        up = GemmTile(block_m=16, block_n=32, block_k=256, num_warps=4, num_stages=3, touch=256)
        return GemmTiles(up=up, down=GemmTile(block_m=16, block_n=64, block_k=256, num_warps=4, num_stages=3, touch=256))
    if mean_rows <= 12:  # bench/results/expert_tiles_few_rows_h100.json: faster the fewer experts have most rows
        up = GemmTile(block_m=64, block_n=32, block_k=128, num_warps=4, num_stages=3, touch=256)
        return GemmTiles(up=up, down=GemmTile(block_m=64, block_n=64, block_k=128, num_warps=4, num_stages=3, touch=256))
    if mean_rows <= 48:
        up = GemmTile(block_m=64, block_n=64, block_k=128, num_warps=4, num_stages=2, touch=256)
        return GemmTiles(up=up, down=GemmTile(block_m=64, block_n=128, block_k=128, num_warps=4, num_stages=2, touch=256))
    up = GemmTile(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=4)
    if mean_rows <= 160:
        return GemmTiles(up=up, down=GemmTile(block_m=128, block_n=128, block_k=128, num_warps=8, num_stages=3, is_flat=True))
    return GemmTiles(up=up, down=GemmTile(block_m=128, block_n=256, block_k=64, num_warps=8, num_stages=4, is_flat=True))


# Without tensor cores, which know float32 only cut to TF32: the largest tile whose operands fit into registers. Asked for by tests alone.
_FLOAT32_TILE = GemmTile(block_m=16, block_n=32, block_k=32, num_warps=4, num_stages=2)
_FLOAT32_TILES = GemmTiles(up=_FLOAT32_TILE, down=_FLOAT32_TILE)


def _deterministic_plan(weights: ExpertWeights) -> LayerPlan:
    """One height for every tile: a product of lower tiles may use another instruction, whose sums round otherwise."""
    if weights.is_fp8:
        both = Fp8Tile(block_m=64, block_n=128, num_warps=4, num_stages=3, shrinks=False)
        return Fp8Tiles(up=both, down=both)
    tile = GemmTile(block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=4, shrinks=False)
    return GemmTiles(up=tile, down=GemmTile(block_m=64, block_n=128, block_k=64, num_warps=4, num_stages=4, shrinks=False))


def plan_from(config: Config) -> LayerPlan:
    """A plan from a tuning table's config: {"path": "direct" | "gemm" | "fp8", then the tiles' fields by name}."""

    def group(name: str) -> dict[str, Any]:
        fields = config[name]
        assert isinstance(fields, Mapping), f"{name}: {fields!r} is no group of fields"
        return dict(fields)

    if config["path"] == "direct":
        return DirectTiles(**group("direct"))
    if config["path"] == "fp8":
        return Fp8Tiles(up=Fp8Tile(**group("up")), down=Fp8Tile(**group("down")))
    assert config["path"] == "gemm", f"path: {config['path']!r} is neither direct, gemm nor fp8"
    return GemmTiles(up=GemmTile(**group("up")), down=GemmTile(**group("down")))
