"""The two-launch layer of a few tokens: its default tiles, others worth trying, and shared experts read once a token instead of once.

The layer beside vLLM's is measured by bench_kernels.py; here stand the ways to cut the work.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from bench.gpu_stopwatch import Options, Row, checked, gpu_bench, interleaved_us
from bench.kernels.layer_reference import choose, layer_reference, sample_tokens
from bench.kernels.shapes import SHAPES, LayerShape, make_logits, make_rows, make_weights, seeded
from duomo_kernels._weights import ExpertWeights
from duomo_kernels.expert_direct import DirectTiles, default_tiles, expert_direct

NUM_SETS = 4  # each of hundreds of megabytes: cold in L2 whatever their number
TOKENS = (1, 2, 4, 8)


def measure(options: Options) -> list[Row]:
    rows: list[Row] = []
    for shape in (SHAPES["olmoe"], SHAPES["qwen3"], SHAPES["mixtral"]):
        tokens = [t for t in TOKENS if options.only in _name(shape, t)]
        weights = [make_weights(shape, seeded(seed, torch.device("cuda"))) for seed in range(NUM_SETS)] if tokens else []
        rows += [_measure(shape, t, weights, options) for t in tokens]
        del weights
    return rows


def _name(shape: LayerShape, tokens: int) -> str:
    return f"{shape.name} {tokens} tokens"


def variants(usual: DirectTiles, tokens: int) -> dict[str, DirectTiles]:
    """Programs half and twice as large, in either kernel; experts read once a token."""
    found = {
        "ours": usual,
        "gate_up half": replace(usual, gate_up_steps=max(1, usual.gate_up_steps // 2)),
        "gate_up wide": replace(usual, gate_up_rows=2 * usual.gate_up_rows, gate_up_steps=max(1, usual.gate_up_steps // 2)),
        "down tall": replace(usual, down_rows=2 * usual.down_rows),
        "down deep": replace(usual, down_depth=2 * usual.down_depth),
    }
    return found if tokens == 1 else found | {"each token": replace(usual, is_grouped=False)}


def _measure(shape: LayerShape, tokens: int, weights: list[ExpertWeights], options: Options) -> Row:
    generator = seeded(tokens, torch.device("cuda"))
    sets = [(make_logits(shape, tokens, "uniform", generator), make_rows(shape, tokens, generator), one) for one in weights]
    choices = [choose(logits_TE, shape.rule) for logits_TE, _, _ in sets]
    sample_S = sample_tokens(choices[0], shape.num_experts)
    expected_SD = layer_reference(sets[0][1], choices[0], weights[0], sample_S)
    usual = default_tiles(weights[0], tokens, shape.top_k)
    sides = {name: partial(expert_direct, rule=shape.rule, tiles=tiles) for name, tiles in variants(usual, tokens).items()}
    errors = {name: checked(f"expert_direct {name}", run(*sets[0]).y_TD[sample_S], expected_SD) for name, run in sides.items()}
    distinct = sum(choice.num_distinct for choice in choices) / len(choices)
    return Row(
        case=_name(shape, tokens),
        times=interleaved_us({name: [partial(run, *one) for one in sets] for name, run in sides.items()}, repeats=options.repeats),
        num_bytes=shape.num_bytes(tokens, distinct),
        num_flop=shape.num_flop(tokens),
        error=errors["ours"],
        about={"distinct": distinct, "tiles": str(usual)},
    )


if __name__ == "__main__":
    gpu_bench("expert_direct", measure)
