"""What `duomo bench prefill` does without a GPU and without vLLM: cases, ways, floors, verdicts, one report of all its children."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.engine import bench_prefill
from bench.engine.arrivals_cases import SCALES, Answer, Kind, Load, LoadResult, WaveSeen, load_result, loads_of
from bench.engine.bench_prefill import parse, report
from bench.engine.engine_campaign import configs, read_parts
from bench.engine.engine_cases import CHUNK_TOKENS, VLLM_MODES, CaseResult, EngineCase, Job, Mode, Part, Way, embedding_factor, prompts
from bench.engine.engine_floor import expert_bytes
from bench.engine.engine_job import module_of
from bench.engine.engine_rows import join
from bench.engine.engine_vllm import capture_sizes
from bench.engine.prefill_cases import LONG_TOKENS, PREFILL_CASES, WAYS
from bench.engine.prefill_plot import draw
from bench.engine.prefill_targets import prefill_verdicts, prompts_table, ways_rows, ways_table
from bench.gpu_stopwatch import Timing
from duomo.engine.wave_buckets import WAVE_BUCKETS

CONFIGS = configs()
GB = 1e9


def prompt(tokens: int, batch: int = 1, way: Way = "whole") -> EngineCase:
    return EngineCase(phase="prefill", batch=batch, tokens=tokens, way=way)


def found(case: EngineCase, ms: float | None, distinct: float | None, read: float | None = None) -> CaseResult:
    timing = None if ms is None else Timing(median_us=1e3 * ms, best_us=1e3 * ms, p90_us=1e3 * ms, repeats=9, calls=1)
    return CaseResult(case=case, timing=timing, distinct=distinct, expert_bytes=None if read is None else int(read))


def part(mode: Mode, *results: CaseResult, model: str = "olmoe") -> Part:
    job = Job(mode=mode, model=model, dtype="bf16", cases=tuple(one.case for one in results), repeats=9, budget_s=60)
    return Part(job=job, facts={"device": "NVIDIA H100 80GB HBM3", "commit": "abc", "date": "now"}, results=list(results))


def words(*parts: Part) -> dict[str, str]:
    rows = [row for row in join(parts, CONFIGS) if row.case.way == "whole"]
    return {verdict.target.strip(): verdict.word for verdict in prefill_verdicts(rows, ways_rows(parts, CONFIGS), parts)}


def test_cases_are_those_of_the_issue() -> None:
    single = {case.tokens for case in PREFILL_CASES if case.batch == 1 and case.way == "whole"}
    assert single == {16, 32, 64, 128, 256, 512, 640, 1024, 1280, 1536, 2048, 4096, 8192}
    waves = {(case.batch, case.tokens) for case in PREFILL_CASES if case.batch > 1}
    assert waves == {(16, 1024), (8, 2048), (2, 8192)} and all(batch * tokens == 16384 for batch, tokens in waves)
    ways = {(case.way, case.routing) for case in WAYS}
    assert ways == {(way, routing) for way in ("whole", "layered", "chunked") for routing in ("drawn", "spread")}
    assert len({case.name for case in PREFILL_CASES}) == len(PREFILL_CASES)


def test_all_ways_get_the_same_prompt() -> None:
    drawn = [prompts(replace(case, tokens=40), 500) for case in WAYS]
    assert all(one == drawn[0] for one in drawn) and len({case.name for case in WAYS}) == 6
    assert {case.wave_name for case in WAYS} == {"prefill 1 x 8192", "prefill 1 x 8192 spread"}


def test_spreading_is_undone_exactly() -> None:
    embed = torch.randn(1000, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16()
    there = embed * embedding_factor("drawn", "spread")
    assert torch.equal(there * embedding_factor("spread", "drawn"), embed) and there.std() > 1.0
    assert embedding_factor("spread", "spread") == 1.0


def test_chunks_of_the_baseline_replay_graphs() -> None:
    """An eager chunk would be slower than it need be."""
    assert CHUNK_TOKENS in WAVE_BUCKETS


def test_every_prompt_of_the_target_has_a_graph_of_its_size_in_the_extended_peer() -> None:
    sizes = capture_sizes()
    assert {case.tokens for case in PREFILL_CASES if case.batch == 1 and 16 <= case.tokens <= 4096} <= set(sizes)
    steps = [(after - before) / before for before, after in zip(sizes, sizes[1:], strict=False) if before >= 512]
    assert max(steps) <= 0.25, "any other length pads by a quarter at most"


def ways(layered_ms: float, chunked_ms: float, times_floor: float, model: str = "olmoe") -> Part:
    config = CONFIGS[model]
    floor = config.num_layers * 40.0 * expert_bytes(config, "bf16")
    one = (prompt(LONG_TOKENS, way="layered"), prompt(LONG_TOKENS, way="chunked"), prompt(LONG_TOKENS))
    return part(
        "ours",
        found(one[0], layered_ms, 40.0, times_floor * floor),
        found(one[1], chunked_ms, 40.0, 12 * floor),
        found(one[2], 40.0, 40.0, floor),
        model=model,
    )


@pytest.mark.parametrize(
    ("layered_ms", "times_floor", "bytes_word", "time_word"),
    [(40.0, 1.0, "PASS", "PASS"), (40.0, 1.06, "MISS", "PASS"), (41.0, 1.04, "PASS", "MISS")],
)
def test_layers_are_held_against_chunks(layered_ms: float, times_floor: float, bytes_word: str, time_word: str) -> None:
    verdict = words(ways(layered_ms, 100.0, times_floor))
    assert verdict["layered, prefill 1 x 8192, olmoe bf16: layers x D over bytes read"] == bytes_word
    assert verdict["layered, prefill 1 x 8192, olmoe bf16: against our chunks of 512"] == time_word


def test_ways_are_shown_beside_their_floor() -> None:
    (row,) = ways_rows([ways(40.0, 100.0, 1.0)], CONFIGS)
    assert row.floor_bytes == 16 * 40 * 3 * 2048 * 1024 * 2 and row.times_floor("chunked") == pytest.approx(12.0, rel=1e-6)
    lines = "\n".join(ways_table([row]))
    assert "2.50x" in lines and "12.000" in lines and f"{row.floor_bytes / GB:.2f}" in lines
    assert not ways_rows([part("ours", found(prompt(1024), 7.0, 29.0, 1e9))], CONFIGS), "one way is no comparison"


def test_prompts_and_waves_have_verdicts_of_both_settings() -> None:
    cases = [prompt(1024), prompt(256), prompt(1024, batch=16)]
    parts = [
        part("ours", *(found(case, ms, 64.0, 1e9) for case, ms in zip(cases, (7.0, 4.0, 70.0), strict=True))),
        part("vllm_count", *(found(case, None, 64.0) for case in cases)),
        part("vllm_in_process", *(found(case, ms, None) for case, ms in zip(cases, (28.0, 4.8, 96.0), strict=True))),
        part("vllm_extended", *(found(case, ms, None) for case, ms in zip(cases, (8.0, 4.2, 98.0), strict=True))),
    ]
    said = words(*parts)
    assert said["first token of 640..2,048 tokens, olmoe, vLLM as shipped"] == "PASS"
    assert said["the same, olmoe, vLLM with graphs to 4,096 tokens"] == "MISS"
    assert said["first token of 16..512 tokens, against vLLM"] == "MISS", "4.2 ms: its faster setting counts"
    assert said["a wave of 16k tokens, against vLLM"] == "PASS"
    assert said["first token of 640..2,048 tokens, qwen3, vLLM as shipped"] == "----"
    spread = [replace(one, results=[replace(found, case=replace(found.case, routing="spread")) for found in one.results]) for one in parts]
    for one in spread:
        one.job = replace(one.job, cases=tuple(found.case for found in one.results))
    assert words(*spread)["a wave of 16k tokens, against vLLM, spread"] == "PASS"
    assert words(*spread)["a wave of 16k tokens, against vLLM"] == "----"
    head, short, long = prompts_table(join(parts, CONFIGS))
    assert "vLLM as shipped" in head and "graphs to 4,096" in head and "256 tokens" in short and "1,024 tokens" in long
    assert "28.00 (4.00x)" in long and "8.00 (1.14x)" in long and long.endswith("yes")
    (_, alone) = prompts_table(join(parts[:1], CONFIGS))[1:]
    assert alone.count("not measured") == 2 and "were not counted" in alone


def played() -> Part:
    loads = [load for load in loads_of(SCALES["olmoe"]) if load.experiment == "beside"]

    def result(load: Load, ttft_s: float) -> LoadResult:
        answers = [Answer(kind="arrival", num_tokens=2048, due_s=0.0, sent_s=0.0, token_s=(ttft_s, ttft_s + 0.01))]
        return load_result(load, 0.005, answers, ())

    job = Job(mode="ours_arrivals", model="olmoe", dtype="bf16", cases=(), repeats=1, budget_s=60, loads=tuple(load.name for load in loads))
    made = Part(job=job, facts={"device": "NVIDIA H100 80GB HBM3"}, left_out=["ours_arrivals olmoe bf16 overtake: no time"])
    made.loads += [result(load, 0.05 if load.mode == "layered" else 0.1) for load in loads]
    overtake = loads_of(SCALES["olmoe"])[0]
    waves = [
        WaveSeen(wave=at, num_prompts=1, num_tokens=tokens, started_s=0.04 * at, ended_s=0.05, piece_s=(0.002,), piece_groups=(1,))
        for at, tokens in enumerate((8192, 256))
    ]
    kinds: tuple[Kind, ...] = ("arrival", "alone")
    answers = [Answer(kind=kind, num_tokens=256, due_s=0.0, sent_s=0.0, token_s=(0.005,)) for kind in kinds]
    made.loads.append(load_result(overtake, 0.005, answers, waves))
    return made


def test_one_report_holds_all_children(tmp_path: Path) -> None:
    count = part("vllm_count", found(prompt(1024), None, 29.0))
    ours = ways(40.0, 110.0, 1.0)
    for one in (ours, played(), part("vllm_in_process", found(prompt(1024), 28.0, None)), count):
        one.write(tmp_path / f"olmoe_bf16_{one.job.mode}.json")
    parts = read_parts(tmp_path)
    assert [one.job.mode for one in parts] == ["ours", "ours_arrivals", "vllm_in_process", "vllm_count"]
    out = report(parts, tmp_path / "prefill_h100.json")
    content = json.loads(out.read_text())
    assert content["bench"] == "prefill" and [row["case"] for row in content["ways"]] == [f"prefill 1 x {LONG_TOKENS}"]
    assert {(row["tokens"], row["batch"]) for row in content["cases"]} == {(8192, 1), (1024, 1)}
    assert len(content["arrivals"][0]["loads"]) == len(played().loads) and content["left_out"]
    text = "\n".join([*content["table"], *content["verdicts"]])
    assert "2.75x" in text and "PASS  beside decode, olmoe: mean TTFT against chunks, same ITL p95" in text
    if importlib.util.find_spec("matplotlib") is not None:
        names = [path.name for path in draw(out)]
        assert names == [f"prefill_h100_{kind}_olmoe_bf16.{suffix}" for kind in ("beside", "waves") for suffix in ("png", "svg")]


def test_the_command_line() -> None:
    every = parse([])
    assert [job.mode for job in every.jobs] == ["ours", "ours_arrivals", *VLLM_MODES] * 2 and {job.dtype for job in every.jobs} == {"bf16"}
    ours, arrivals, theirs = every.jobs[0], every.jobs[1], every.jobs[2]
    assert {case.way for case in ours.cases} == {"whole", "layered", "chunked"} and {case.way for case in theirs.cases} == {"whole"}
    assert not arrivals.cases and arrivals.loads == tuple(load.name for load in loads_of(SCALES["olmoe"]))
    assert module_of("ours_arrivals") == "bench.engine.arrivals_run" and module_of("vllm_count") == "bench.engine.engine_vllm"
    some = parse(["--models", "qwen3", "--cases", "1 x 1024,overtake"])
    assert {job.mode for job in some.jobs} == {"ours", "ours_arrivals", *VLLM_MODES}
    assert {case.name for job in some.jobs for case in job.cases} == {"prefill 1 x 1024", "prefill 1 x 1024 spread"}
    assert all(name.startswith("overtake") for job in some.jobs for name in job.loads)
    assert [job.mode for job in parse(["--models", "olmoe", "--cases", "chunked 1024"]).jobs] == ["ours_arrivals"]


def test_a_wrong_option_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, word in ((["--cases", "1 x 1025"], "prefill 1 x 1024"), (["--modes", "ours_deterministic"], "ours_arrivals")):
        with pytest.raises(SystemExit) as ended:
            parse(arguments)
        assert ended.value.code == 2 and word in capsys.readouterr().err


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["bench_prefill"])
    with pytest.raises(SystemExit) as ended:
        bench_prefill.main()
    assert ended.value.code == 2 and "duomo bench prefill: needs an NVIDIA GPU" in capsys.readouterr().err
