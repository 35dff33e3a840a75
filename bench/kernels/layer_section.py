"""Owns the measurement of whole MoE layers, from the router's logits to the output: ours, vLLM's twice, torch's. Knows no kernel's insides.

Each of four sets has its own weights, rows and logits, so that a call finds nothing of its own in L2 (a layer too large for four sets is
cold by itself). Before anything is timed, ours and each peer are held against a float64 answer on sampled tokens; rows outside the sample
are compared with vLLM's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from bench.compile_ahead import compile_ahead
from bench.gpu_stopwatch import interleaved_us
from bench.kernels import peers_vllm
from bench.kernels.layer_reference import Choice, choose, layer_reference, sample_tokens
from bench.kernels.shapes import SKEWS, LayerShape, Skew, make_fp8_weights, make_logits, make_rows, make_weights, seeded
from bench.kernels.targets import OURS, Case
from duomo_kernels._bounds import bound, error
from duomo_kernels._weights import ExpertWeights

NUM_SETS = 4
SETS_BYTES = 16 << 30  # more than this is not held four times: such a layer is many times the L2 by itself
FP8_TOKENS = (1, 8, 16, 32, 64, 256, 1024, 4096)
TORCH_FROM = 1024  # torch's grouped GEMM is a peer where products dominate
MOSTLY = 0.999  # of the rows outside the sample: two gates may choose differently where two logits are within a rounding

Layer = Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What was asked for. deadline_s is on the monotonic clock: cases that would start later are left out and named.

    late: those of them that are cases, for the verdicts that they are missing from.
    """

    device: torch.device
    repeats: int
    deadline_s: float
    tokens: frozenset[int] = frozenset()
    skews: tuple[Skew, ...] = SKEWS
    left_out: list[str] = field(default_factory=list)
    late: list[Case] = field(default_factory=list)

    def wants(self, tokens: int) -> bool:
        return not self.tokens or tokens in self.tokens

    def has_time(self, what: Case | str) -> bool:
        if time.monotonic() < self.deadline_s:
            return True
        if isinstance(what, Case):
            self.late.append(what)
        self.left_out.append(what.name() if isinstance(what, Case) else what)
        return False


@dataclass(frozen=True, slots=True)
class _Set:
    logits_TE: Tensor
    x_TD: Tensor
    weights: ExpertWeights
    bf16: ExpertWeights | None  # beside fp8 weights: what our bf16 layer is timed with


def ours(logits_TE: Tensor, x_TD: Tensor, weights: ExpertWeights, shape: LayerShape) -> Tensor:
    """Our layer."""
    from duomo_kernels.moe_layer import moe_layer

    return moe_layer(logits_TE, x_TD, weights, shape.rule).y_TD


def measure_layers(run: Run, shape: LayerShape, is_fp8: bool = False) -> list[Case]:
    """Every wanted number of tokens and skew of one shape."""
    generator = seeded(7, run.device)
    num_weights = NUM_SETS if NUM_SETS * shape.layer_bytes(is_fp8) <= SETS_BYTES else 1
    make = make_fp8_weights if is_fp8 else make_weights
    weights = [make(shape, generator) for _ in range(num_weights)]
    bf16 = [make_weights(shape, generator) for _ in range(num_weights)] if is_fp8 else []
    tokens = [t for t in (FP8_TOKENS if is_fp8 else shape.tokens) if run.wants(t)]

    def sets(num_tokens: int, skew: Skew) -> list[_Set]:
        fresh = seeded(1000 + num_tokens, run.device)
        return [
            _Set(
                make_logits(shape, num_tokens, skew, fresh),
                make_rows(shape, num_tokens, fresh),
                weights[i % num_weights],
                bf16[i % num_weights] if is_fp8 else None,
            )
            for i in range(NUM_SETS)
        ]

    firsts = [call for t in tokens for calls in _sides(shape, t, sets(t, "uniform")[:1]).values() for call in calls]
    compile_ahead(firsts)
    found = []
    for skew in run.skews:
        for t in tokens:
            case = Case(section="fp8" if is_fp8 else "layer", shape=shape.name, tokens=t, skew=skew, dtype="fp8" if is_fp8 else "bf16")
            if run.has_time(case):
                found.append(_measure(run, shape, case, sets(t, skew)))
    return found


def _sides(shape: LayerShape, num_tokens: int, sets: list[_Set]) -> dict[str, list[Layer]]:
    """Calls by side, one for each set."""
    is_fp8 = sets[0].weights.is_fp8
    found: dict[str, list[Layer]] = {OURS: [partial(ours, s.logits_TE, s.x_TD, s.weights, shape) for s in sets]}
    if is_fp8:
        found["ours_bf16"] = [partial(ours, s.logits_TE, s.x_TD, s.bf16, shape) for s in sets if s.bf16 is not None]
    if peers_vllm.why_absent() is None:
        found["vllm"] = [partial(peers_vllm.layer, s.logits_TE, s.x_TD, s.weights, shape.rule) for s in sets]
        if (config := peers_vllm.tuned_config(shape.name, is_fp8, num_tokens)) is not None:
            found["vllm_tuned"] = [partial(peers_vllm.layer, s.logits_TE, s.x_TD, s.weights, shape.rule, config) for s in sets]
    if num_tokens >= TORCH_FROM and not is_fp8 and shape.rule.scoring == "softmax":
        found["torch"] = [partial(peers_vllm.torch_layer, s.logits_TE, s.x_TD, s.weights, shape.rule) for s in sets]
    return found


def _measure(run: Run, shape: LayerShape, case: Case, sets: list[_Set]) -> Case:
    is_fp8 = sets[0].weights.is_fp8
    choices = [choose(s.logits_TE, shape.rule) for s in sets]
    distinct = sum(choice.num_distinct for choice in choices) / len(sets)
    floor = shape.floor_us(case.tokens, distinct, is_fp8)
    sides = _sides(shape, case.tokens, sets)
    limit = _limit(sets[0].weights)
    with torch.inference_mode():
        checks = dict(_checks(sides, sets[0], choices[0], shape.num_experts))
    notes = []
    for name, result in checks.items():
        if name == "ours_bf16":
            continue  # other weights: held against its own answer in the section of bf16 layers
        if isinstance(result, str) or result > limit:
            why = result if isinstance(result, str) else f"error {result:.2e}, bound {limit:.2e}"
            if name == OURS:
                return replace(case, distinct=distinct, floor_us=floor, red=why)
            notes.append(f"{name} left out: {why}")
            del sides[name]
    times = interleaved_us(sides, repeats=run.repeats)
    wrong = checks[OURS]
    assert not isinstance(wrong, str), "a failure of ours has returned above"
    return replace(case, distinct=distinct, floor_us=floor, times=times, error=wrong, notes=tuple(notes))


def _checks(sides: dict[str, list[Layer]], one: _Set, choice: Choice, num_experts: int) -> Iterator[tuple[str, float | str]]:
    """(side, its error on the sampled tokens of the first set, or what went wrong)."""
    tokens_S = sample_tokens(choice, num_experts)
    expected_SD = layer_reference(one.x_TD, choice, one.weights, tokens_S)
    mine: Tensor | None = None
    for name, calls in sides.items():
        try:
            out_TD = calls[0]()
            torch.cuda.synchronize()
        except (RuntimeError, AssertionError, TypeError, ValueError) as problem:
            yield name, f"{type(problem).__name__}: {str(problem).splitlines()[0][:120] if str(problem) else ''}"
            continue
        wrong: float | str = error(out_TD[tokens_S], expected_SD)
        if name == OURS:
            mine = out_TD
            if not bool(torch.isfinite(out_TD).all()):
                wrong = "not all rows are finite"
        elif name == "vllm" and mine is not None and (share := agreement(mine, out_TD, 2 * _limit(one.weights))) < MOSTLY:
            wrong = f"only {share:.2%} of the rows agree with ours"
        yield name, wrong


def _limit(weights: ExpertWeights) -> float:
    return bound(weights.down_EDF.dtype)


def agreement(out_TD: Tensor, other_TD: Tensor, limit: float) -> float:
    """The share of rows that differ by at most `limit` of their size."""
    a_TD, b_TD = out_TD.float(), other_TD.float()
    return float(((a_TD - b_TD).norm(dim=-1) <= limit * b_TD.norm(dim=-1)).float().mean())
