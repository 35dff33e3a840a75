"""Owns the measurement of our engine on one GPU, engine alone (`python -m bench.engine.engine_ours JOB.json PART.json`). Knows no peer.

A decode step is timed as a service runs it: the next step is planned and launched before this one's tokens are waited for; the time between
two answers is a step, host and all. A wave is timed from lists of token ids to the first token of each prompt on the host.

The ways of prefill differ in what is launched together. whole: everything. layered: PIECES runs of layers, each waited for, as a service
waits before it decides what runs next. chunked: all layers of CHUNK_TOKENS rows, chunk after chunk, launched ahead without a wait, which a
service could not do: the baseline is given what it can have.

Before anything is timed, greedy tokens of captured steps are held against one prefill of the same tokens (engine_check.py).
"""

from __future__ import annotations

import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from bench.engine.engine_cases import (
    CHECK_LENGTH,
    CHECK_PROMPTS,
    CHECK_STEPS,
    CHUNK_TOKENS,
    DECODE_STEPS,
    MAX_TOKENS,
    PIECES,
    SEED,
    STD,
    CaseResult,
    EngineCase,
    FirstTokens,
    Job,
    Part,
    Routing,
    Way,
    check_prompts,
    embedding_factor,
    prompts,
    write_config,
)
from bench.engine.engine_check import judge, slack_of
from bench.engine.engine_job import run_job
from bench.gpu_stopwatch import facts, timing_of
from duomo.engine.batch import PromptSlice, StepBatch
from duomo.engine.decode_step import DecodeLimits, DecodeRow, DecodeStep, Joining
from duomo.engine.gpu_captured_layers import CapturedLimits
from duomo.engine.gpu_decode import GpuDecode
from duomo.engine.gpu_kv_cache import GpuKvCache, gpu_kv_spec
from duomo.engine.gpu_prefill import GpuBoundaryState, GpuPrefill
from duomo.engine.memory_plan import GPU_BLOCK_TOKENS, DeviceBytes, Measured, MemoryLimits, MemoryPlan, plan_memory
from duomo.engine.sampler import RowSampling
from duomo.models.config import ModelConfig, load_config
from duomo.models.gpu_decoder import GpuDecoder
from duomo.models.gpu_random import random_gpu_weights
from duomo.models.gpu_weights import GpuWeights
from duomo.wire.values import Sampling

WARM_UPS = 2
Table = Sequence[int]


def blocks_of(case: EngineCase) -> int:
    """Blocks that the case fills."""
    return case.batch * -(-case.last_tokens // GPU_BLOCK_TOKENS)


def random_engine(job: Job, config: ModelConfig, device: torch.device) -> tuple[Engine, MemoryPlan]:
    """The job's model with a pool of all memory that is left, captured for the batches that fit into it."""
    free, total = torch.cuda.mem_get_info(device)
    quantise: Literal["fp8"] | None = "fp8" if job.dtype == "fp8" else None
    weights = random_gpu_weights(config, device=device, dtype=torch.bfloat16, quantise=quantise, seed=SEED, std=STD)
    torch.cuda.empty_cache()
    room = MemoryLimits(
        max_batch=max([case.batch for case in job.cases if case.phase == "decode"], default=CHECK_PROMPTS),
        max_wave_tokens=MAX_TOKENS,
        max_model_tokens=max(case.last_tokens for case in job.cases),
        quantise=quantise,
    )
    held = Measured(weights=free - torch.cuda.mem_get_info(device)[0])
    plan = plan_memory(config, DeviceBytes(total=total, free=free), room, held)
    return Engine(weights, plan.num_blocks, decode_limits(job, plan.num_blocks)), plan


def decode_limits(job: Job, num_blocks: int) -> DecodeLimits:
    """Of the steps that are captured: the check's, and those of the job's cases that fit into the pool."""
    fitting = [case for case in job.cases if case.phase == "decode" and blocks_of(case) <= num_blocks]
    return DecodeLimits(
        max_batch=max([CHECK_PROMPTS, *(case.batch for case in fitting)]),
        max_model_tokens=max([CHECK_LENGTH + CHECK_STEPS + 1, *(case.last_tokens for case in fitting)]),
        is_deterministic=job.mode == "ours_deterministic",
    )


class Engine:
    """A model, its pool, prefill and captured decode."""

    def __init__(self, weights: GpuWeights, num_blocks: int, limits: DecodeLimits) -> None:
        decoder = GpuDecoder(weights, is_deterministic=limits.is_deterministic)
        self.config = weights.config
        self._routing: Routing = "drawn"
        self.cache = GpuKvCache(gpu_kv_spec(self.config, dtype=weights.dtype), num_blocks, weights.device)
        self.prefill = GpuPrefill(decoder, self.cache)
        self.decode = GpuDecode(decoder, self.cache, limits)
        self.decode.capture()
        if weights.device.type == "cuda":
            self.prefill.capture(CapturedLimits(max_sequence_tokens=MAX_TOKENS))

    @torch.inference_mode()
    def take_routing(self, routing: Routing) -> None:
        """From here on prompts are routed so (engine_cases.py); graphs read the same tensor."""
        if (factor := embedding_factor(self._routing, routing)) != 1.0:
            self.prefill.decoder.weights.embed_VD.mul_(factor)
        self._routing = routing

    def tables(self, batch: int, last_tokens: int) -> list[Table]:
        """A table for each sequence, blocks scattered over the pool as a service's are after a while."""
        width = -(-last_tokens // GPU_BLOCK_TOKENS)
        order = torch.randperm(self.cache.num_blocks, generator=torch.Generator().manual_seed(7)).tolist()
        return [order[i * width : (i + 1) * width] for i in range(batch)]

    def wave(self, batch: StepBatch, way: Way) -> tuple[GpuBoundaryState, list[int]]:
        """The wave, computed this way, and the greedy token after each prompt, on the host."""
        num_layers = self.config.num_layers
        state = self.prefill.begin(batch, CHUNK_TOKENS if way == "chunked" else None)
        bounds = [num_layers * piece // PIECES for piece in range(PIECES + 1)] if way == "layered" else [0, num_layers]
        for lo, hi in itertools.pairwise(dict.fromkeys(bounds)):
            state = self.prefill.run_layers(lo, hi, state)
            if way == "layered":
                self._wait()
        return state, self.prefill.logits(state, batch.last_rows).argmax(-1).tolist()

    def _wait(self) -> None:
        """As a service's worker waits for a piece."""
        if self.cache.device.type == "cuda":
            end = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # torch ships no types for it
            end.record()
            end.synchronize()

    def first_tokens(self, batch: Sequence[list[int]], tables: Sequence[Table]) -> list[int]:
        """Prefill in waves of MAX_TOKENS at most; the greedy token after each prompt."""
        per_wave = max(1, MAX_TOKENS // len(batch[0]))
        found: list[int] = []
        for at in range(0, len(batch), per_wave):
            wave = _wave(batch[at : at + per_wave], tables[at : at + per_wave])
            found += self.wave(wave, "whole")[1]
        return found

    def decode_steps(
        self, batch: Sequence[list[int]], tables: Sequence[Table], first: Sequence[int], num_steps: int
    ) -> tuple[list[NDArray[np.int32]], list[NDArray[np.int16]], list[float]]:
        """(tokens, routed experts [L, R, K], time of the answer) of each step; one step is always launched ahead."""
        length = len(batch[0])
        greedy = Sampling(max_tokens=num_steps + 1, temperature=0.0, ignore_eos=True)
        joining = [
            Joining(token_id=token, sampling=RowSampling(sampling=greedy, choice=0, prompt_ids=ids, output_ids=[token]))
            for ids, token in zip(batch, first, strict=True)
        ]

        def step(at: int) -> DecodeStep:
            sources: Sequence[int | Joining] = joining if at == 0 else range(len(batch))
            rows = (DecodeRow(source=source, position=length + at, table=table) for source, table in zip(sources, tables, strict=True))
            return DecodeStep(rows=tuple(rows))

        tokens, routed, times_s = [], [], []
        pending = self.decode.launch(step(0))
        for at in range(1, num_steps + 1):
            following = self.decode.launch(step(at)) if at < num_steps else None
            result = pending.wait()
            times_s.append(time.perf_counter())
            assert not result.errors, result.errors
            tokens.append(result.token_id_R.copy())
            routed.append(result.routed_LRK.copy())
            if following is not None:
                pending = following
        return tokens, routed, times_s


def _wave(batch: Sequence[list[int]], tables: Sequence[Table]) -> StepBatch:
    slices = (PromptSlice(token_ids=ids, start=0, block_table=table) for ids, table in zip(batch, tables, strict=True))
    return StepBatch(slices=tuple(slices))


def distinct_experts(routed: Sequence[NDArray[np.int16]]) -> float:
    """Experts that a layer chose in one step, mean over layers and steps: routed [L, R, K] by step."""
    return statistics.fmean(len(np.unique(layer)) for step in routed for layer in step)


def check(engine: Engine, part: Part) -> None:
    """Captured greedy steps against one prefill of prompt and tokens; sets part.red where they are not the same model's."""
    batch = check_prompts(engine.config.vocab)
    tables = engine.tables(len(batch), CHECK_LENGTH + CHECK_STEPS + 1)
    first = engine.first_tokens(batch, tables)
    steps, _, _ = engine.decode_steps(batch, tables, first, CHECK_STEPS)
    tokens_RS = np.stack([np.asarray(first, dtype=np.int64), *(one.astype(np.int64) for one in steps)], axis=1)
    whole = [[*ids, *row[:-1]] for ids, row in zip(batch, tokens_RS.tolist(), strict=True)]
    state = engine.prefill.run_layers(0, engine.config.num_layers, engine.prefill.begin(_wave(whole, tables)))
    length = len(whole[0])
    rows = [i * length + CHECK_LENGTH - 1 + step for i in range(len(whole)) for step in range(CHECK_STEPS + 1)]
    logits_XV = engine.prefill.logits(state, rows)
    slack = slack_of(engine.config.num_layers, part.job.dtype)
    found = judge(logits_XV, torch.from_numpy(tokens_RS.reshape(-1)).to(logits_XV.device), slack)
    part.notes.append(f"captured steps against one prefill: {found.line()}")
    part.red = found.why_red()
    is_clear = tuple(found.is_clear[i * (CHECK_STEPS + 1)] for i in range(len(batch)))
    part.first_tokens = FirstTokens(token_ids=tuple(int(token) for token in first), is_clear=is_clear)


def measure(engine: Engine, job: Job, case: EngineCase) -> CaseResult | str:
    """The case's numbers, or why there are none."""
    if (needed := blocks_of(case)) > engine.cache.num_blocks:
        return f"{needed:,} blocks of KV needed, {engine.cache.num_blocks:,} there"
    tables = engine.tables(case.batch, case.last_tokens)
    engine.take_routing(case.routing)
    if case.phase == "decode":
        batch = prompts(case, engine.config.vocab)
        first = engine.first_tokens(batch, tables)
        num_steps = case.lead_steps + DECODE_STEPS + 1
        _, routed, times_s = engine.decode_steps(batch, tables, first, num_steps)
        window = times_s[case.lead_steps - 1 : -1]  # the last step has none launched behind it
        steps_us = [1e6 * (after - before) for before, after in zip(window, window[1:], strict=False)]
        context = case.tokens + case.lead_steps + (DECODE_STEPS + 1) / 2  # the step after k tokens sees the prompt and k keys
        distinct = distinct_experts(routed[case.lead_steps : case.lead_steps + DECODE_STEPS])
        return CaseResult(case=case, timing=timing_of(steps_us, 1), distinct=round(distinct, 3), context=round(context, 1))
    return _measure_waves(engine, job, case, tables)


def _measure_waves(engine: Engine, job: Job, case: EngineCase, tables: Sequence[Table]) -> CaseResult:
    waves_us = []
    for repeat in range(WARM_UPS + job.repeats):
        wave = _wave(prompts(case, engine.config.vocab, repeat), tables)
        if engine.cache.device.type == "cuda":
            torch.cuda.synchronize()
        started_s = time.perf_counter()
        engine.wave(wave, case.way)
        waves_us.append(1e6 * (time.perf_counter() - started_s))
    state, _ = engine.wave(_wave(prompts(case, engine.config.vocab), tables), case.way)
    use = state.expert_use()
    distinct = float((use.counts_SLE.sum(0) > 0).sum(-1).double().mean())
    return CaseResult(case=case, timing=timing_of(waves_us[WARM_UPS:], 1), distinct=round(distinct, 3), expert_bytes=use.bytes_read)


def measure_job(job: Job, part: Part, out: Path, deadline_s: float) -> None:
    """Check, then all cases of the job; the part is written after each."""
    from bench.gpu_ceilings import ceilings

    device = torch.device("cuda", torch.cuda.current_device())
    part.facts |= facts("engine", job.repeats) | {"ceilings": ceilings()}
    torch.cuda.empty_cache()
    config = load_config(write_config(job, Path(tempfile.mkdtemp(prefix="duomo-bench-"))), needs_weights=False)
    started_s = time.monotonic()
    engine, plan = random_engine(job, config, device)
    torch.cuda.synchronize()
    part.facts |= {"ready_s": round(time.monotonic() - started_s, 1), "memory": plan.lines(), "limits": asdict(engine.decode.limits)}
    check(engine, part)
    part.write(out)
    print(part.notes, flush=True)
    if part.red:
        return
    for case in job.cases:
        if time.monotonic() > deadline_s:
            part.left_out.append(f"{job.name} {case.name}: no time")
            continue
        found = measure(engine, job, case)
        if isinstance(found, str):
            part.left_out.append(f"{job.name} {case.name}: {found}")
        else:
            part.results.append(found)
        part.write(out)
        print(f"{job.name} {case.name}: {found}", flush=True)
    part.write(out)


if __name__ == "__main__":
    sys.exit(run_job(measure_job))
