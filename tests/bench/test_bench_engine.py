"""What `duomo bench engine` does without a GPU and without vLLM: parts, floors, checks, joining, verdicts, tables, plots, children."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.engine import bench_engine, engine_plot
from bench.engine.bench_engine import parse, report
from bench.engine.engine_campaign import gpu_name, read_parts
from bench.engine.engine_cases import (
    CASES,
    DECODE,
    DECODE_STEPS,
    MODELS,
    MODELS_FOLDER,
    VLLM_MODES,
    CaseResult,
    Dtype,
    EngineCase,
    FirstTokens,
    Job,
    Mode,
    Part,
    check_prompts,
    part_from_json,
    prompts,
    write_config,
)
from bench.engine.engine_check import FARTHEST, agreement, judge, slack_of
from bench.engine.engine_floor import floor_us, kv_bytes_per_token
from bench.engine.engine_job import start
from bench.engine.engine_rows import EngineRow, join, table
from bench.engine.engine_targets import verdicts
from bench.engine.engine_vllm import Arrival, capture_sizes, distinct_experts, distinct_of_wave, settings, step_times
from bench.gpu_stopwatch import Timing
from duomo.models.config import ModelConfig, load_config

CONFIGS = {model: load_config(MODELS_FOLDER / folder, needs_weights=False) for model, folder in MODELS.items()}


def decode(batch: int, tokens: int = 1024) -> EngineCase:
    return EngineCase(phase="decode", batch=batch, tokens=tokens)


def prompt(tokens: int, batch: int = 1) -> EngineCase:
    return EngineCase(phase="prefill", batch=batch, tokens=tokens)


def timing(ms: float) -> Timing:
    return Timing(median_us=1e3 * ms, best_us=1e3 * ms, p90_us=1e3 * ms, repeats=9, calls=1)


def part(mode: Mode, *found: tuple[EngineCase, float | None, float | None], model: str = "olmoe", dtype: Dtype = "bf16") -> Part:
    """found: (case, milliseconds, distinct experts)."""
    job = Job(mode=mode, model=model, dtype=dtype, cases=tuple(case for case, _, _ in found), repeats=9, budget_s=60)
    results = [
        CaseResult(case=case, timing=None if ms is None else timing(ms), distinct=distinct, context=float(case.tokens))
        for case, ms, distinct in found
        if ms is not None or distinct is not None
    ]
    return Part(job=job, facts={"device": "NVIDIA H100 80GB HBM3", "commit": "abc", "date": "now"}, results=results)


def words(*parts: Part) -> dict[str, str]:
    return {verdict.target.strip(): verdict.word for verdict in verdicts(join(parts, CONFIGS), parts)}


@pytest.mark.parametrize(("model", "billions", "kv_kib"), [("olmoe", 6.92, 128), ("qwen3", 30.5, 96)])
def test_the_models_are_those_published(model: str, billions: float, kv_kib: int) -> None:
    config = CONFIGS[model]
    assert config.total_params / 1e9 == pytest.approx(billions, rel=2e-3)
    assert kv_bytes_per_token(config) == kv_kib * 1024


def distinct(config: ModelConfig, tokens: int) -> float:
    return float(config.num_experts * (1 - (1 - config.top_k / config.num_experts) ** tokens))


@pytest.mark.parametrize(
    ("model", "case", "expected_ms"),
    [
        ("olmoe", decode(1), 0.83),
        ("olmoe", decode(8), 3.43),
        ("olmoe", decode(32), 5.92),
        ("olmoe", decode(128), 10.3),
        ("qwen3", decode(1), 2.06),
        ("qwen3", decode(32), 18.8),
        ("qwen3", decode(64), 22.0),
        ("olmoe", prompt(1024), 4.6),
        ("qwen3", prompt(1024), 20.0),
        ("qwen3", prompt(1024, 16), 121.0),
    ],
)
def test_floors_are_those_of_the_formula(model: str, case: EngineCase, expected_ms: float) -> None:
    """Worked by hand with the number of experts that a uniform router chooses."""
    config = CONFIGS[model]
    found = floor_us(config, "bf16", case, distinct(config, case.step_tokens), context=1024) / 1e3
    assert found == pytest.approx(expected_ms, rel=0.03)


@pytest.mark.parametrize(("batch", "experts_alone"), [(16, 1.66), (32, 1.56), (64, 1.41)])
def test_the_byte_bound_of_fp8(batch: int, experts_alone: float) -> None:
    """Attention's weights are fp8 too: a little more than where only the experts' are."""
    config = CONFIGS["olmoe"]
    wide = floor_us(config, "bf16", decode(batch), distinct(config, batch), 1024)
    narrow = floor_us(config, "fp8", decode(batch), distinct(config, batch), 1024)
    assert experts_alone < wide / narrow < experts_alone + 0.07


def test_floors_follow_bandwidth_and_experts() -> None:
    config = CONFIGS["olmoe"]
    base = floor_us(config, "bf16", decode(8), 38, 1024)
    assert floor_us(config, "bf16", decode(8), 38, 1024, bytes_per_s=1.5e12) == pytest.approx(2 * base)
    assert floor_us(config, "bf16", decode(8), 30, 1024) < base < floor_us(config, "bf16", decode(8), 38, 4096)


def test_both_sides_get_the_same_prompts() -> None:
    case = decode(3, 40)
    first = prompts(case, 500)
    assert first == prompts(case, 500) and first != prompts(case, 500, repeat=1) and first != prompts(decode(3, 41), 500)
    assert [len(ids) for ids in first] == [40] * 3 and all(3 <= token < 500 for ids in first for token in ids)
    assert len({tuple(ids) for ids in check_prompts(500)}) == 16


def test_a_part_survives_its_file(tmp_path: Path) -> None:
    one = part("ours", (decode(1), 1.0, 8.0), (decode(8), None, 38.0))
    one.first_tokens = FirstTokens(token_ids=(3, 4), is_clear=(True, False))
    one.notes.append("said")
    one.write(tmp_path / "folder" / "part.json")
    assert part_from_json(json.loads((tmp_path / "folder" / "part.json").read_text())) == one
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["part.json"]


def test_the_peer_in_fp8_is_told_so(tmp_path: Path) -> None:
    job = part("vllm_count", model="qwen3", dtype="fp8").job
    config = load_config(write_config(job, tmp_path / "theirs"), needs_weights=False)
    raw = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert config.quantisation is not None and config.quantisation.block == (128, 128)
    assert len(raw["quantization_config"]["modules_to_not_convert"]) == 49
    ours = load_config(write_config(replace(job, mode="ours"), tmp_path / "ours"), needs_weights=False)
    assert ours.quantisation is None and ours.max_position_tokens == 40960
    olmoe = load_config(write_config(part("ours").job, tmp_path / "olmoe"), needs_weights=False)
    assert olmoe.max_position_tokens == 16384


def arrivals(*steps: tuple[float, int]) -> list[Arrival]:
    return [Arrival(at_s=at_s, num_sequences=count, num_tokens=count) for at_s, count in steps]


def test_only_steps_of_the_whole_batch_are_timed() -> None:
    """Waves mixed with decode (1 s apart), then pure steps of 1 ms, then sequences that end one after the other."""
    waves = [(float(at), count) for at, count in enumerate((2, 3, 4), start=1)]
    pure = [(3.0 + 0.001 * at, 4) for at in range(1, 75)]
    ending = [(9.0, 3), (10.0, 1)]
    times_us, context = step_times(arrivals(*waves, *pure, *ending), batch=4, tokens=100)
    assert len(times_us) == DECODE_STEPS and times_us == pytest.approx([1000.0] * DECODE_STEPS)
    # the first step of the whole batch is no pure one, three more are left out
    assert context == pytest.approx(100 + 9 / 4 + 3 + (DECODE_STEPS - 1) / 2)
    assert step_times(arrivals(*waves, *pure[:20]), batch=4, tokens=100) == ([], 0.0)


def test_vllm_counts_experts() -> None:
    routed = np.zeros((2, 5, 3, 2), dtype=np.uint8)  # 2 sequences, 5 tokens, 3 layers, 2 experts each
    routed[0, :, :, 1], routed[1, :, :, 0], routed[1, :, :, 1] = 1, 1, 2
    routed[1, 4] = 7
    assert distinct_experts(list(routed), 0, 4) == 3 and distinct_experts(list(routed), 4, 5) == 3
    assert distinct_of_wave(list(routed), 4) == 3 and distinct_of_wave(list(routed), 5) == 4


def test_vllm_is_asked_for_what_each_mode_says(tmp_path: Path) -> None:
    shipped = settings("vllm_in_process", tmp_path)
    assert "compilation_config" not in shipped and settings("vllm_own_process", tmp_path) == shipped
    sizes = settings("vllm_extended", tmp_path)["compilation_config"]["cudagraph_capture_sizes"]
    assert sizes == capture_sizes() == sorted(set(sizes)) and {512, 640, 1024, 2048, 4096} <= set(sizes) and sizes[-1] == 4096
    assert settings("vllm_count", tmp_path)["enable_return_routed_experts"] and settings("vllm_count", tmp_path)["enforce_eager"]
    assert shipped["max_model_len"] >= max(case.last_tokens for case in CASES)


def test_greedy_tokens_are_judged_by_their_gap() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_XV = torch.randn(40, 3000, generator=generator)
    best_X, slack = logits_XV.argmax(-1), slack_of(16, "bf16")
    right = judge(logits_XV, best_X, slack)
    assert right.share == 1 and not right.why_red() and slack == pytest.approx(0.125) and slack < slack_of(48, "bf16") < slack_of(48, "fp8")
    noisy = judge(logits_XV, (logits_XV + 0.03 * torch.randn(40, 3000, generator=generator)).argmax(-1), slack)
    assert not noisy.why_red()
    other = judge(logits_XV, torch.roll(best_X, 1), slack)
    assert "tokens of captured steps" in other.why_red() and max(other.gaps) > FARTHEST
    one_wrong = best_X.clone()
    one_wrong[7] = logits_XV[7].argmin()
    assert judge(logits_XV, one_wrong, slack).why_red()
    logits_XV[3, 5] = torch.nan
    assert judge(logits_XV, best_X, slack).why_red() == "logits are not finite"


def test_clear_first_tokens_have_to_agree() -> None:
    ours = FirstTokens(token_ids=(1, 2, 3, 4), is_clear=(True, True, False, True))
    assert agreement(ours, FirstTokens(token_ids=(1, 9, 9, 4))) == (2, 4, 2, 3)


def test_the_faster_mode_of_the_peer_counts() -> None:
    ours, count = part("ours", (decode(32), 6.0, 63.0)), part("vllm_count", (decode(32), None, 63.5))
    target = "decode step, OLMoE 16..128, Qwen3 16..64, against vLLM"
    assert words(ours, count, part("vllm_in_process", (decode(32), 6.4, None)))[target] == "PASS"
    slower = part("vllm_in_process", (decode(32), 6.4, None))
    assert words(ours, count, slower, part("vllm_own_process", (decode(32), 6.1, None)))[target] == "MISS"


def test_a_ratio_counts_where_both_choose_as_many_experts() -> None:
    ours, peer = part("ours", (decode(1), 1.0, 8.0)), part("vllm_in_process", (decode(1), 2.0, None))
    target = "decode step, batch 1, against vLLM"
    assert words(ours, peer, part("vllm_count", (decode(1), None, 8.0)))[target] == "PASS"
    for others, said in (([], "were not counted"), ([part("vllm_count", (decode(1), None, 7.5))], "chose 7.5 experts")):
        rows = join([ours, peer, *others], CONFIGS)
        assert words(ours, peer, *others)[target] == "----" and said in "\n".join(table(rows))
        assert "vllm_in_process 2.00 (2.00x)" in "\n".join(table(rows))


def test_prompts_are_held_against_both_ways_of_the_peer() -> None:
    case = prompt(1024)
    parts = [
        part("ours", (case, 10.0, 64.0)),
        part("vllm_count", (case, None, 64.0)),
        part("vllm_in_process", (case, 31.0, None)),
        part("vllm_extended", (case, 12.0, None)),
    ]
    found = words(*parts)
    assert found["first token of 640..2,048 tokens, olmoe, vLLM as shipped"] == "PASS"
    assert found["the same, olmoe, vLLM with graphs to 4,096 tokens"] == "MISS"
    assert found["first token of 640..2,048 tokens, qwen3, vLLM as shipped"] == "----"
    assert found["first token of 16..512 tokens, against vLLM"] == "----"


def test_fp8_is_held_against_bf16_and_the_bytes() -> None:
    parts = [
        part("ours", (decode(32), 20.0, 110.0), model="qwen3"),
        part("ours", (decode(32), 13.0, 110.0), model="qwen3", dtype="fp8"),
        part("ours", (decode(16), 5.0, 56.0)),
        part("ours", (decode(16), 3.6, 56.0), dtype="fp8"),
    ]
    found = words(*parts)
    assert found["fp8 decode step, Qwen3 16..64, against our bf16"] == "PASS"
    assert found["fp8 decode step, OLMoE 16..64, share of its byte bound"] == "MISS"
    assert found["fp8 decode step, never slower than vLLM's fp8"] == "----"
    better = part("ours", (decode(16), 3.2, 56.0), dtype="fp8")
    assert words(*parts[:3], better)["fp8 decode step, OLMoE 16..64, share of its byte bound"] == "PASS"


def test_what_fixed_sums_cost_stands_below_their_case() -> None:
    parts = [part("ours", (decode(32), 6.0, 63.0)), part("ours_deterministic", (decode(32), 7.5, 63.0))]
    _, line, below = table(join(parts, CONFIGS))
    assert "ours_deterministic" not in line and "7.50  +25% of its time" in below
    peer = [part("vllm_in_process", (decode(32), 6.6, None)), part("vllm_count", (decode(32), None, 63.0))]
    assert words(*parts, *peer)["decode step, OLMoE 16..128, Qwen3 16..64, against vLLM"] == "PASS"


def test_what_is_missing_or_wrong_is_said() -> None:
    late, done = part("ours", (decode(16), None, None), (decode(32), 6.0, 63.0)), part("vllm_count", (decode(32), None, 63.0))
    rows = join([late, done], CONFIGS)
    (line,) = [verdict.line() for verdict in verdicts(rows, []) if "share of the measured-D floor" in verdict.target]
    assert "worst of 1 (1 left out)" in line and "ours has no time" in "\n".join(table(rows))
    red = part("ours", (decode(32), 6.0, 63.0))
    red.red = "logits are not finite"
    (row,) = join([red], CONFIGS)
    assert "RED: logits are not finite" in table([row])[1] and not row.shown.times


def sample_parts() -> list[Part]:
    cases = [decode(1), decode(8), decode(64), prompt(128), prompt(1024)]
    experts = [8.0, 38.0, 64.0, 64.0, 64.0]
    ours = part("ours", *((case, 2.0 + at, found) for at, (case, found) in enumerate(zip(cases, experts, strict=True))))
    ours.facts |= {"ceilings": {"read_tb_per_s": 3.2}, "driver": "1", "torch": "2", "triton": "3"}
    ours.first_tokens = FirstTokens(token_ids=(1, 2), is_clear=(True, True))
    peer = part("vllm_in_process", *((case, 3.0 + at, None) for at, case in enumerate(cases)))
    peer.facts["vllm"] = "0.24.0"
    peer.first_tokens = FirstTokens(token_ids=(1, 2))
    peer.left_out.append("vllm_in_process olmoe bf16 decode 256 x 1024: no time")
    return [ours, peer, part("vllm_count", *((case, None, found) for case, found in zip(cases, experts, strict=True)))]


def test_parts_become_one_result(tmp_path: Path) -> None:
    for one in sample_parts():
        one.write(tmp_path / f"olmoe_bf16_{one.job.mode}.json")
    parts = read_parts(tmp_path)
    assert [one.job.mode for one in parts] == ["ours", "vllm_in_process", "vllm_count"]
    content = json.loads(report(parts, tmp_path / "engine_h100.json").read_text())
    assert (content["device"], content["vllm"], content["commit"]) == ("NVIDIA H100 80GB HBM3", "0.24.0", "abc")
    assert content["left_out"] and not content["red"] and content["first_tokens"] == {"olmoe bf16": [2, 2, 2, 2]}
    (first, *_) = content["cases"]
    assert (first["batch"], first["context_tokens"], first["is_same_work"], first["distinct_vllm"]) == (1, 1024, True, 8.0)
    assert first["floor_here_us"] == pytest.approx(first["floor_us"] * 3.0 / 3.2, rel=1e-3)
    assert any(line.startswith("PASS  first tokens as vLLM's, olmoe bf16") for line in content["verdicts"])
    wrong = sample_parts()
    wrong[0].red = "wrong"
    path = report(wrong, tmp_path / "engine_h100.json")
    assert path.name == "engine_h100.red.json" and json.loads(path.read_text())["red"] == ["ours olmoe bf16: wrong"]


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib comes with the extra `bench`")
def test_plots_are_drawn_from_a_result_file(tmp_path: Path) -> None:
    written = engine_plot.draw(report(sample_parts(), tmp_path / "engine.json"))
    assert [path.name for path in written] == [
        "engine_decode_olmoe_bf16.png",
        "engine_decode_olmoe_bf16.svg",
        "engine_prefill_olmoe_bf16.png",
        "engine_prefill_olmoe_bf16.svg",
    ]
    assert written[0].read_bytes().startswith(b"\x89PNG") and "<svg" in written[1].read_text()


def test_without_matplotlib_the_plot_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    monkeypatch.setattr("sys.argv", ["engine_plot.py", str(report(sample_parts(), tmp_path / "engine.json"))])
    assert engine_plot.main() == 2 and "duomo[bench]" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["engine_plot.py", str(tmp_path / "absent.json")])
    assert engine_plot.main() == 2 and "usage" in capsys.readouterr().err


def test_the_command_line() -> None:
    every = parse([])
    assert [job.name for job in every.jobs[:3]] == ["ours olmoe bf16", "ours_deterministic olmoe bf16", "vllm_in_process olmoe bf16"]
    assert len(every.jobs) == 2 * 2 * (2 + len(VLLM_MODES)) and {case.phase for case in every.jobs[1].cases} == {"decode"}
    assert every.jobs[-1].name == "vllm_extended qwen3 fp8" and {case.phase for case in every.jobs[-1].cases} == {"prefill"}
    asked = parse(
        ["--models", "qwen3", "--dtypes", "bf16", "--side", "vllm", "--cases", "decode 32 x, prefill 1 x 1024,", "--repeats", "3"]
    )
    assert [job.mode for job in asked.jobs] == list(VLLM_MODES) and {job.repeats for job in asked.jobs} == {3}
    assert {case.name for case in asked.jobs[0].cases} == {"decode 32 x 1024", "decode 32 x 4096", "prefill 1 x 1024"}
    assert [job.mode for job in parse(["--modes", "ours,vllm_count", "--cases", "decode"]).jobs[:2]] == ["ours", "vllm_count"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--models", "gpt"], "olmoe"),
        (["--dtypes", "int4"], "--dtypes"),
        (["--modes", "vllm"], "vllm_count"),
        (["--cases", "decode 3 x"], "decode 1 x 1024"),
        (["--repeats", "0"], "--repeats"),
    ],
)
def test_a_wrong_option_is_named(arguments: Sequence[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == 2 and word in capsys.readouterr().err


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["bench_engine"])
    with pytest.raises(SystemExit) as ended:
        bench_engine.main()
    assert ended.value.code == 2 and "needs an NVIDIA GPU" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["bench_engine", "--merge", "--parts", str(tmp_path)])
    assert bench_engine.main() == 2 and "nothing was measured there" in capsys.readouterr().err


def test_merging_needs_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for one in sample_parts():
        one.write(tmp_path / f"olmoe_bf16_{one.job.mode}.json")
    arguments = ["bench_engine", "--merge", "--parts", str(tmp_path), "--out", str(tmp_path / "result.json"), "--no-plots"]
    monkeypatch.setattr("sys.argv", arguments)
    assert bench_engine.main() == 0
    said = capsys.readouterr().out
    assert "decode 8 x 1024 olmoe bf16" in said and "PASS" in said and "vllm 0.24.0" in said and "left out: vllm_in_process" in said


def test_the_gpu_names_the_file() -> None:
    assert gpu_name("NVIDIA H100 80GB HBM3") == "h100" and gpu_name("NVIDIA H200") == "h200" and gpu_name("Some Card") == "some_card"


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="only where there is no vLLM")
def test_a_child_that_fails_leaves_its_part_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = start(Job(mode="vllm_count", model="olmoe", dtype="bf16", cases=DECODE[:1], repeats=1, budget_s=110), tmp_path / "part.json")
    assert found is not None and not found.results and "the child ended with 1" in found.notes[0]
    assert "No module named 'vllm'" in capsys.readouterr().err


def rows_of(*parts: Part) -> list[EngineRow]:
    return join(parts, CONFIGS)


def test_a_later_part_of_a_job_counts() -> None:
    (row,) = rows_of(part("ours", (decode(1), 9.0, 8.0)), part("ours", (decode(1), 1.0, 8.0)))
    assert row.shown.ours_us == 1000.0
