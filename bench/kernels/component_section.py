"""Owns the measurement of a layer's routed launches one by one: gate, up, down, combine. Knows no peer.

Each is timed cold on four sets, as the layer's plan launches it. Their sum is more than the layer takes: inside a layer a launch starts
while the one before it ends. What is missing between sum and layer is what dependent launch saves.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from bench.compile_ahead import compile_ahead
from bench.gpu_stopwatch import floor_us, interleaved_us
from bench.kernels.layer_reference import choose
from bench.kernels.layer_section import NUM_SETS, SETS_BYTES, Run
from bench.kernels.shapes import LayerShape, make_logits, make_rows, make_weights, seeded
from bench.kernels.targets import OURS, Case
from duomo_kernels.expert_combine import expert_combine
from duomo_kernels.expert_gemm import expert_down, expert_up
from duomo_kernels.gate import gate
from duomo_kernels.moe_layer import GemmTiles, layer_plan


def measure_components(run: Run, shape: LayerShape) -> list[Case]:
    """In bf16, uniform routing, at the sizes where the plan is a routed one."""
    generator = seeded(7, run.device)
    num_weights = NUM_SETS if NUM_SETS * shape.layer_bytes() <= SETS_BYTES else 1
    weights = [make_weights(shape, generator) for _ in range(num_weights)]
    found = []
    for t in (t for t in shape.tokens if run.wants(t)):
        plan = layer_plan(weights[0], shape.top_k, t, may_be_direct=shape.rule.scoring == "softmax")
        if not isinstance(plan, GemmTiles) or not run.has_time(f"component {shape.name} T={t}"):
            continue
        logits = [make_logits(shape, t, "uniform", generator) for _ in range(NUM_SETS)]
        rows = [make_rows(shape, t, generator) for _ in range(NUM_SETS)]
        routings = [gate(each, shape.rule, tile_rows=plan.tile_rows) for each in logits]
        sets = list(zip(rows, routings, [weights[i % num_weights] for i in range(NUM_SETS)], strict=True))
        acts = [expert_up(x, r, w, plan.up) for x, r, w in sets]
        outs = [expert_down(act, r, w, plan.down) for act, (_, r, w) in zip(acts, sets, strict=True)]
        calls: dict[str, list[Callable[[], object]]] = {
            "gate": [partial(gate, each, shape.rule, tile_rows=plan.tile_rows) for each in logits],
            "up": [partial(expert_up, x, r, w, plan.up) for x, r, w in sets],
            "down": [partial(expert_down, act, r, w, plan.down) for act, (_, r, w) in zip(acts, sets, strict=True)],
            "combine": [partial(expert_combine, out, r.place_R, r.weights_TK) for out, r in zip(outs, routings, strict=True)],
        }
        compile_ahead([each[0] for each in calls.values()])
        distinct = sum(choose(each, shape.rule).num_distinct for each in logits) / NUM_SETS
        floors = _floors_us(shape, t, distinct)
        times = interleaved_us(calls, repeats=run.repeats)
        found += [
            Case(
                section="component", shape=shape.name, tokens=t, detail=name, distinct=distinct, floor_us=floors[name],
                times={OURS: times[name]},
            )
            for name in calls
        ]  # fmt: skip
    return found


def _floors_us(shape: LayerShape, t: int, distinct: float) -> dict[str, float]:
    """Each launch's own bytes and operations: what one writes the next one reads."""
    matrix, routed = shape.hidden * shape.dim, t * shape.top_k
    return {
        "gate": floor_us(4 * t * shape.num_experts + 16 * routed),
        "up": floor_us(4 * distinct * matrix + 2 * (t * shape.dim + routed * shape.hidden), 4 * routed * matrix),
        "down": floor_us(2 * distinct * matrix + 2 * routed * (shape.hidden + shape.dim), 2 * routed * matrix),
        "combine": floor_us(2 * (routed + t) * shape.dim),
    }
