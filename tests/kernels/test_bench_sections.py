"""Every section of `duomo bench kernels` and the tuner on a small layer, the kernels in Triton's interpreter, the stopwatch left out.

What a GPU run would do but for the time: inputs, calls, checks against float64, cases, plans.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu_stopwatch import Timing
from bench.kernels import component_section, layer_section, op_sections, tile_search, tile_spaces, tune_ops
from bench.kernels.component_section import measure_components
from bench.kernels.layer_section import Run, measure_layers
from bench.kernels.op_sections import Contexts, measure_attention, measure_gate, measure_rest
from bench.kernels.shapes import LayerShape
from bench.kernels.targets import OURS
from bench.kernels.tune_ops import Tuner
from duomo_kernels import _tuning
from duomo_kernels._decode_pieces import DecodeConfig, DecodeShape
from duomo_kernels._routing import GateRule
from duomo_kernels._tuning import write_table
from duomo_kernels._weights import ExpertWeights
from duomo_kernels.moe_layer import plan_from

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="a GPU host runs the sections themselves; kernels are not interpreted there"
)

SMALL = LayerShape(
    name="small", title="small", dim=128, hidden=128, num_experts=4, rule=GateRule(top_k=2, normalise=True),
    num_q_heads=4, num_kv_heads=2, head_dim=64, tokens=(1, 5),
)  # fmt: skip
Sides = Mapping[str, Sequence[Callable[[], object]]]


def call_once(sides: Sides, *, repeats: int) -> dict[str, Timing]:
    """In place of the stopwatch: the last call of each side runs, and took as long as its name."""
    for calls in sides.values():
        calls[-1]()
    return {n: Timing(median_us=len(n), best_us=len(n), p90_us=len(n), repeats=repeats, calls=len(sides[n])) for n in sides}


def in_half(make: Callable[..., object]) -> Callable[..., object]:
    """The same in float16: the interpreter multiplies bf16 by its bit patterns."""

    def made(*arguments: object) -> object:
        out = make(*arguments)
        if isinstance(out, torch.Tensor):
            return out.half()
        assert isinstance(out, ExpertWeights)
        return ExpertWeights(gate_up_EFD=out.gate_up_EFD.half(), down_EDF=out.down_EDF.half())

    return made


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in (layer_section, tune_ops, component_section):
        monkeypatch.setattr(module, "make_weights", in_half(module.make_weights))
        monkeypatch.setattr(module, "make_rows", in_half(module.make_rows))
    for module in (layer_section, op_sections, tile_search, component_section):
        monkeypatch.setattr(module, "interleaved_us", call_once)
    for module in (layer_section, op_sections, component_section):
        monkeypatch.setattr(module, "compile_ahead", lambda calls: 0)
    monkeypatch.setattr(tune_ops, "compile_all", lambda variants: 0)
    monkeypatch.setattr(tune_ops, "NUM_SETS", 1)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    yield


@pytest.fixture
def run() -> Run:
    return Run(device=torch.device("cpu"), repeats=50, deadline_s=time.monotonic() + 1000, skews=("zipf",))


@pytest.mark.parametrize("is_fp8", [False, True])
def test_layers(run: Run, is_fp8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_section, "FP8_TOKENS", (3,))
    cases = measure_layers(run, SMALL, is_fp8)
    assert [case.tokens for case in cases] == ([3] if is_fp8 else [1, 5])
    for case in cases:
        assert not case.red and OURS in case.times and 0 < case.error < 0.1 and case.floor_us > 0
        assert 2 <= case.distinct <= 4 and ("ours_bf16" in case.times) is is_fp8


def test_a_wrong_layer_is_red(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    right = layer_section.ours
    monkeypatch.setattr(layer_section, "ours", lambda *arguments: right(*arguments) * 1.02)
    assert all("error" in case.red and not case.times for case in measure_layers(run, SMALL))

    def fails(*_: object) -> torch.Tensor:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(layer_section, "ours", fails)
    assert all(case.red == "RuntimeError: no kernel image" for case in measure_layers(run, SMALL))


def test_a_run_ends_at_its_deadline(run: Run) -> None:
    late = Run(device=run.device, repeats=50, deadline_s=time.monotonic() - 1, tokens=frozenset({1}))
    assert measure_layers(late, SMALL) == [] and late.left_out == ["layer small T=1", "layer small T=1 zipf"]
    assert measure_gate(late, SMALL) == [] and [case.name() for case in late.late] == [*late.left_out[:2], "gate small T=1"]


def test_gate(run: Run) -> None:
    cases = measure_gate(run, SMALL)
    assert [(case.tokens, case.red) for case in cases] == [(1, ""), (5, "")] and all(case.error < 1e-5 for case in cases)


@pytest.mark.parametrize(("field", "word"), [("offsets_E1", "offsets"), ("num_tiles", "tiles, not"), ("tiles_M5", "tiles differ")])
def test_a_gate_of_wrong_tiles_is_red(field: str, word: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    right = op_sections.gate

    def wrong(*arguments: Any, **named: Any) -> Any:
        routing = right(*arguments, **named)
        return replace(routing, **{field: getattr(routing, field) + 1})

    monkeypatch.setattr(op_sections, "gate", wrong)
    assert all(word in case.red and not case.times for case in measure_gate(run, SMALL))


def test_attention(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_sections, "BATCHES", (Contexts("33 + 1", (33, 1)),))
    made = op_sections._make_cache

    def make_half(*arguments: Any) -> Any:
        one = made(*arguments)
        return replace(one, q_SHD=one.q_SHD.half(), pool=one.pool.half())

    monkeypatch.setattr(op_sections, "_make_cache", make_half)
    (case,) = measure_attention(run, SMALL)
    assert not case.red and case.error < 0.01 and case.name() == "attention small T=2 33 + 1"


def test_components(run: Run) -> None:
    cases = measure_components(run, SMALL)
    assert [(case.tokens, case.detail) for case in cases] == [(5, "gate"), (5, "up"), (5, "down"), (5, "combine")]
    assert all(case.floor_us > 0 and OURS in case.times and not case.red for case in cases)


def test_the_rest_names_what_is_missing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_sections, "REST", ("no_such_op",))
    assert measure_rest(run) == [] and "no_such_op" in run.left_out[0]


@pytest.mark.parametrize("op", ["experts", "fp8"])
def test_the_tuner_finds_a_plan(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("up_tiles", "down_tiles", "up_tiles_fp8", "down_tiles_fp8", "direct_tiles"):
        space = getattr(tile_spaces, name)
        monkeypatch.setattr(tile_spaces, name, lambda size, space=space: space(size)[:1])
    if op == "fp8":  # the interpreter takes a minute for the direct path's fp8
        monkeypatch.setattr(tune_ops, "MAX_DIRECT_ROUTED", 0)
        plan = tune_ops.heuristic_plan
        monkeypatch.setattr(tune_ops, "heuristic_plan", lambda weights, top_k, t, **_: plan(weights, top_k, t, may_be_direct=False))
    shape = SMALL if op == "fp8" else replace(SMALL, dim=32, hidden=32, rule=GateRule(top_k=1))
    tuner = Tuner(device=torch.device("cpu"), ends_s=time.monotonic() + 1000)
    (entry,) = tuner.tune(shape, [op], [1])
    assert entry["op"] == "experts" and entry["num_tokens"] == 1 and entry["dtype"] == ("fp8" if op == "fp8" else "bf16")
    assert plan_from(entry["config"])  # type: ignore[arg-type]  # a table's entry holds anything
    assert list(Tuner(device=torch.device("cpu"), ends_s=0.0).tune(SMALL, [op], [3])) == []


def test_what_the_tuner_finds_for_attention_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, usual = op_sections._make_cache, DecodeConfig(block_keys=32, num_stages=1, num_warps=2, programs_per_sm=1, merge="kernel")

    def make_half(*arguments: Any) -> Any:
        one = made(*arguments)
        return replace(one, q_SHD=one.q_SHD.half(), pool=one.pool.half())

    monkeypatch.setattr(op_sections, "_make_cache", make_half)
    monkeypatch.setattr(tune_ops, "Contexts", lambda name, lengths: Contexts(name, (33,) * len(lengths)))
    monkeypatch.setattr(tile_spaces, "decode_configs", lambda _: [usual])
    (entry,) = Tuner(device=torch.device("cpu"), ends_s=time.monotonic() + 1000).tune(SMALL, ["attention"], [2])
    head = dict.fromkeys(("device", "torch", "triton", "driver", "commit", "date"), "")
    write_table(tmp_path / "some_gpu.json", head, [entry | {"config": asdict(usual)}])
    monkeypatch.setattr(_tuning, "FOLDER", tmp_path)
    monkeypatch.setattr(_tuning, "_device_name", lambda index: "some GPU")
    _tuning._table.cache_clear()
    shape = DecodeShape(num_sequences=2, num_heads=4, num_kv_heads=2, head_dim=64, block_tokens=16, max_blocks=3)
    try:
        assert shape.config(torch.device("cuda:0")) == usual
    finally:
        _tuning._table.cache_clear()
