"""What `duomo bench kernels` does without a GPU: command line, floors, inputs, references, verdicts, tables, plots."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.gpu_stopwatch import Timing
from bench.kernels import bench_kernels, plot
from bench.kernels.bench_kernels import parse
from bench.kernels.layer_reference import choose, layer_reference, sample_tokens
from bench.kernels.peers_vllm import tile_candidates, tuned_config
from bench.kernels.shapes import SHAPES, LayerShape, make_fp8_weights, make_logits, make_rows, make_weights, seeded
from bench.kernels.targets import Case, case_from_json, geometric_mean, table, verdicts
from duomo_kernels._routing import GateRule
from duomo_kernels._weights import dequantised

CPU = torch.device("cpu")
SMALL = LayerShape(name="small", title="small", dim=192, hidden=136, num_experts=12, rule=GateRule(top_k=3, normalise=True))


@pytest.mark.parametrize(
    ("shape", "tokens", "distinct", "expected_us"),
    [
        ("olmoe", 1, 8, 33.6),
        ("olmoe", 4, 23, 96.5),
        ("olmoe", 256, 64, 269.1),
        ("olmoe", 16384, 64, 2087.7),
        ("qwen3", 8, 47, 147.9),
        ("qwen3", 1024, 128, 405.4),
        ("qwen3", 8192, 128, 782.9),
    ],
)
def test_floors_are_those_of_the_formula(shape: str, tokens: int, distinct: int, expected_us: float) -> None:
    """Worked by hand at 3.0 TB/s and 790 TFLOP/s."""
    assert SHAPES[shape].floor_us(tokens, distinct) == pytest.approx(expected_us, abs=0.06)


def test_fp8_floors_count_a_byte_a_weight_and_the_scales() -> None:
    shape = SHAPES["qwen3"]
    assert shape.num_bytes(1, 8, is_fp8=True) == pytest.approx(8 * 3 * 768 * 2048 * (1 + 4 / 128**2) + 2 * 2048 * 2)
    assert shape.floor_us(65536, 128, is_fp8=True) == pytest.approx(shape.floor_us(65536, 128) / 2)


@pytest.mark.parametrize(("skew", "at_least", "at_most"), [("uniform", 60, 64), ("zipf", 35, 62)])
def test_skew_narrows_the_choice(skew: str, at_least: int, at_most: int) -> None:
    shape = SHAPES["olmoe"]
    choice = choose(make_logits(shape, 33, "zipf" if skew == "zipf" else "uniform", seeded(0, CPU)), shape.rule)
    counts = torch.bincount(choice.ids_TK.flatten(), minlength=64)
    assert at_least <= choice.num_distinct <= at_most
    assert shape.expected_distinct(33) == pytest.approx(64 * (1 - (1 - 1 / 8) ** 33))
    assert (int(counts.max()) > 20) is (skew == "zipf")


@pytest.mark.parametrize("name", ["olmoe", "qwen3", "deepseek-v3"])
def test_choices_follow_the_rule(name: str) -> None:
    shape = SHAPES[name]
    choice = choose(make_logits(shape, 17, "uniform", seeded(1, CPU)), shape.rule)
    assert all(len(set(row)) == shape.top_k for row in choice.ids_TK.tolist())
    total = float(choice.weights_TK.sum(-1)[3])
    assert total == pytest.approx(shape.rule.routed_scale) if shape.rule.normalise else total < 1
    if shape.rule.num_groups > 1:
        groups = choice.ids_TK // (shape.num_experts // shape.rule.num_groups)
        assert all(len(set(row)) <= shape.rule.top_groups for row in groups.tolist())


@pytest.mark.parametrize("is_fp8", [False, True])
def test_the_reference_is_the_formula_on_sampled_tokens(is_fp8: bool) -> None:
    generator = seeded(3, CPU)
    weights = make_fp8_weights(SMALL, generator) if is_fp8 else make_weights(SMALL, generator)
    x_TD = make_rows(SMALL, 257, generator)
    choice = choose(make_logits(SMALL, 257, "zipf", generator), SMALL.rule)
    tokens_S = sample_tokens(choice, SMALL.num_experts)
    assert set(choice.ids_TK[tokens_S].flatten().tolist()) == set(choice.ids_TK.flatten().tolist())
    assert 64 <= len(tokens_S) <= 64 + SMALL.num_experts
    gate_up_EFD, down_EDF = dequantised(weights)
    for row, token in enumerate(tokens_S[:5].tolist()):
        expected_D = torch.zeros(SMALL.dim, dtype=torch.float64)
        for expert, weight in zip(choice.ids_TK[token].tolist(), choice.weights_TK[token], strict=True):
            gate, up = (gate_up_EFD[expert] @ x_TD[token].double()).chunk(2)
            expected_D += weight * (down_EDF[expert] @ (gate * torch.sigmoid(gate) * up))
        torch.testing.assert_close(layer_reference(x_TD, choice, weights, tokens_S)[row], expected_D)


def test_few_tokens_are_all_sampled() -> None:
    choice = choose(make_logits(SMALL, 5, "uniform", seeded(0, CPU)), SMALL.rule)
    assert sample_tokens(choice, SMALL.num_experts).tolist() == [0, 1, 2, 3, 4]


def timing(us: float) -> Timing:
    return Timing(median_us=us, best_us=us, p90_us=us, repeats=50, calls=4)


def layer(tokens: int, ours_us: float, *, shape: str = "olmoe", floor_us: float = 90.0, **peers_us: float) -> Case:
    times = {name: timing(us) for name, us in peers_us.items()} | {"ours": timing(ours_us)}
    return Case(section="layer", shape=shape, tokens=tokens, floor_us=floor_us, times=times, error=1e-3, distinct=60.5, notes=("said",))


def words(*cases: Case) -> dict[str, str]:
    return {verdict.target.strip(): verdict.word for verdict in verdicts(cases)}


def test_the_faster_vllm_counts() -> None:
    assert words(layer(1, 10, vllm=13))["MoE layer, T = 1, against vLLM"] == "PASS"
    assert words(layer(1, 10, vllm=13, vllm_tuned=12))["MoE layer, T = 1, against vLLM"] == "MISS"
    assert words(layer(1, 10, vllm_tuned=13, vllm=12.4))["MoE layer, T = 1, against vLLM"] == "MISS"


def test_one_bad_case_misses_where_each_has_to_pass() -> None:
    good, slow = layer(16, 95, vllm=100), layer(64, 101, vllm=100)
    target = "MoE layer, T = 16..256, never slower than vLLM"
    assert words(good)[target] == "PASS" and words(good, slow)[target] == "MISS"
    assert words(good)["MoE layer, T = 16..256, share of the floor"] == "PASS"
    assert words(replace(good, floor_us=87.0))["MoE layer, T = 16..256, share of the floor"] == "MISS"
    (line,) = [v.line() for v in verdicts([good, slow]) if v.target == target]
    assert "T=64" in line and "0.990" in line


def test_large_sizes_count_by_their_geometric_mean() -> None:
    cases = [layer(1024, 100, vllm=110), layer(2048, 100, vllm=180, shape="qwen3")]
    found = words(*cases)
    assert found["MoE layer, T = 1,024..16,384, against vLLM"] == "PASS"
    assert (found["the same, olmoe alone"], found["the same, qwen3 alone"]) == ("MISS", "PASS")
    assert geometric_mean([1.1, 1.8]) == pytest.approx((1.1 * 1.8) ** 0.5) and geometric_mean([]) is None


def test_what_was_not_measured_is_not_passed() -> None:
    assert set(words().values()) == {"----"}
    red = Case(section="layer", shape="olmoe", tokens=1, red="error inf")
    assert words(red, layer(2, 10))["MoE layer, T = 1, against vLLM"] == "----"
    assert "RED: error inf" in "\n".join(table([red]))


def test_a_verdict_over_fewer_cases_than_asked_says_so() -> None:
    good, late = layer(16, 90, vllm=100), Case(section="layer", shape="qwen3", tokens=64)
    lines = {verdict.target: verdict.line() for verdict in verdicts([good, late, replace(late, tokens=256, red="error inf")])}
    line = lines["MoE layer, T = 16..256, never slower than vLLM"]
    assert line.startswith("PASS") and "worst of 1 (2 left out): layer olmoe T=16" in line
    lines = {verdict.target: verdict.line() for verdict in verdicts([layer(1024, 90, vllm=100), replace(late, tokens=2048)])}
    assert lines["MoE layer, T = 1,024..16,384, against vLLM"].endswith("geometric mean of 1 (1 left out)")
    (line,) = [verdict.line() for verdict in verdicts([late]) if verdict.target == "MoE layer, T = 16..256, never slower than vLLM"]
    assert line.startswith("----") and line.endswith("(1 left out)")
    assert not any("left out" in verdict.line() for verdict in verdicts([good, layer(64, 90, vllm=100)]))


def test_other_sections_have_their_own_peers() -> None:
    gate = replace(layer(64, 5, vllm=11), section="gate")
    attention = replace(layer(32, 50, flash_attention_3=49), section="attention")
    fp8 = replace(layer(16, 50, ours_bf16=81, vllm=60), section="fp8")
    found = words(gate, attention, fp8)
    assert found["gate and sort, T <= 1,024, against topk_softmax + moe_align"] == "PASS"
    assert found["decode attention, within FlashAttention 3's time"] == "MISS"
    assert found["fp8 layer, T = 16..64, against our bf16"] == "PASS" and found["fp8 layer, never slower than vLLM's fp8"] == "PASS"


def test_a_case_survives_its_result_file() -> None:
    case = layer(8, 100.0, vllm=110.0)
    row = json.loads(json.dumps(case.as_json()))
    assert row["floor_share"] == 0.9 and case_from_json(row) == case
    (head, line) = table([case])
    assert "90%" in line and "vllm 110.0 (1.10x)" in line and "said" in line and "60.5" in line and "floor" in head


def test_the_command_line() -> None:
    asked = parse(["--only", "layer,gate", "--shapes", "qwen3", "--tokens", "1,8", "--skews", "uniform", "--budget-s", "5"])
    assert asked.only == ("layer", "gate") and [shape.name for shape in asked.shapes] == ["qwen3"]
    assert asked.tokens == {1, 8} and asked.skews == ("uniform",) and asked.budget_s == 5
    every = parse([])
    assert set(every.only) == set(bench_kernels.SECTIONS) - {"component"} and len(every.shapes) == len(SHAPES) and not every.tokens


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--only", "layers"], "--only"),
        (["--shapes", "gpt"], "olmoe"),
        (["--tokens", "1,x"], "--tokens"),
        (["--repeats", "0"], "--repeats"),
    ],
)
def test_a_wrong_option_is_named(arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == 2 and word in capsys.readouterr().err


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["bench_kernels"])
    with pytest.raises(SystemExit) as ended:
        bench_kernels.main()
    assert ended.value.code == 2 and "needs an NVIDIA GPU" in capsys.readouterr().err


def test_vllm_is_searched_within_bounds() -> None:
    for tokens in (1, 64, 512, 4096):
        for is_fp8 in (False, True):
            found = tile_candidates(tokens, is_fp8)
            assert 4 <= len(found) <= 32 and len({tuple(config.items()) for config in found}) == len(found)
    assert tuned_config("no such shape", False, 8) is None


def sample_result(folder: Path) -> Path:
    cases = [layer(t, 50.0 + t, vllm=70.0 + t, floor_us=40.0 + 0.8 * t) for t in (1, 8, 64, 1024)]
    cases += [replace(case, section="gate", shape="qwen3") for case in cases[:2]] + [replace(cases[0], skew="zipf")]
    path = folder / "kernels.json"
    path.write_text(json.dumps({"device": "some GPU", "cases": [case.as_json() for case in cases]}))
    return path


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib comes with the extra `bench`")
def test_plots_are_drawn_from_a_result_file(tmp_path: Path) -> None:
    written = plot.draw(sample_result(tmp_path))
    assert [path.name for path in written] == [
        "kernels_layer_olmoe.png",
        "kernels_layer_olmoe.svg",
        "kernels_gate_qwen3.png",
        "kernels_gate_qwen3.svg",
    ]
    assert written[0].read_bytes().startswith(b"\x89PNG") and "<svg" in written[1].read_text()
    assert "Duomo" in written[1].read_text() or written[1].stat().st_size > 5000


def test_without_matplotlib_the_plot_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    monkeypatch.setattr("sys.argv", ["plot.py", str(sample_result(tmp_path))])
    assert plot.main() == 2 and "duomo[bench]" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["plot.py", str(tmp_path / "absent.json")])
    assert plot.main() == 2 and "usage" in capsys.readouterr().err
