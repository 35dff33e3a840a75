"""Owns the playing of loads to both services in one process (`python -m bench.engine.arrivals_run JOB.json PART.json`). Knows no socket.

The engine starts once: weights, memory plan, graphs. For each load its services start anew over the same workers and the same step thread,
with the load's prefill mode, and a client process (arrivals_client.py) plays the gateway. No directory is needed: the client is told the
addresses.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from bench.engine.arrivals_cases import CHUNK_ROWS, SCALES, Answer, Arrival, Load, LoadResult, arrivals_of, load_result, loads_of
from bench.engine.arrivals_client import ClientPlan, answers_from_json
from bench.engine.arrivals_waves import waves_in
from bench.engine.engine_cases import SEED, Job, Part, embedding_factor, write_config
from bench.engine.engine_job import run_job
from bench.gpu_stopwatch import facts
from bench.stopwatch import ROOT
from duomo.config import DuomoConfig, TracingSection, changed, load_config
from duomo.engine.device import Host
from duomo.engine.settle import settle
from duomo.engine.startup import Startup
from duomo.telemetry import tracing
from duomo.wire.values import PeerAddress
from services.colocated import Engine, EngineMeans, Workers, engine_of, started_workers
from services.decode.service import DecodeService
from services.kv_transfer.started_heap import freeze_started
from services.kv_transfer.step_thread import StepThread
from services.prefill.service import PrefillService

UNITS = 16  # groups of a few layers each: pieces are as large as their target says, not as a group is
MAX_BATCH = 32
LIMIT_S = 60.0  # of one request
REST_LIMIT_S = 15.0
SETTLE_S = 0.05  # between the last answer and the end of the services: the step that was launched ahead is over
NUM_ALONE = 12
NUM_CHUNKED = 3  # long prompts that say what a chunk takes
WARM_NEW_TOKENS = 4
SPANS_OFF = TracingSection()


def gpu_config(job: Job, folder: Path, look: Callable[[], Host] | None = None) -> DuomoConfig:
    """The job's model, random, colocated, with waves as long as its longest prompt. look: at another host than this one."""
    scale = SCALES[job.model]
    options: dict[str, object] = {
        "model.path": str(write_config(job, folder)),
        "model.device": "cuda",
        "model.random_weights": True,
        "model.random_seed": SEED,
        "model.quantize": "fp8" if job.dtype == "fp8" else "",
        "model.max_model_tokens": scale.long_tokens + 2 * scale.new_tokens[1],
        "model.units": UNITS,
        "layout": "colocated",
        "prefill.max_wave_tokens": scale.long_tokens,
        "prefill.grant_timeout_s": LIMIT_S,
        "decode.max_batch": MAX_BATCH,
        "run_dir": str(folder),
    }
    return settle(load_config(None, options), look).config


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """An engine that has started, the thread that computes with it, and a client that waits for plans."""

    workers: Workers
    thread: StepThread
    client: asyncio.subprocess.Process
    folder: Path

    async def chunk_s(self, load: Load) -> float:
        """What one chunk of CHUNK_ROWS takes alone: a long prompt's time to its first token, by its number of chunks."""
        num_tokens = load.long_tokens or max(load.lengths)
        chunked = replace(load, mode="chunked", size=float(CHUNK_ROWS))
        asked = (Arrival(0.0, num_tokens, 1),)
        answers, _ = await self._answers(chunked, 0.0, warm=asked * 2, alone=asked * NUM_CHUNKED, arrivals=())
        if failures := [one.failure for one in answers if one.failure]:
            raise RuntimeError(f"a long prompt alone failed: {failures[0]}")
        return statistics.median(one.ttft_s for one in answers) / -(-num_tokens // CHUNK_ROWS)

    async def play(self, load: Load, chunk_s: float) -> LoadResult:
        """One point, from the start of its services to their end. Raises RuntimeError where the engine or the client breaks."""
        new_tokens = min(WARM_NEW_TOKENS, load.new_tokens[1])
        lengths = dict.fromkeys((*load.lengths, *([load.long_tokens] if load.long_tokens else [])))
        warm = tuple(Arrival(0.0, length, new_tokens) for length in lengths) * 2  # once to be measured by the policy, once as measured
        alone = (Arrival(0.0, min(load.lengths), 1),) * (NUM_ALONE if load.long_tokens else 0)
        answers, spans = await self._answers(load, chunk_s, warm=warm, alone=alone, arrivals=arrivals_of(load))
        return load_result(load, chunk_s, answers, waves_in(spans) if spans is not None else ())

    async def _answers(
        self, load: Load, chunk_s: float, *, warm: tuple[Arrival, ...], alone: tuple[Arrival, ...], arrivals: tuple[Arrival, ...]
    ) -> tuple[list[Answer], Path | None]:
        is_traced = bool(load.long_tokens and arrivals)
        spans = Path(tempfile.mkdtemp(prefix="spans-", dir=self.folder)) if is_traced else None
        options = load.options(chunk_s) | {"tracing.directory": None if spans is None else str(spans)}
        config = changed(self.workers.config, options, f"the load {load.name!r}")
        async with _serving(replace(self.workers, config=config), self.thread) as engine:
            plan = ClientPlan(
                prefill=_address(engine.prefill),
                decode=_address(engine.decode),
                fingerprint=self.workers.decode.config.fingerprint,
                secret=config.wire.secret,
                vocab=self.workers.decode.config.vocab,
                trace_name=load.trace_name,
                warm=warm,
                alone=alone,
                arrivals=arrivals,
                load_s=load.load_s,
                limit_s=LIMIT_S,
                is_traced=is_traced,
                backlog_tokens=load.long_tokens if arrivals else 0,
                num_backlog=load.backlog if arrivals else 0,
            )
            return await self._played(plan), spans

    async def _played(self, plan: ClientPlan) -> list[Answer]:
        """By the client process."""
        asked, out = self.folder / "plan.json", self.folder / "answers.json"
        asked.write_text(json.dumps(plan.as_json()))
        out.unlink(missing_ok=True)
        assert self.client.stdin is not None and self.client.stdout is not None
        self.client.stdin.write(json.dumps([str(asked), str(out)]).encode() + b"\n")
        await self.client.stdin.drain()
        if await self.client.stdout.readline() != b"done\n":
            raise RuntimeError(f"the client ended in a load: {plan.trace_name}")
        return answers_from_json(json.loads(out.read_text()))


async def _started(config: DuomoConfig, means: EngineMeans) -> Workers:
    """A GPU's with routing spread over all experts (engine_cases.py): of few, chunks would read too little again."""
    if config.model.device != "cuda":
        return await started_workers(config, means)
    return await means.thread.run("step", _spread_gpu_workers, config)


def _spread_gpu_workers(config: DuomoConfig) -> Workers:
    """In the step thread: who captures and plans is who runs."""
    import torch

    from services.gpu_workers import start_gpu_workers  # Triton and all kernels: a CPU serves without

    made = start_gpu_workers(config, Startup())
    with torch.inference_mode():
        made.engine.prefill.decoder.weights.embed_VD.mul_(embedding_factor("drawn", "spread"))
    freeze_started()  # as a replica's process does
    return Workers(prefill=made.prefill, decode=made.decode, config=made.config, close=made.engine.compilations.close)


@asynccontextmanager
async def stage(config: DuomoConfig, folder: Path) -> AsyncIterator[Stage]:
    """Start engine and client; end both. Raises what the engine's start raises."""
    thread = StepThread("engine-step")
    off = tracing.configure(SPANS_OFF, "duomo-bench")
    workers: Workers | None = None
    client: asyncio.subprocess.Process | None = None
    try:
        workers = await _started(config, EngineMeans(thread=thread, prefill_spans=off, decode_spans=off))
        client = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "bench.engine.arrivals_client", cwd=ROOT, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )  # fmt: skip
        yield Stage(workers=workers, thread=thread, client=client, folder=folder)
    finally:
        if client is not None and client.returncode is None:
            client.kill()
            await client.wait()
        await asyncio.to_thread(thread.close)
        if workers is not None:
            workers.close()


@asynccontextmanager
async def _serving(workers: Workers, thread: StepThread) -> AsyncIterator[Engine]:
    """Both services over the workers; at the end nothing may be left of any request: the next load's services find all blocks free."""
    spans = tracing.configure(workers.config.tracing, "duomo-prefill", "prefill", "engine-0.prefill")
    off = tracing.configure(SPANS_OFF, "duomo-bench")
    engine = engine_of(workers, "engine-0", EngineMeans(thread=thread, prefill_spans=spans, decode_spans=off))
    try:
        await engine.start()
        yield engine
        await _at_rest(engine)
    finally:
        await engine.stop()
        await asyncio.to_thread(spans.shutdown)


async def _at_rest(engine: Engine) -> None:
    def rests() -> bool:
        report = engine.decode.report()
        is_over = not (engine.prefill.num_live_requests() or engine.decode.num_live_requests())
        return is_over and report.num_free_blocks + report.num_cached_blocks == report.num_blocks

    deadline_s = time.monotonic() + REST_LIMIT_S
    while not rests():
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"the engine does not come to rest: {engine.prefill.report()} {engine.decode.report()}")
        await asyncio.sleep(0.01)
    engine.prefill.check_health()
    engine.decode.check_health()
    await asyncio.sleep(SETTLE_S)


def _address(service: PrefillService | DecodeService) -> PeerAddress:
    identity = service.membership.identity
    return PeerAddress(replica_id=identity.replica_id, boot_id=identity.boot_id, address=identity.address)


async def play_all(config: DuomoConfig, folder: Path, loads: Sequence[Load], part: Part, until_s: float, save: Callable[[], None]) -> None:
    """Every load in its order, as long as there is time: one that would begin after until_s (monotonic) is left out and named."""
    started_s = time.monotonic()
    async with stage(config, folder) as made:
        part.facts["ready_s"] = round(time.monotonic() - started_s, 1)
        part.facts["num_blocks"] = made.workers.config.decode.num_blocks
        chunk_s = await made.chunk_s(loads[0])
        part.facts["chunk_s"] = round(chunk_s, 7)
        save()
        for load in loads:
            if time.monotonic() > until_s:
                part.left_out.append(f"{part.job.name} {load.name}: no time")
                continue
            began_s = time.monotonic()
            found = await made.play(load, chunk_s)
            part.loads.append(found)
            save()
            print(f"{part.job.name} {load.name}: {time.monotonic() - began_s:.1f} s, {found}", flush=True)


def measure_job(job: Job, part: Part, out: Path, deadline_s: float) -> None:
    """All loads of the job in this process; the part is written after each."""
    folder = Path(tempfile.mkdtemp(prefix="duomo-b-"))  # short: it holds sockets
    part.facts |= facts("prefill", job.repeats) | {"routing": "spread"}
    loads = [load for load in loads_of(SCALES[job.model]) if load.name in job.loads]
    asyncio.run(play_all(gpu_config(job, folder), folder, loads, part, deadline_s, lambda: part.write(out)))
    part.write(out)


if __name__ == "__main__":
    sys.exit(run_job(measure_job))
