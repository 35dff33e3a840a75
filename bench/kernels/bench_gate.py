"""The gate (choice, histogram, order, tiles) against vLLM's topk_softmax + moe_align_block_size, by tokens and models.

Inputs are small and in real life just written by the router's product: graph replays over many sets of logits, whose outputs are the same
tensors. Bytes: logits read, weights, ids, both orders, tiles, offsets and counts written.
"""

from __future__ import annotations

from functools import partial

import torch

from bench.gpu_stopwatch import Call, Options, Row, checked, gpu_bench, interleaved_us
from bench.kernels import peers_vllm
from bench.kernels.shapes import SHAPES, LayerShape, make_logits, seeded
from bench.stopwatch import refuse_unless
from duomo_kernels._routing import max_tiles
from duomo_kernels.gate import empty_routing, gate, gate_reference

TOKENS = (1, 8, 16, 17, 64, 256, 1024, 1025, 4096, 16384)  # both sides of each change of plan
SETS = 16
REFERENCE_TOKENS = 1024  # the reference sorts in plain Python: seconds beyond


def measure(options: Options) -> list[Row]:
    device = torch.device("cuda")
    rows = []
    for shape in SHAPES.values():
        for num_tokens in TOKENS:
            case = f"{shape.name} {num_tokens} tokens"
            if options.only in case:
                rows.append(_row(case, shape, num_tokens, device, options.repeats))
    return rows


def _row(case: str, shape: LayerShape, num_tokens: int, device: torch.device, repeats: int) -> Row:
    num_experts, rule = shape.num_experts, shape.rule
    tile_rows = 16 if num_tokens * rule.top_k <= 16 * num_experts else 128
    sets = [make_logits(shape, num_tokens, "uniform", seeded(seed, device)) for seed in range(SETS)]
    out = empty_routing(num_tokens, rule.top_k, num_experts, tile_rows, device)
    error = None
    if num_tokens <= REFERENCE_TOKENS:
        gate(sets[0], rule, tile_rows=tile_rows, out=out)
        ref = gate_reference(sets[0], rule, tile_rows=tile_rows)
        error = checked("gate", out.weights_TK, ref.weights_TK.double())
        refuse_unless(torch.equal(out.routed_R, ref.routed_R) and torch.equal(out.place_R, ref.place_R), "the gate's order")
        refuse_unless(torch.equal(out.tiles_M5[: int(ref.num_tiles)], ref.tiles_M5[: int(ref.num_tiles)]), "the gate's tiles")
    calls: dict[str, list[Call]] = {"ours": [partial(gate, logits, rule, tile_rows=tile_rows, out=out) for logits in sets]}
    if peers_vllm.why_absent() is None and rule.scoring == "softmax":
        calls["vllm"] = [partial(peers_vllm.gate_and_align, logits, rule, tile_rows) for logits in sets]
    num_routed = num_tokens * rule.top_k
    num_words = num_tokens * num_experts + 4 * num_routed + 5 * max_tiles(num_routed, num_experts, tile_rows) + 2 * num_experts
    return Row(case=case, times=interleaved_us(calls, repeats=repeats), num_bytes=4.0 * num_words, error=error)


if __name__ == "__main__":
    gpu_bench("gate", measure)
