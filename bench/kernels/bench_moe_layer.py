"""A whole MoE layer by each path that suits its number of tokens, and what batch-invariance costs: the deterministic plan beside it.

The layer beside vLLM's is measured by bench_kernels.py.
"""

from __future__ import annotations

from functools import partial

import torch

from bench.gpu_stopwatch import Options, Row, checked, gpu_bench, interleaved_us
from bench.kernels.layer_reference import choose, layer_reference, sample_tokens
from bench.kernels.shapes import SHAPES, LayerShape, make_logits, make_rows, make_weights, seeded
from duomo_kernels._weights import ExpertWeights
from duomo_kernels.expert_direct import default_tiles
from duomo_kernels.moe_layer import MAX_DIRECT_ROUTED, LayerOptions, moe_layer

NUM_SETS = 4
TOKENS = (1, 2, 4, 8, 64, 256, 1024, 4096, 16384)


def measure(options: Options) -> list[Row]:
    rows: list[Row] = []
    for shape in (SHAPES["olmoe"], SHAPES["qwen3"]):
        tokens = [t for t in TOKENS if options.only in _name(shape, t)]
        weights = [make_weights(shape, seeded(seed, torch.device("cuda"))) for seed in range(NUM_SETS)] if tokens else []
        rows += [_measure(shape, t, weights, options) for t in tokens]
    return rows


def _name(shape: LayerShape, tokens: int) -> str:
    return f"{shape.name} {tokens} tokens"


def _measure(shape: LayerShape, tokens: int, weights: list[ExpertWeights], options: Options) -> Row:
    generator = seeded(tokens, torch.device("cuda"))
    sets = [(make_logits(shape, tokens, "uniform", generator), make_rows(shape, tokens, generator), one) for one in weights]
    choices = [choose(logits_TE, shape.rule) for logits_TE, _, _ in sets]
    sample_S = sample_tokens(choices[0], shape.num_experts)
    expected_SD = layer_reference(sets[0][1], choices[0], weights[0], sample_S)
    layer = partial(moe_layer, rule=shape.rule)
    sides = {"ours": layer, "deterministic": partial(layer, options=LayerOptions(is_deterministic=True))}
    if 1 < tokens <= MAX_DIRECT_ROUTED // shape.top_k:
        sides["direct"] = partial(layer, plan=default_tiles(weights[0], tokens, shape.top_k))
    errors = {name: checked(f"moe_layer {name}", run(*sets[0]).y_TD[sample_S], expected_SD) for name, run in sides.items()}
    distinct = sum(choice.num_distinct for choice in choices) / len(choices)
    return Row(
        case=_name(shape, tokens),
        times=interleaved_us({name: [partial(run, *one) for one in sets] for name, run in sides.items()}, repeats=options.repeats),
        num_bytes=shape.num_bytes(tokens, distinct),
        num_flop=shape.num_flop(tokens),
        error=errors["ours"],
        about={"distinct": distinct},
    )


if __name__ == "__main__":
    gpu_bench("moe_layer", measure)
