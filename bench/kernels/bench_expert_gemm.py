"""The experts' two products in bf16, each alone, on layers of true size with a uniform router. Floor: weights once, or the operations.

The whole layer beside vLLM's is measured by bench_kernels.py; here stand the parts, with the tiles that the heuristic takes.
"""

from __future__ import annotations

from functools import partial

import torch

from bench.gpu_stopwatch import Options, Row, checked, gpu_bench, interleaved_us
from bench.kernels.shapes import SHAPES, LayerShape, make_logits, make_rows, make_weights, seeded
from duomo_kernels._weights import ExpertWeights
from duomo_kernels.expert_gemm import expert_down, expert_gemm_reference, expert_up
from duomo_kernels.gate import gate
from duomo_kernels.moe_layer import gemm_tiles

NUM_SETS = 4  # each of hundreds of megabytes: cold in L2 whatever their number
TOKENS = (16, 64, 256, 1024, 4096, 16384)


def measure(options: Options) -> list[Row]:
    rows: list[Row] = []
    for shape in (SHAPES["olmoe"], SHAPES["qwen3"]):
        tokens = [t for t in TOKENS if any(options.only in _name(shape, t, part) for part in ("up", "down"))]
        weights = [make_weights(shape, seeded(seed, torch.device("cuda"))) for seed in range(NUM_SETS)] if tokens else []
        for t in tokens:
            rows += _measure(shape, t, weights, options)
    return rows


def _name(shape: LayerShape, tokens: int, part: str) -> str:
    return f"{shape.name} {tokens} tokens {part}"


def _measure(shape: LayerShape, tokens: int, weights: list[ExpertWeights], options: Options) -> list[Row]:
    generator = seeded(tokens, torch.device("cuda"))
    tiles = gemm_tiles(tokens * shape.top_k / shape.num_experts)
    x_TD = make_rows(shape, tokens, generator)
    routing = gate(make_logits(shape, tokens, "uniform", generator), shape.rule, tile_rows=tiles.tile_rows)
    acts = [expert_up(x_TD, routing, one, tiles.up) for one in weights]
    expected_act, expected_rows = expert_gemm_reference(x_TD, routing, weights[0])
    errors = {
        "up": checked("expert_up", acts[0], expected_act),
        "down": checked("expert_down", expert_down(acts[0], routing, weights[0], tiles.down), expected_rows),
    }
    calls = {
        "up": [partial(expert_up, x_TD, routing, one, tiles.up) for one in weights],
        "down": [partial(expert_down, act, routing, one, tiles.down) for act, one in zip(acts, weights, strict=True)],
    }
    distinct = float((routing.counts_E > 0).sum())
    return [
        Row(
            case=_name(shape, tokens, part),
            times=interleaved_us({"ours": calls[part]}, repeats=options.repeats),
            num_bytes=distinct * shape.weights_per_expert * 2 * share,
            num_flop=shape.num_flop(tokens) * share,
            error=errors[part],
            about={"distinct": distinct, "tiles": str(tiles)},
        )
        for part, share in (("up", 2 / 3), ("down", 1 / 3))
        if options.only in _name(shape, tokens, part)
    ]


if __name__ == "__main__":
    gpu_bench("expert_gemm", measure)
