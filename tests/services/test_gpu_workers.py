"""Both services over one engine of a GPU: tokens are those of the engine alone, blocks come back, nothing is compiled while serving.

In Triton's interpreter a few requests of a tiny model; on a GPU captured graphs, 64 requests at a time.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the GPU's engine is made of Triton kernels")

from duomo.config import DuomoConfig
from duomo.engine.gpu_engine import EngineStart, GpuEngine, start_engine
from duomo.engine.memory_plan import DeviceBytes, MemoryLimits
from duomo.engine.startup import Startup
from duomo.models.gpu_random import random_gpu_weights
from duomo.telemetry.span_file import read_spans
from duomo.telemetry.tracing import configure
from duomo.wire.values import Constraint, Sampling
from services.colocated import Engine, Workers
from services.engine_start import record_start
from services.gpu_workers import gpu_workers
from tests.engine.gpu_tiny import TINY, WIDE
from tests.grammar import letters
from tests.interpreter import prepare
from tests.services.decode.rig import configuration
from tests.services.gpu_rig import Asked, judge, known, prompt, serve
from tests.services.pair_rig import System, colocated

prepare()

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROOM = 14_653_000  # bytes: mostly what graphs would take
Scenario = Callable[[Engine, System], Coroutine[Any, Any, None]]


@pytest.fixture(scope="module")
def small() -> GpuEngine:
    """Interpreted: some 20 blocks of 16 tokens, 4 rows."""
    limits = MemoryLimits(max_batch=4, max_wave_tokens=64, max_model_tokens=64, block_tokens=16, dtype_bytes=4)
    load = partial(random_gpu_weights, known(TINY), device=CPU, dtype=torch.float32, std=0.125)
    engine = start_engine(
        EngineStart(config=known(TINY), load=load, limits=limits, device=CPU, memory=DeviceBytes(total=ROOM, free=ROOM)), Startup()
    )
    engine.compilations.close()
    return engine


def told(folder: Path, **sections: dict[str, object]) -> DuomoConfig:
    sections.setdefault("model", {}).update(units=2)
    sections.setdefault("prefill", {}).update(grant_timeout_s=60.0)  # an interpreted step takes long
    config = configuration(folder, sections)
    return DuomoConfig.model_validate(config.model_dump() | {"layout": "colocated"})


def play(engine: GpuEngine, config: DuomoConfig, scenario: Scenario) -> None:
    made = gpu_workers(engine, config)
    workers = Workers(prefill=made.prefill, decode=made.decode, config=made.config)

    async def go() -> None:
        async with asyncio.timeout(100), colocated(made.config, workers) as (services, system):
            await scenario(services, system)
            await system.at_rest()
            services.loans.manager.check_integrity()
            report = services.decode.report()
            assert (report.num_blocks, report.block_tokens) == (engine.plan.num_blocks, engine.plan.block_tokens)
            assert report.counters["kernel_compilations_after_ready"] == 0
            services.prefill.check_health()
            services.decode.check_health()

    asyncio.run(go())


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU")
def test_requests_of_every_kind_in_the_interpreter(small: GpuEngine, tmp_path: Path) -> None:
    """Five rows asked for, four captured: somebody waits, joins by its known token, and forks copy a partial block."""
    draws = Sampling(max_tokens=3, temperature=0.9, seed=5, ignore_eos=True, logprobs=2, repetition_penalty=1.3)
    asked = [
        Asked(prompt(5, 1, 97), Sampling(max_tokens=5, temperature=0.0, ignore_eos=True)),
        Asked(prompt(21, 2, 97), draws, choices=(0, 1)),
        Asked(prompt(14, 3, 97), Sampling(max_tokens=3, temperature=0.8, top_k=9, seed=3, min_tokens=3)),
        Asked(prompt(16, 4, 97), Sampling(max_tokens=1, temperature=0.0, ignore_eos=True)),
    ]
    found: dict[tuple[int, int], list[int]] = {}

    async def scenario(services: Engine, system: System) -> None:
        found.update(await serve(system, asked))
        logprob = system.decodes[0][1].answers["r1"].tokens[1][1].logprob
        assert logprob is not None and len(logprob.top) == 2

    play(small, told(tmp_path, decode={"max_batch": 4}), scenario)
    judge(small, asked, found, every=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU")
def test_answers_are_held_to_constraints_though_steps_are_launched_ahead(small: GpuEngine, tmp_path: Path) -> None:
    """Beside free rows, forked, ended by the grammar, cut by a length and resumed: what the CPU's sampler makes of the engine's logits."""
    letters.write_tokenizer(tmp_path, 97)

    def held(regex: str, **knobs: Any) -> Sampling:
        return Sampling(**{"max_tokens": 8, "temperature": 0.9, "constraint": Constraint(kind="regex", text=regex), **knobs})

    biased = ((letters.token_id("b"), 2.0),)
    asked = [
        Asked(prompt(5, 1, 97), Sampling(max_tokens=6, temperature=0.0, ignore_eos=True, logit_bias=((7, 4.0),))),
        Asked(prompt(9, 2, 97), held("[a-d]{3}[0-9]", seed=5, logprobs=1), choices=(0, 1)),
        Asked(prompt(14, 3, 97), held("[A-Z]+", temperature=0.0, max_tokens=4, repetition_penalty=1.2, logit_bias=biased)),
        Asked(prompt(3, 4, 97), held("x?", ignore_eos=True)),
    ]
    found: dict[tuple[int, int], list[int]] = {}

    async def scenario(services: Engine, system: System) -> None:
        found.update(await serve(system, asked))
        dead_end = Constraint(kind="regex", text="q\u00e9")  # no token of this model spells the second letter
        system.start("dead end", (3, 4), held(dead_end.text), p=0, d=0)
        failed = await system.decodes[0][1].failed("dead end")
        assert (failed.code, failed.retryable) == ("constraint_not_kept", False)

    play(small, told(tmp_path, decode={"max_batch": 4}, model={"path": str(tmp_path)}), scenario)
    judge(small, asked, found, folder=tmp_path)
    for choice in (0, 1):
        assert re.fullmatch("[a-d]{3}[0-9]", letters.text(found[1, choice])) and found[1, choice][-1] == letters.EOS
    assert re.fullmatch("[A-Z]{4}", letters.text(found[2, 0])) and found[3, 0][-1] == letters.EOS


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU")
def test_a_following_turn_attends_to_what_the_one_before_left(small: GpuEngine, tmp_path: Path) -> None:
    """KV of a wave in one block, of a wave and of steps in the other."""
    first, more = Asked(prompt(28, 8, 97), Sampling(max_tokens=6, temperature=0.0, ignore_eos=True)), prompt(9, 9, 97)
    asked: list[Asked] = []
    found: dict[tuple[int, int], list[int]] = {}

    async def scenario(services: Engine, system: System) -> None:
        system.start("turn 1", first.prompt_ids, first.sampling, p=0, d=0)
        await system.ended("turn 1", p=0, d=0)
        asked.append(Asked((*first.prompt_ids, *system.tokens("turn 1", p=0, d=0), *more), first.sampling))
        found.update(await serve(system, asked))
        assert services.prefill.report().counters["prefill_tokens_cached"] == 32

    play(small, told(tmp_path, decode={"max_batch": 4}), scenario)
    judge(small, asked, found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU")
def test_a_prompt_without_finite_logits_fails_alone_and_so_does_what_cannot_be_sampled(
    small: GpuEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = Asked(prompt(5, 1, 97), Sampling(max_tokens=3, temperature=0.0, ignore_eos=True))
    found: dict[tuple[int, int], list[int]] = {}
    embed = small.prefill.decoder.embed

    def poisoned(token_id_T: torch.Tensor) -> torch.Tensor:
        x_TD = embed(token_id_T)
        x_TD[token_id_T == 96] = float("nan")
        return x_TD

    async def scenario(services: Engine, system: System) -> None:
        bad = Sampling(max_tokens=3, temperature=0.0, min_tokens=2, stop_token_ids=tuple(range(40)))
        system.start("bad", (3, 4), bad, p=0, d=0)
        for gateway in (system.prefills[0][1], system.decodes[0][1]):
            failed = await gateway.failed("bad")
            assert (failed.code, failed.retryable) == ("invalid_value", False)
        monkeypatch.setattr(small.prefill.decoder, "embed", poisoned)
        system.start("nan", (3, 96, 4), good.sampling, p=0, d=0)
        found.update(await serve(system, [good]))
        failed = await system.prefills[0][1].failed("nan")
        assert (failed.code, failed.phase, failed.retryable) == ("bad_logits", "prefill.compute", False)
        system.decodes[0][1].cancel("nan")

    play(small, told(tmp_path, decode={"max_batch": 4}), scenario)
    monkeypatch.undo()
    small.cache.tensor.zero_()  # a NaN that a prompt left is nobody's but its own: here the next test's blocks are compared whole
    judge(small, [good], found)


def test_a_start_is_a_trace_of_its_phases(tmp_path: Path) -> None:
    config = told(tmp_path, tracing={"directory": str(tmp_path / "spans")})
    spans = configure(config.tracing, "duomo-decode", "decode", "engine-0.decode")
    startup = Startup()
    for name in ("import", "weights"):
        with startup.phase(name):
            pass
    record_start(spans, startup, startup.phases[0].started_s)
    spans.shutdown()
    found = read_spans(tmp_path / "spans")
    assert sorted(span.name for span in found) == ["engine.phase", "engine.phase", "engine.start"]
    assert {span.attributes.get("duomo.phase") for span in found} == {None, "import", "weights"}


LETTERS = Constraint(kind="regex", text="[A-Za-z]{20,25}")


def crowd() -> list[Asked]:
    """64 requests of every kind."""
    made = random.Random(7)
    asked = []
    for number in range(64):
        seed = made.randrange(2**63)
        sampling = made.choice(
            [
                Sampling(max_tokens=60, temperature=0.0, ignore_eos=True),
                Sampling(max_tokens=90, temperature=0.9, seed=seed),
                Sampling(max_tokens=33, top_k=20, top_p=0.9, seed=seed, ignore_eos=True),
                Sampling(max_tokens=50, temperature=0.0, repetition_penalty=1.3, presence_penalty=0.4, ignore_eos=True),
                Sampling(max_tokens=40, temperature=0.7, seed=seed, min_tokens=5, logprobs=3),
                Sampling(max_tokens=50, temperature=0.9, seed=seed, constraint=Constraint(kind="regex", text="([a-z]{2,9}-){3}[0-9]+")),
                Sampling(max_tokens=30, temperature=0.0, repetition_penalty=1.3, logit_bias=((40, 3.0), (999, -9.0)), constraint=LETTERS),
                Sampling(max_tokens=20, temperature=0.8, seed=seed, top_p=0.9, logit_bias=((7, 6.0),), ignore_eos=True),
            ]
        )
        choices = (0, 1) if number % 9 == 0 else (0,)
        asked.append(Asked(prompt(made.randrange(1, 330), number, 1000), sampling, choices))
    return asked


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are CUDA's")
@pytest.mark.timeout(400)
def test_64_at_a_time_are_given_what_each_is_given_alone(tmp_path: Path) -> None:
    free, total = torch.cuda.mem_get_info()
    limits = MemoryLimits(max_batch=64, max_wave_tokens=2048, max_model_tokens=512, block_tokens=64)
    limits = replace(limits, gpu_memory_fraction=(total - free + 2 * 10**9) / total)  # leave the card to others
    load = partial(random_gpu_weights, known(WIDE), device=CUDA, std=WIDE.hidden**-0.5)
    engine = start_engine(EngineStart(config=known(WIDE), load=load, limits=limits, device=CUDA, is_deterministic=True), Startup())
    asked, found = crowd(), {}

    async def scenario(services: Engine, system: System) -> None:
        found.update(await serve(system, asked))
        again = await serve_again(system, asked)
        assert again == found

    async def serve_again(system: System, asked: Sequence[Asked]) -> dict[tuple[int, int], list[int]]:
        """In another order, so that rows and waves are others."""
        order = sorted(range(len(asked)), key=lambda number: number * 37 % 64)
        for number in order:
            system.start(f"again{number}", asked[number].prompt_ids, asked[number].sampling, p=0, d=0, choices=asked[number].choices)
        for number in order:
            await system.ended(f"again{number}", p=0, d=0)
        return {(number, choice): system.tokens(f"again{number}", p=0, d=0, choice=choice) for number, choice in found}

    try:
        letters.write_tokenizer(tmp_path, 97)  # the model's other ids are no text
        play(engine, told(tmp_path, decode={"max_batch": 64}, model={"max_model_tokens": 512, "path": str(tmp_path)}), scenario)
        judge(engine, asked, found, every=7, folder=tmp_path)
    finally:
        engine.compilations.close()
