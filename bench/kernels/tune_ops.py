"""Owns what is tuned: for each size its inputs, variants and table entries. Knows neither how time is taken nor files.

A MoE layer: both products are searched one by one for each height of tile (they share it), the few-token path where it may run, and then
the best plans and the heuristic's meet as whole layers, from logits to output. Entries are what duomo_kernels.moe_layer.plan_from and
duomo_kernels._decode_pieces.config_from read:

    op experts, dtype bf16 | fp8    config {"path": "direct", "direct": {...}} or {"path": "gemm" | "fp8", "up": {...}, "down": {...}}
    op decode_attention             config: fields of DecodeConfig; num_tokens counts sequences, of 4,096 keys each

Legend: T tokens, K experts a token, E experts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from torch import Tensor

from bench.kernels import peers_vllm, tile_spaces
from bench.kernels.layer_section import NUM_SETS, SETS_BYTES
from bench.kernels.op_sections import Contexts, attention_calls
from bench.kernels.shapes import LayerShape, make_fp8_weights, make_logits, make_rows, make_weights, seeded
from bench.kernels.tile_search import Found, Plan, Variant, compile_all, search
from duomo_kernels._decode_pieces import TUNING_OP as DECODE_OP
from duomo_kernels._decode_pieces import DecodeConfig
from duomo_kernels._routing import Routing
from duomo_kernels._tuning import Scalar
from duomo_kernels._weights import ExpertWeights
from duomo_kernels.expert_direct import DirectTiles, default_tiles, expert_direct
from duomo_kernels.expert_gemm import expert_down, expert_up
from duomo_kernels.expert_gemm_fp8 import Fp8Tile, Fp8Tiles, expert_down_fp8, expert_up_fp8
from duomo_kernels.gate import gate
from duomo_kernels.moe_layer import MAX_DIRECT_ROUTED, TUNING_OP, GemmTiles, LayerPlan, heuristic_plan, moe_layer
from duomo_kernels.quantise_rows_fp8 import quantise_rows_fp8

Entry = dict[str, object]


@dataclass(frozen=True, slots=True)
class Inputs:
    """One set of a layer's inputs."""

    logits_TE: Tensor
    x_TD: Tensor
    weights: ExpertWeights


def config_of(plan: LayerPlan) -> dict[str, Scalar | dict[str, Scalar]]:
    """A plan as a table holds it."""
    if isinstance(plan, DirectTiles):
        return {"path": "direct", "direct": asdict(plan)}
    return {"path": "fp8" if isinstance(plan, Fp8Tiles) else "gemm", "up": asdict(plan.up), "down": asdict(plan.down)}


@dataclass(kw_only=True, slots=True)
class Tuner:
    """One search within a budget (ends_s on the monotonic clock). left counts the searches that still want a share of it."""

    device: torch.device
    ends_s: float
    left: int = field(default=1)

    def tune(self, shape: LayerShape, ops: Sequence[str], tokens: Sequence[int]) -> Iterator[Entry]:
        """Entries of the asked operations for one shape, as they are found."""
        self.left = 3 * len(ops) * len(tokens)
        for op in ops:
            if op == "attention":
                yield from self._tune_attention(shape, tokens)
                continue
            weights = self._weights(shape, op == "fp8")
            for t in tokens:
                if self._is_over(f"{op} {shape.name} T={t}"):
                    continue
                found = self._tune_layer(shape, self._inputs(shape, t, weights))
                dtype = "fp8" if op == "fp8" else "bf16"
                yield _entry(TUNING_OP, _sizes(shape), dtype, t, found, config_of(found.plan))

    def _is_over(self, what: str) -> bool:
        if time.monotonic() < self.ends_s:
            return False
        print(f"left out: {what}", flush=True)
        return True

    def _share_s(self) -> float:
        """When the search at hand has had its share of what is left."""
        now_s = time.monotonic()
        share_s = max(0.0, self.ends_s - now_s) / self.left
        self.left = max(1, self.left - 1)
        return now_s + share_s

    def _weights(self, shape: LayerShape, is_fp8: bool) -> list[ExpertWeights]:
        generator = seeded(7, self.device)
        make = make_fp8_weights if is_fp8 else make_weights
        num_weights = NUM_SETS if NUM_SETS * shape.layer_bytes(is_fp8) <= SETS_BYTES else 1
        return [make(shape, generator) for _ in range(num_weights)]

    def _inputs(self, shape: LayerShape, t: int, weights: list[ExpertWeights]) -> list[Inputs]:
        fresh = seeded(1000 + t, self.device)
        return [
            Inputs(make_logits(shape, t, "uniform", fresh), make_rows(shape, t, fresh), weights[i % len(weights)]) for i in range(NUM_SETS)
        ]

    def _tune_layer(self, shape: LayerShape, inputs: list[Inputs]) -> Found[LayerPlan]:
        """Parts first, then whole layers."""
        t, is_fp8 = inputs[0].x_TD.shape[0], inputs[0].weights.is_fp8
        is_plain = shape.rule.scoring == "softmax" and shape.rule.num_groups == 1
        usual = heuristic_plan(inputs[0].weights, shape.top_k, t, may_be_direct=is_plain)
        plans = self._fp8_plans(shape, inputs) if is_fp8 else self._gemm_plans(shape, inputs)
        if is_plain and t * shape.top_k <= MAX_DIRECT_ROUTED:
            plans.append(self._direct_plan(shape, inputs))

        def layer(one: Inputs, plan: LayerPlan) -> Tensor:
            return moe_layer(one.logits_TE, one.x_TD, one.weights, shape.rule, plan=plan).y_TD

        whole = [Variant(plan, [partial(layer, one, plan) for one in inputs]) for plan in (usual, *plans)]
        compile_all(whole)
        return search(whole[0], whole[1:], self._share_s())

    def _direct_plan(self, shape: LayerShape, inputs: list[Inputs]) -> LayerPlan:
        t, top_k = inputs[0].x_TD.shape[0], shape.top_k

        def run(one: Inputs, tiles: DirectTiles) -> Tensor:
            return expert_direct(one.logits_TE, one.x_TD, one.weights, shape.rule, tiles=tiles).y_TD

        tiles = [default_tiles(inputs[0].weights, t, top_k), *tile_spaces.direct_tiles(t)]
        variants = [Variant(each, [partial(run, one, each) for one in inputs]) for each in tiles]
        compile_all(variants)
        return search(variants[0], variants[1:], self._share_s()).plan

    def _gemm_plans(self, shape: LayerShape, inputs: list[Inputs]) -> list[LayerPlan]:
        """The best pair of tiles for each height."""
        t = inputs[0].x_TD.shape[0]
        act_RF = inputs[0].x_TD.new_empty(t * shape.top_k, shape.hidden)
        rows_RD = act_RF.new_empty(t * shape.top_k, shape.dim)
        found: list[LayerPlan] = []
        for block_m in tile_spaces.heights(t, shape.top_k, shape.num_experts):
            pairs = list(zip(inputs, self._routings(shape, inputs, block_m), strict=True))
            tiles = tile_spaces.up_tiles(block_m)
            ups = [Variant(tile, [partial(expert_up, one.x_TD, r, one.weights, tile, act_RF) for one, r in pairs]) for tile in tiles]
            # Every set multiplies the same rows: what a product costs does not depend on the numbers, and the rows are the smaller part.
            acts = act_RF.normal_()
            tiles = tile_spaces.down_tiles(block_m)
            downs = [Variant(tile, [partial(expert_down, acts, r, one.weights, tile, rows_RD) for one, r in pairs]) for tile in tiles]
            compile_all([*ups, *downs])
            down = search(downs[0], downs[1:], self._share_s()).plan
            found.append(GemmTiles(up=search(ups[0], ups[1:], self._share_s()).plan, down=down))
        return found

    def _fp8_plans(self, shape: LayerShape, inputs: list[Inputs]) -> list[LayerPlan]:
        def up(x: tuple[Tensor, Tensor], routing: Routing, weights: ExpertWeights, tile: Fp8Tile) -> Tensor:
            return expert_up_fp8(*x, routing, weights, tile)[0]

        found: list[LayerPlan] = []
        rows = [quantise_rows_fp8(one.x_TD) for one in inputs]
        for block_m in tile_spaces.heights(inputs[0].x_TD.shape[0], shape.top_k, shape.num_experts):
            routings = self._routings(shape, inputs, block_m)
            sets = list(zip(rows, routings, [one.weights for one in inputs], strict=True))
            tiles = tile_spaces.up_tiles_fp8(block_m)
            ups = [Variant(tile, [partial(up, x, r, w, tile) for x, r, w in sets]) for tile in tiles]
            act = expert_up_fp8(*rows[0], routings[0], inputs[0].weights, tiles[0])  # for all sets: see above
            tiles = tile_spaces.down_tiles_fp8(block_m)
            downs = [Variant(tile, [partial(expert_down_fp8, *act, r, w, tile) for _, r, w in sets]) for tile in tiles]
            compile_all([*ups, *downs])
            best = [search(part[0], part[1:], self._share_s()).plan for part in (ups, downs)]
            found.append(Fp8Tiles(up=best[0], down=best[1]))
        return found

    def _routings(self, shape: LayerShape, inputs: list[Inputs], tile_rows: int) -> list[Routing]:
        return [gate(one.logits_TE, shape.rule, tile_rows=tile_rows) for one in inputs]

    def _tune_attention(self, shape: LayerShape, batches: Sequence[int]) -> Iterator[Entry]:
        heads = {"num_q_heads": shape.num_q_heads, "num_kv_heads": shape.num_kv_heads, "head_dim": shape.head_dim}
        for batch in batches if shape.num_kv_heads else ():
            contexts = Contexts(f"{batch} x 4096", (4096,) * batch)
            sets = attention_calls(shape, contexts, self.device)
            if sets is None or self._is_over(f"attention {shape.name} {batch} sequences"):
                continue
            usual, calls_of = sets
            variants = [Variant(config, calls_of(config)) for config in (usual, *tile_spaces.decode_configs(usual))]
            compile_all(variants)
            found: Found[DecodeConfig] = search(variants[0], variants[1:], self._share_s())
            yield _entry(DECODE_OP, heads, "bf16", batch, found, asdict(found.plan))

    def tune_vllm(self, shape: LayerShape, tokens: Sequence[int]) -> dict[str, dict[str, peers_vllm.TileConfig]]:
        """vLLM's tile for each size of one shape, whole layers timed, in bf16 and fp8."""
        found: dict[str, dict[str, peers_vllm.TileConfig]] = {}
        self.left = 2 * len(tokens)
        for is_fp8 in (False, True):
            weights = self._weights(shape, is_fp8)
            for t in tokens:
                if self._is_over(f"vllm {shape.name} T={t}"):
                    continue
                inputs = self._inputs(shape, t, weights)
                configs = [dict(peers_vllm.default_config(t, weights[0], shape.top_k)), *peers_vllm.tile_candidates(t, is_fp8)]
                variants = [
                    Variant(c, [partial(peers_vllm.layer, one.logits_TE, one.x_TD, one.weights, shape.rule, c) for one in inputs])
                    for c in configs
                ]
                compile_all(variants)
                best = search(variants[0], variants[1:], self._share_s())
                key = peers_vllm.tuned_key(shape.name, is_fp8)
                print(f"vllm {key} T={t}: {best.us} us, as shipped {best.heuristic_us}, of {best.num_tried}: {best.plan}", flush=True)
                found.setdefault(key, {})[str(t)] = best.plan
        return found


def _sizes(shape: LayerShape) -> dict[str, int]:
    return {"num_experts": shape.num_experts, "top_k": shape.top_k, "dim": shape.dim, "hidden": shape.hidden}


def _entry(op: str, sizes: dict[str, int], dtype: str, num_tokens: int, found: Found[Plan], config: object) -> Entry:
    print(f"{op} {dtype} {sizes} at {num_tokens}: {found.us} us, heuristic {found.heuristic_us}: {config}", flush=True)
    times = {"us": found.us, "heuristic_us": found.heuristic_us}
    return {"op": op, "shape": sizes, "dtype": dtype, "num_tokens": num_tokens, "config": config} | times
