"""Loads of `duomo bench prefill`: drawn alike for all modes, played to the real services by a process of its own, read and judged."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from bench.engine.arrivals_cases import (
    CHUNK_ROWS,
    SCALES,
    Answer,
    Arrival,
    Kind,
    Load,
    LoadResult,
    PrefillMode,
    WaveSeen,
    arrivals_of,
    load_result,
    load_result_from_json,
    loads_of,
    spread_of,
)
from bench.engine.arrivals_client import ClientPlan, answers_from_json, plan_from_json
from bench.engine.arrivals_run import gpu_config, play_all, stage
from bench.engine.arrivals_targets import arrival_verdicts, arrivals_table, rate_rows
from bench.engine.engine_cases import Job, Part, part_from_json
from duomo.config import DuomoConfig, changed, load_config
from duomo.engine.device import look_at_host
from duomo.engine.settle import settle
from duomo.wire.values import PeerAddress
from tests.engine.scripted_driver import H100, ScriptedDriver

TINY_MOE = Path(__file__).resolve().parents[2] / "models" / "tiny-moe"
OVERTAKE = Load(
    experiment="overtake", mode="layered", size=0.05, rate_per_s=6.0, load_s=1.0, lengths=(16,), new_tokens=(1, 1), long_tokens=320,
    backlog=2,
)  # fmt: skip
BESIDE = Load(experiment="beside", mode="chunked", size=64.0, rate_per_s=4.0, load_s=1.0, lengths=(48, 160), new_tokens=(6, 9))


def test_all_modes_get_the_same_prompts_at_the_same_times() -> None:
    for scale in SCALES.values():
        loads = loads_of(scale)
        assert len({load.name for load in loads}) == len(loads)
        by_trace: dict[str, set[tuple[Arrival, ...]]] = {}
        for load in loads:
            by_trace.setdefault(load.trace_name, set()).add(arrivals_of(load))
        assert len(by_trace) == 1 + len(scale.rates_per_s) and all(len(drawn) == 1 for drawn in by_trace.values())
        modes = {(load.mode, load.size) for load in loads if load.experiment == "beside" and load.rate_per_s == scale.rates_per_s[0]}
        assert {("chunked", CHUNK_ROWS), ("layered", 0.9), ("layered", 0.45), ("whole", 0.0)} <= modes
        assert loads[0].experiment == "overtake" and loads[0].mode == "layered"


def test_arrivals_are_poisson_and_of_every_length() -> None:
    drawn = arrivals_of(replace(BESIDE, rate_per_s=50.0, load_s=40.0))
    assert len(drawn) == pytest.approx(2000, rel=0.1) and drawn == tuple(sorted(drawn, key=lambda one: one.at_s))
    gaps = [after.at_s - before.at_s for before, after in zip(drawn, drawn[1:], strict=False)]
    mean = sum(gaps) / len(gaps)
    assert sum(gap > mean for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.04), "exponential gaps"
    assert abs(sum(one.num_tokens == 48 for one in drawn) - sum(one.num_tokens == 160 for one in drawn)) <= 1
    assert {one.new_tokens for one in drawn} == {6, 7, 8, 9}
    assert len(arrivals_of(replace(BESIDE, rate_per_s=0.001))) == 1, "a load without a prompt shows nothing"


def test_a_mode_becomes_options() -> None:
    uncached = {"prefill.prefix_cache_blocks": 0, "decode.prefix_cache_blocks": 0}
    assert OVERTAKE.options(0.02) == uncached | {"prefill.mode": "layered", "prefill.piece_target_s": pytest.approx(0.001)}
    assert BESIDE.options(0.02) == uncached | {"prefill.mode": "chunked", "prefill.chunk_tokens": 64}
    assert replace(BESIDE, mode="whole").options(0.02) == uncached | {"prefill.mode": "whole"}


def test_a_plan_survives_its_file() -> None:
    peer = PeerAddress(replica_id="p", boot_id="b", address="unix:/x")
    plan = ClientPlan(
        prefill=peer, decode=peer, fingerprint="f", secret="s", vocab=9, trace_name="t", warm=(Arrival(0.0, 1, 2),), alone=(),
        arrivals=(Arrival(0.5, 3, 4), Arrival(0.6, 5, 6)), load_s=1.0, limit_s=2.0, is_traced=True, backlog_tokens=7, num_backlog=2,
    )  # fmt: skip
    assert plan_from_json(json.loads(json.dumps(plan.as_json()))) == plan


def answer(kind: Kind, due_s: float, *token_s: float, num_tokens: int = 16, failure: str = "") -> Answer:
    return Answer(kind=kind, num_tokens=num_tokens, due_s=due_s, sent_s=due_s + 0.001, token_s=token_s, failure=failure)


def test_answers_become_times() -> None:
    answers = [
        answer("alone", 0.0, 0.002),
        answer("arrival", 1.0, 1.010, 1.020, 1.050),
        answer("arrival", 1.5, 1.530, 1.540),
        answer("arrival", 1.6, failure="no_grant"),
        answer("backlog", 0.0, 2.0, num_tokens=320),
    ]
    waves = [
        WaveSeen(wave=1, num_prompts=1, num_tokens=320, started_s=0.0, ended_s=0.3, piece_s=(0.1, 0.2), piece_groups=(1, 4)),
        WaveSeen(wave=2, num_prompts=1, num_tokens=16, started_s=0.1, ended_s=0.11, piece_s=(0.01,), piece_groups=(8,)),
        WaveSeen(wave=3, num_prompts=3, num_tokens=656, started_s=0.3, ended_s=0.4, piece_s=(0.1,), piece_groups=(2,)),
    ]
    found = load_result(OVERTAKE, 0.02, answers, waves)
    assert found.ttft is not None and found.itl is not None and found.alone is not None and found.pieces is not None
    assert found.ttft.count == 2 and [found.ttft.mean_s, found.ttft.max_s] == pytest.approx([0.02, 0.03])
    assert found.itl.count == 3 and found.itl.max_s == pytest.approx(0.03) and found.alone.p50_s == 0.002
    assert (found.pieces.count, found.pieces.max_s) == (3, 0.2) and (found.num_short_waves, found.num_long_waves) == (1, 2)
    assert found.groups is not None and (found.groups.p50_s, found.groups.max_s) == (0.05, 0.1) and found.num_mixed_waves == 1
    assert found.piece_target_s == pytest.approx(0.001)
    assert (found.prompt_tokens_per_s, found.new_tokens_per_s) == (176.0, 3.0) and found.failures == ("no_grant",)
    assert load_result_from_json(json.loads(json.dumps(asdict(found)))) == found
    assert answers_from_json(json.loads(json.dumps([asdict(one) for one in answers]))) == answers


def test_percentiles_are_measured_values() -> None:
    found = spread_of([float(value) for value in range(1, 101)])
    assert found is not None and (found.p50_s, found.p95_s, found.p99_s, found.max_s, found.mean_s) == (51, 96, 100, 100, 50.5)
    assert spread_of([]) is None


def point(mode: PrefillMode, size: float, ttft_s: float, itl_s: float, *, rate: float = 4.0, failure: str = "") -> LoadResult:
    answers = [answer("arrival", 0.0, ttft_s, ttft_s + itl_s), answer("arrival", 0.0, ttft_s, ttft_s + itl_s, failure=failure)]
    return load_result(replace(BESIDE, mode=mode, size=size, rate_per_s=rate), 0.02, answers, ())


def played(*loads: LoadResult) -> Part:
    job = Job(mode="ours_arrivals", model="olmoe", dtype="bf16", cases=(), repeats=1, budget_s=60, loads=())
    return Part(job=job, facts={"device": "NVIDIA H100 80GB HBM3"}, loads=list(loads))


def test_modes_are_compared_at_the_same_smoothness() -> None:
    """The fastest layered point is less smooth than chunks: the next one counts."""
    chunks = point("chunked", CHUNK_ROWS, 0.100, 0.010)
    part = played(chunks, point("layered", 1.8, 0.030, 0.020), point("layered", 0.9, 0.050, 0.010), point("layered", 0.45, 0.070, 0.006))
    (row,) = rate_rows([part])
    assert row.layered is not None and row.layered.load.size == 0.9 and row.times_faster == pytest.approx(2.0)
    (verdict,) = arrival_verdicts([part])
    assert verdict.word == "PASS" and "50.00 ms with layered x0.9, 100.00 ms with chunks of 512" in verdict.where
    slower = played(chunks, point("layered", 0.9, 0.101, 0.010))
    tied = played(chunks, point("layered", 0.9, 0.050, 0.0101))
    assert arrival_verdicts([tied])[0].word == "PASS"
    rough = played(chunks, point("layered", 0.9, 0.001, 0.0103))
    for other, said in ((slower, "0.990"), (rough, "0.000")):
        (verdict,) = arrival_verdicts([other])
        assert verdict.word == "MISS" and said in verdict.line()
    two = played(chunks, point("layered", 0.9, 0.05, 0.01), *(replace(one, load=replace(one.load, rate_per_s=8.0)) for one in slower.loads))
    (verdict,) = arrival_verdicts([two])
    assert verdict.word == "MISS" and "worst of 2: olmoe, 8/s" in verdict.where
    assert any("8/s" in line for line in arrivals_table([two]))


def test_a_point_with_a_failed_request_counts_for_nothing() -> None:
    failed = played(point("chunked", CHUNK_ROWS, 0.1, 0.01), point("layered", 0.9, 0.05, 0.01, failure="no_grant"))
    assert not rate_rows([failed]) and not arrival_verdicts([failed])
    assert "1 FAILED: no_grant" in "\n".join(arrivals_table([failed]))


@pytest.mark.parametrize(("ttft_s", "word"), [(0.0119, "PASS"), (0.0125, "MISS")])
def test_a_short_prompt_waits_for_one_piece_and_itself(ttft_s: float, word: str) -> None:
    waves = [WaveSeen(wave=1, num_prompts=1, num_tokens=320, started_s=0.0, ended_s=0.3, piece_s=(0.01, 0.04), piece_groups=(1, 4))]
    answers = [answer("alone", 0.0, 0.002), answer("arrival", 1.0, 1.0 + ttft_s)]
    (verdict,) = arrival_verdicts([played(load_result(OVERTAKE, 0.02, answers, waves))])
    assert verdict.word == word and "0 short and 1 long waves" in verdict.where


@pytest.mark.parametrize("model", sorted(SCALES))
def test_the_engine_of_a_job_fits_its_card_and_its_loads(model: str, tmp_path: Path) -> None:
    scale = SCALES[model]
    job = Job(mode="ours_arrivals", model=model, dtype="bf16", cases=(), repeats=1, budget_s=60)
    config = gpu_config(job, tmp_path, lambda: look_at_host(ScriptedDriver([H100]).open, lambda cuda: ""))
    assert (config.model.device, config.layout, config.model.block_tokens, config.model.random_weights) == ("cuda", "colocated", 64, True)
    assert config.prefill.max_wave_tokens == scale.long_tokens and config.model.max_model_tokens is not None
    assert config.model.max_model_tokens > scale.long_tokens + scale.new_tokens[1]
    longest = max((*scale.lengths, scale.long_tokens)) + scale.new_tokens[1]
    settled = settle(config, lambda: look_at_host(ScriptedDriver([H100]).open, lambda cuda: ""))
    assert settled.plan is not None and settled.plan.num_tokens > (scale.backlog + 1) * longest
    for load in loads_of(scale):
        changed(config, load.options(0.005), load.name)  # every mode is one that the configuration knows


@pytest.fixture
def folder() -> Iterator[Path]:
    """Its path is short: sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="duomo-t-") as path:
        yield Path(path)


def cpu(folder: Path, **options: object) -> DuomoConfig:
    told: dict[str, object] = {
        "model.path": str(TINY_MOE),
        "model.device": "cpu",
        "model.units": 8,
        "layout": "colocated",
        "prefill.max_wave_tokens": 512,
        "prefill.chunk_tokens": 64,
        "decode.num_blocks": 256,
        "run_dir": str(folder),
    }
    return load_config(None, told | options)


def test_loads_are_played_to_the_real_services(tmp_path: Path, folder: Path) -> None:
    """Three loads over one engine: waves of both kinds are seen, every prompt gets its tokens, nothing is left behind."""
    part = played()
    loads: Sequence[Load] = (OVERTAKE, replace(OVERTAKE, mode="chunked", size=64.0), BESIDE)
    written: list[int] = []
    asyncio.run(play_all(cpu(folder), folder, loads, part, float("inf"), lambda: written.append(len(part.loads))))
    assert written == [0, 1, 2, 3] and part.facts["chunk_s"] > 0 and not part.left_out
    layered, chunked, beside = part.loads
    assert not any(one.failures for one in part.loads), [one.failures for one in part.loads]
    for over in (layered, chunked):
        assert over.ttft is not None and over.ttft.count == len(arrivals_of(OVERTAKE)) and over.itl is None
        assert over.num_long_waves >= 1 and over.num_short_waves >= 1 and over.pieces is not None and over.alone is not None
        assert {wave.num_tokens >= 320 for wave in over.waves} == {True, False}
        assert all(sum(wave.piece_groups) == 8 for wave in over.waves if over is layered), "every group once"
    assert {len(wave.piece_s) for wave in chunked.waves if wave.num_tokens == 320} == {5}, "chunks of 64 rows, whoever waits"
    assert any(len(wave.piece_s) > 1 for wave in layered.waves if wave.num_tokens == 320)
    expected = arrivals_of(BESIDE)
    assert beside.ttft is not None and beside.ttft.count == len(expected)
    assert beside.itl is not None and beside.itl.count == sum(each.new_tokens - 1 for each in expected)
    assert not beside.waves and beside.new_tokens_per_s > 0
    part.write(tmp_path / "part.json")
    assert part_from_json(json.loads((tmp_path / "part.json").read_text())) == part


def test_what_there_is_no_time_for_is_named(folder: Path) -> None:
    part = played()
    asyncio.run(play_all(cpu(folder), folder, [BESIDE], part, 0.0, lambda: None))
    assert part.left_out == ["ours_arrivals olmoe bf16 beside 4/s chunked 64: no time"] and not part.loads


def test_a_request_that_fails_is_named(folder: Path) -> None:
    """A prompt that no pool of this size can hold."""

    async def go() -> LoadResult:
        async with stage(cpu(folder, **{"decode.num_blocks": 16, "decode.watermark_blocks": 1}), folder) as made:
            return await made.play(replace(BESIDE, lengths=(480,), rate_per_s=1.0), 0.02)

    found = asyncio.run(go())
    assert found.failures and "arrival-" in found.failures[0] and found.ttft is None
