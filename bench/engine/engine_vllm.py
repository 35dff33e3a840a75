"""Owns the measurement of vLLM's engine (`python -m bench.engine.engine_vllm JOB.json PART.json`). Knows no engine of ours.

One process, one mode:

    vllm_in_process    its engine core in the caller's process, as shipped
    vllm_own_process   its engine core in a process of its own, as shipped: what its server does
    vllm_extended      in process, with graphs captured up to 4,096 tokens instead of 512, as a careful user would set them
    vllm_count         eager, returns the experts that each token took: nothing of it is timed

The engine runs as its offline LLM runs it: final outputs alone, no detokeniser. A step is timed where its core's output arrives: the time
between two outputs that hold a token of every sequence is a decode step, whether the core runs in this process or in its own. A wave is
timed from before its first request is added to the last output.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.engine.engine_cases import (
    DECODE_STEPS,
    MAX_TOKENS,
    CaseResult,
    EngineCase,
    FirstTokens,
    Job,
    Mode,
    Part,
    Routing,
    check_prompts,
    embedding_factor,
    prompts,
    write_config,
)
from bench.engine.engine_job import run_job
from bench.gpu_stopwatch import facts, timing_of

LOAD_FORMAT = "duomo_random"
WARM_UPS = 2
CAPTURED_TO = 4096
OWN_PROCESS_VARIABLE = "VLLM_ENABLE_V1_MULTIPROCESSING"


def capture_sizes() -> list[int]:
    """vLLM's own sizes up to 512 tokens, then coarser ones up to 4,096."""
    shipped = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]
    return [*shipped, *range(640, 1025, 128), *range(1280, 2049, 256), *range(2560, CAPTURED_TO + 1, 512)]


def environment() -> dict[str, str]:
    """What vLLM reads when it is imported, unless the caller's environment says otherwise: both need a compiler at run time."""
    return {
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_USE_DEEP_GEMM": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }


def settings(mode: Mode, folder: Path) -> dict[str, Any]:
    """Arguments of vLLM's LLM."""
    found: dict[str, Any] = {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "load_format": LOAD_FORMAT,
        "worker_extension_cls": "bench.engine.vllm_worker.RandomWeights",
        "dtype": "bfloat16",
        "generation_config": "vllm",
        "enable_prefix_caching": False,
        "gpu_memory_utilization": 0.9,
        "max_model_len": MAX_TOKENS // 2 + 256,
    }
    if mode == "vllm_extended":
        found["compilation_config"] = {"cudagraph_capture_sizes": capture_sizes()}
    if mode == "vllm_count":
        found |= {"enforce_eager": True, "enable_return_routed_experts": True, "async_scheduling": False}
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrival:
    """One output of the core: when it came, of how many sequences, how many tokens."""

    at_s: float
    num_sequences: int
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """A batch from its first request to its last token; outputs in the order of the prompts."""

    started_s: float
    arrivals: list[Arrival]
    outputs: list[Any]


class CaptureHeard(logging.Handler):
    """What vLLM's log says of the time and memory that its graphs took; nothing where its core runs in a process of its own."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.said = ""

    def emit(self, record: logging.LogRecord) -> None:
        if (line := record.getMessage()).startswith("Graph capturing finished"):
            self.said = line


class Engine:
    """vLLM's engine with its random model, and a clock at its core's outputs."""

    def __init__(self, job: Job, folder: Path) -> None:
        for name, value in environment().items():
            os.environ.setdefault(name, value)
        os.environ[OWN_PROCESS_VARIABLE] = "1" if job.mode == "vllm_own_process" else "0"
        vllm = importlib.import_module("vllm")
        self.capture = CaptureHeard()
        logging.getLogger("vllm").addHandler(self.capture)
        self._tokens_input = importlib.import_module("vllm.inputs").tokens_input
        self._params = vllm.SamplingParams
        self._final = importlib.import_module("vllm.sampling_params").RequestOutputKind.FINAL_ONLY
        self._llm = vllm.LLM(**settings(job.mode, folder))
        self._engine = self._llm.llm_engine
        self._core_output = self._engine.engine_core.get_output
        self._arrivals: list[Arrival] = []
        self._engine.engine_core.get_output = self._recorded
        self._ids = itertools.count()
        self._routing: Routing = "drawn"
        self.version: str = vllm.__version__
        self.vocab: int = self._engine.model_config.get_vocab_size()

    @property
    def kv_tokens(self) -> int:
        """Tokens that the pool holds."""
        cache = self._engine.vllm_config.cache_config
        return int(cache.num_gpu_blocks) * int(cache.block_size)

    def take_routing(self, routing: Routing) -> None:
        """From here on prompts are routed so (engine_cases.py), by the worker in whatever process it runs."""
        if (factor := embedding_factor(self._routing, routing)) != 1.0:
            self._llm.collective_rpc("scale_embedding", args=(factor,))
        self._routing = routing

    def _recorded(self) -> Any:
        found = self._core_output()
        if found.outputs:
            tokens = sum(len(one.new_token_ids) for one in found.outputs)
            self._arrivals.append(Arrival(at_s=time.perf_counter(), num_sequences=len(found.outputs), num_tokens=tokens))
        return found

    def serve(self, batch: Sequence[list[int]], num_tokens: int, routed_from: int = 0) -> Served:
        """Greedy, to the end of every sequence. routed_from: the first position whose experts are wanted, where they are counted."""
        params = self._params(
            temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False, output_kind=self._final,
            routed_experts_prompt_start=routed_from,
        )  # fmt: skip
        inputs = [self._tokens_input(ids) for ids in batch]
        names = [str(next(self._ids)) for _ in batch]
        self._arrivals = []
        started_s = time.perf_counter()
        for name, one in zip(names, inputs, strict=True):
            self._engine.add_request(name, one, params)
        outputs: dict[str, Any] = {}
        while self._engine.has_unfinished_requests():
            outputs |= {output.request_id: output.outputs[0] for output in self._engine.step() if output.finished}
        return Served(started_s=started_s, arrivals=self._arrivals, outputs=[outputs[name] for name in names])

    def close(self) -> None:
        self._engine.engine_core.shutdown()


def step_times(arrivals: Sequence[Arrival], batch: int, tokens: int) -> tuple[list[float], float]:
    """(microseconds of DECODE_STEPS pure decode steps, their mean context). Empty where too few were pure.

    A step is pure where it and the one before gave every sequence one token. The step before a sequence ends is left out.
    """
    emitted = [0, *itertools.accumulate(one.num_tokens for one in arrivals)]
    pure = [
        (1e6 * (after.at_s - before.at_s), tokens + emitted[i + 1] / batch)
        for i, (before, after) in enumerate(itertools.pairwise(arrivals))
        if before.num_tokens == after.num_tokens == before.num_sequences == after.num_sequences == batch
    ]
    window = pure[3:-1][:DECODE_STEPS]  # early ones: of no more keys than ours are
    if len(window) < DECODE_STEPS // 2:
        return [], 0.0
    return [us for us, _ in window], statistics.fmean(context for _, context in window)


def distinct_experts(routed: Sequence[NDArray[Any]], lo: int, hi: int) -> float:
    """Experts that a layer chose in one step, mean over layers and steps lo..hi-1: routed [tokens, layers, K] by sequence."""
    steps_RSLK = np.stack([one[lo:hi] for one in routed])
    return statistics.fmean(len(np.unique(steps_RSLK[:, step, layer])) for step in range(hi - lo) for layer in range(steps_RSLK.shape[2]))


def distinct_of_wave(routed: Sequence[NDArray[Any]], length: int) -> float:
    """Experts that a layer chose over all tokens of a wave, mean over layers."""
    tokens_TLK = np.concatenate([one[:length] for one in routed])
    return statistics.fmean(len(np.unique(tokens_TLK[:, layer])) for layer in range(tokens_TLK.shape[1]))


def measure(engine: Engine, job: Job, case: EngineCase) -> CaseResult | str:
    """The case's numbers, or why there are none."""
    if (needed := case.batch * case.last_tokens) > engine.kv_tokens:
        return f"{needed:,} tokens of KV needed, {engine.kv_tokens:,} there"
    engine.take_routing(case.routing)
    if job.mode == "vllm_count":
        return _count(engine, case)
    if case.phase == "decode":
        served = engine.serve(prompts(case, engine.vocab), case.last_tokens - case.tokens)
        steps_us, context = step_times(served.arrivals, case.batch, case.tokens)
        if not steps_us:
            return "too few steps in which every sequence got one token"
        return CaseResult(case=case, timing=timing_of(steps_us, 1), context=round(context, 1))
    waves_us = []
    for repeat in range(WARM_UPS + job.repeats):
        served = engine.serve(prompts(case, engine.vocab, repeat), 1)
        waves_us.append(1e6 * (served.arrivals[-1].at_s - served.started_s))
    return CaseResult(case=case, timing=timing_of(waves_us[WARM_UPS:], 1))


def _count(engine: Engine, case: EngineCase) -> CaseResult:
    if case.phase == "prefill":
        routed = [one.routed_experts for one in engine.serve(prompts(case, engine.vocab), 1).outputs]
        return CaseResult(case=case, distinct=round(distinct_of_wave(routed, case.tokens), 3))
    served = engine.serve(prompts(case, engine.vocab), case.last_tokens - case.tokens, routed_from=case.tokens - 1)
    routed = [one.routed_experts for one in served.outputs]
    # row 0 is the last token of the prompt, row j the j-th token that was fed
    first = case.lead_steps
    return CaseResult(case=case, distinct=round(distinct_experts(routed, first, first + DECODE_STEPS), 3))


def measure_job(job: Job, part: Part, out: Path, deadline_s: float) -> None:
    """All cases of the job in this process; the part is written after each."""
    folder = Path(tempfile.mkdtemp(prefix="duomo-bench-"))
    started_s = time.monotonic()
    engine = Engine(job, write_config(job, folder))
    part.facts |= facts("engine", job.repeats) | {"vllm": engine.version, "ready_s": round(time.monotonic() - started_s, 1)}
    part.facts["vllm_graphs"] = engine.capture.said
    part.facts["vllm_settings"] = {name: value for name, value in settings(job.mode, folder).items() if name != "model"}
    first = engine.serve(check_prompts(engine.vocab), 1)
    part.first_tokens = FirstTokens(token_ids=tuple(one.token_ids[0] for one in first.outputs))
    part.write(out)
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
    engine.close()


if __name__ == "__main__":
    sys.exit(run_job(measure_job))
