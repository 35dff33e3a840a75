"""The experts' two products in fp8, and each alone, on layers of true size with a uniform router. Floor: weights once, or the operations.

The whole layer beside vLLM's is measured by bench_kernels.py; here stand the parts, with the tiles that the heuristic takes.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bench.gpu_stopwatch import SEEN_FP8_FLOP_PER_S, Call, Options, Row, checked, gpu_bench, interleaved_us
from bench.kernels.shapes import SHAPES, LayerShape, make_fp8_weights, make_rows, seeded
from duomo_kernels._routing import Routing, routing_reference
from duomo_kernels._weights import ExpertWeights
from duomo_kernels.expert_gemm_fp8 import (
    Fp8Tiles,
    expert_down_fp8,
    expert_down_fp8_reference,
    expert_gemm_fp8,
    expert_up_fp8,
    fp8_tiles,
)
from duomo_kernels.quantise_rows_fp8 import dequantise_rows, num_groups, quantise_rows_fp8

NUM_SETS = 4  # each of hundreds of megabytes: cold in L2 whatever their number
TOKENS = (16, 32, 64, 256, 1024, 4096)
Rows = tuple[Tensor, Tensor]


def measure(options: Options) -> list[Row]:
    rows: list[Row] = []
    device = torch.device("cuda")
    for shape in (SHAPES["olmoe"], SHAPES["qwen3"]):
        tokens = [t for t in TOKENS if any(options.only in _name(shape, t, part) for part in PARTS)]
        weights = [make_fp8_weights(shape, seeded(seed, device)) for seed in range(NUM_SETS)] if tokens else []
        for t in tokens:
            rows += _measure(shape, t, weights, options)
    return rows


PARTS = ("up", "down", "both")


def _name(shape: LayerShape, tokens: int, part: str) -> str:
    return f"{shape.name} {tokens} tokens {part}"


def _measure(shape: LayerShape, tokens: int, weights: list[ExpertWeights], options: Options) -> list[Row]:
    """Rows of one layer at one number of tokens: up, down, both."""
    tiles = fp8_tiles(tokens * shape.top_k, shape.num_experts)
    inputs = [_inputs(shape, tokens, tiles, seed) for seed in range(NUM_SETS)]
    (x, routing), one = inputs[0], weights[0]
    act = expert_up_fp8(*x, routing, one, tiles.up)
    expected_RD = expert_down_fp8_reference(dequantise_rows(*act), routing, one)
    error = checked("expert_gemm_fp8", expert_gemm_fp8(*x, routing, one, tiles), expected_RD)
    acts = [expert_up_fp8(*x, routing, w, tiles.up) for (x, routing), w in zip(inputs, weights, strict=True)]
    calls: dict[str, list[Call]] = {
        "up": [partial(expert_up_fp8, *x, r, w, tiles.up) for (x, r), w in zip(inputs, weights, strict=True)],
        "down": [partial(expert_down_fp8, *a, r, w, tiles.down) for a, (_, r), w in zip(acts, inputs, weights, strict=True)],
        "both": [partial(expert_gemm_fp8, *x, r, w, tiles) for (x, r), w in zip(inputs, weights, strict=True)],
    }
    distinct = sum(float((r.counts_E > 0).sum()) for _, r in inputs) / len(inputs)
    found = []
    for part, share in (("up", 2 / 3), ("down", 1 / 3), ("both", 1.0)):
        if options.only not in _name(shape, tokens, part):
            continue
        found.append(
            Row(
                case=_name(shape, tokens, part),
                times=interleaved_us({"ours": calls[part]}, repeats=options.repeats),
                num_bytes=share * shape.num_bytes(tokens, distinct, is_fp8=True),
                num_flop=share * shape.num_flop(tokens),
                flop_per_s=SEEN_FP8_FLOP_PER_S,
                error=error,
                about={"distinct": distinct, "tile_rows": tiles.tile_rows, "scales_a_row": num_groups(shape.dim)},
            )
        )
    return found


def _inputs(shape: LayerShape, tokens: int, tiles: Fp8Tiles, seed: int) -> tuple[Rows, Routing]:
    """x quantised, and a uniform routing."""
    generator = seeded(100 + seed, torch.device("cuda"))
    x = quantise_rows_fp8(make_rows(shape, tokens, generator))
    ids_TK = torch.rand(tokens, shape.num_experts, generator=generator, device="cuda").topk(shape.top_k).indices
    return x, routing_reference(ids_TK, torch.ones(ids_TK.shape, device="cuda"), shape.num_experts, tiles.tile_rows)


if __name__ == "__main__":
    gpu_bench("expert_gemm_fp8", measure)
