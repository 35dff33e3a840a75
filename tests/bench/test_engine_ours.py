"""Our side of `duomo bench engine` on a tiny random model, in Triton's interpreter where there is no GPU. Times are not looked at."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the GPU's engine is made of Triton kernels")

from bench.engine import engine_cases, engine_ours
from bench.engine.engine_cases import EngineCase, Job, Mode, Part, Way, prompts
from bench.engine.engine_ours import Engine, _wave, blocks_of, check, decode_limits, distinct_experts, measure, measure_job
from duomo.engine.decode_step import DecodeLimits
from duomo.models.gpu_random import random_gpu_weights
from tests.engine.gpu_tiny import TINY, WIDE
from tests.interpreter import prepare

prepare()  # GPU kernels run in the interpreter here
NUM_BLOCKS = 8


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    """One prompt of five tokens is checked over one step, two decode steps are timed: the interpreter is slow."""
    for name, value in (
        ("CHECK_PROMPTS", 1),
        ("CHECK_LENGTH", 5),
        ("CHECK_STEPS", 1),
        ("DECODE_STEPS", 2),
        ("LEAD_STEPS", 1),
        ("WARM_UPS", 0),
    ):
        for module in (engine_cases, engine_ours):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    is_cuda = torch.cuda.is_available()
    config, device = (WIDE, torch.device("cuda")) if is_cuda else (TINY, torch.device("cpu"))
    dtype = torch.bfloat16 if is_cuda else torch.float32
    weights = random_gpu_weights(config, device=device, dtype=dtype, std=config.hidden**-0.5)
    return Engine(weights, NUM_BLOCKS, DecodeLimits(max_batch=2, max_model_tokens=64))


def job(*cases: EngineCase) -> Job:
    return Job(mode="ours", model="olmoe", dtype="bf16", cases=cases, repeats=1, budget_s=60)


def test_captured_steps_are_held_against_a_prefill(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    part = Part(job=job(), facts={})
    check(engine, part)
    assert part.red == "" and "of 2 tokens the same" in part.notes[0]
    assert part.first_tokens is not None and len(part.first_tokens.token_ids) == len(part.first_tokens.is_clear) == 1
    truth = engine.decode_steps

    def least_likely(*arguments: object) -> object:
        """As if the sampler took another row's tokens."""
        tokens, routed, times_s = truth(*arguments)  # type: ignore[arg-type]  # those of decode_steps
        return [(one + 31) % engine.config.vocab for one in tokens], routed, times_s

    monkeypatch.setattr(engine, "decode_steps", least_likely)
    wrong = Part(job=job(), facts={})
    monkeypatch.setattr(engine, "first_tokens", lambda batch, tables: list(part.first_tokens.token_ids) if part.first_tokens else [])
    check(engine, wrong)
    assert "tokens of captured steps are not those of one prefill" in wrong.red


def test_decode_steps_have_times_and_experts(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = EngineCase(phase="decode", batch=2, tokens=9)
    monkeypatch.setattr(engine, "first_tokens", lambda batch, tables: [3, 4])  # keys of zeros: any number will do
    found = measure(engine, job(decode), decode)
    assert not isinstance(found, str) and found.timing is not None and found.distinct is not None
    assert found.timing.repeats == 2 and found.timing.median_us > 0
    # the step after k tokens sees the prompt and k keys: k is 3 and 4 in the timed steps
    assert decode.lead_steps == 2 and found.context == 9 + 3.5
    assert engine.config.top_k <= found.distinct <= engine.config.num_experts


def test_waves_have_times_and_experts(engine: Engine) -> None:
    prompt = EngineCase(phase="prefill", batch=1, tokens=9)
    found = measure(engine, job(prompt), prompt)
    assert not isinstance(found, str) and found.timing is not None and found.timing.repeats == 1
    assert found.distinct is not None and engine.config.top_k <= found.distinct <= engine.config.num_experts


def test_all_ways_give_the_same_tokens_and_chunks_read_more(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """17 rows as 16 and 1, each reads the experts of its own rows again; pieces of one layer read what the whole reads."""
    monkeypatch.setattr(engine_ours, "CHUNK_TOKENS", 16)
    ways: tuple[Way, ...] = ("whole", "layered", "chunked")
    cases = [EngineCase(phase="prefill", batch=1, tokens=17, way=way) for way in ways]
    waves = [_wave(prompts(case, engine.config.vocab), engine.tables(1, 18)) for case in cases]
    states, tokens = zip(*(engine.wave(wave, case.way) for wave, case in zip(waves, cases, strict=True)), strict=True)
    assert tokens[0] == tokens[1] == tokens[2] and [state.num_chunks for state in states] == [1, 1, 2]
    whole, layered, chunked = [measure(engine, job(case), case) for case in cases]
    assert not isinstance(whole, str) and not isinstance(layered, str) and not isinstance(chunked, str)
    assert whole.distinct == layered.distinct == chunked.distinct and whole.distinct is not None
    each = engine.prefill.decoder.weights.layers[0].expert_bytes
    assert whole.expert_bytes == layered.expert_bytes == round(whole.distinct * engine.config.num_layers) * each
    assert chunked.expert_bytes is not None and whole.expert_bytes < chunked.expert_bytes <= 2 * whole.expert_bytes


def test_spread_routing_uses_more_experts_and_is_taken_back(engine: Engine) -> None:
    before = engine.prefill.decoder.weights.embed_VD.clone()
    drawn = EngineCase(phase="prefill", batch=1, tokens=9)
    found = [measure(engine, job(case), case) for case in (drawn, replace(drawn, routing="spread"), drawn)]
    first, spread, last = [one.distinct for one in found if not isinstance(one, str) and one.distinct is not None]
    assert first == last <= spread
    assert torch.equal(engine.prefill.decoder.weights.embed_VD, before)


@pytest.mark.parametrize(("mode", "is_deterministic"), [("ours", False), ("ours_deterministic", True)])
def test_fixed_sums_are_asked_for_by_their_mode(mode: Mode, is_deterministic: bool) -> None:
    assert decode_limits(replace(job(EngineCase(phase="decode", batch=3, tokens=9)), mode=mode), 100).is_deterministic is is_deterministic


def test_what_does_not_fit_is_said(engine: Engine) -> None:
    case = EngineCase(phase="decode", batch=5, tokens=60)
    assert blocks_of(case) == 10
    assert measure(engine, job(case), case) == "10 blocks of KV needed, 8 there"


def test_tables_share_no_block(engine: Engine) -> None:
    tables = engine.tables(3, 100)
    assert [len(table) for table in tables] == [2, 2, 2] and len({block for table in tables for block in table}) == 6


def test_experts_are_counted_by_layer_and_step() -> None:
    first = np.array([[[0, 1], [0, 1]], [[0, 1], [2, 3]]], dtype=np.int16)  # 2 layers, 2 rows, 2 experts each
    assert distinct_experts([first]) == 3 and distinct_experts([first, np.zeros_like(first)]) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures graphs of a model of true size")
def test_a_whole_job(tmp_path: Path) -> None:
    cases = (EngineCase(phase="decode", batch=2, tokens=64), EngineCase(phase="prefill", batch=1, tokens=128))
    part = Part(job=job(*cases), facts={})
    measure_job(part.job, part, tmp_path / "part.json", deadline_s=float("inf"))
    assert not part.red and [one.case for one in part.results] == list(cases)
