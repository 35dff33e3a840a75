"""The first decode step behind an idle time, beside steps launched behind one another: what its launch costs, and a rehearsal spares.

    export PYTHONPATH=.:kernels
    python bench/engine/bench_first_step.py bench/engine/models/qwen3-30b-a3b --out bench/results/first_step_h100.json

One GPU, random weights, one sequence of 2,048 tokens, no other thread. Before each first step the thread sleeps and looks as a step
thread does while KV lands, the GPU kept awake. `over_ms`: the first step, from the call to its token on the host, less one of those that
follow.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from bench.gpu_stopwatch import facts
from duomo.engine.decode_step import DecodeLimits, DecodeRow, DecodeStep, Joining
from duomo.engine.gpu_decode import GpuDecode
from duomo.engine.gpu_kv_cache import GpuKvCache, gpu_kv_spec
from duomo.engine.sampler import RowSampling
from duomo.models.config import load_config
from duomo.models.gpu_decoder import GpuDecoder
from duomo.models.gpu_random import random_gpu_weights
from duomo.wire.values import Sampling

PROMPT_TOKENS = 2048
LOOK_S = 0.00005
NUM_BLOCKS = 512
FOLLOWING = 12
WARM_UPS = 3


def idle(seconds: float, awake: torch.Tensor) -> None:
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s:
        awake.add_(1)
        time.sleep(LOOK_S)


def step(at: int, source: int | Joining, table: list[int]) -> DecodeStep:
    return DecodeStep(rows=(DecodeRow(source=source, position=PROMPT_TOKENS + at, table=table),))


def one(decode: GpuDecode, seed: int, idle_s: float, rehearsed_s: float | None, awake: torch.Tensor) -> tuple[float, float, float]:
    """Seconds: the first step's launch, the first step, a step behind it (median). rehearsed_s: how long before; None: not at all."""
    sampling = Sampling(max_tokens=100, temperature=1.0, seed=seed)
    row = RowSampling(sampling=sampling, choice=0, prompt_ids=range(PROMPT_TOKENS), output_ids=[7])
    joins, table = Joining(token_id=7, sampling=row), list(range(PROMPT_TOKENS // decode.cache.spec.block_tokens + 2))
    torch.cuda.synchronize()
    idle(idle_s, awake)
    if rehearsed_s is not None:
        decode.rehearse(step(0, joins, table))
        idle(rehearsed_s, awake)
    torch.cuda.synchronize()
    called_s = time.perf_counter()
    pending = decode.launch(step(0, joins, table))
    launched_s = time.perf_counter()
    pending.wait()
    ends_s = [time.perf_counter()]
    pending = decode.launch(step(1, joins, table))
    for at in range(2, FOLLOWING + 2):
        following = decode.launch(step(at, 0, table))
        pending.wait()
        ends_s.append(time.perf_counter())
        pending = following
    pending.wait()
    steps_s = [after - before for before, after in zip(ends_s[2:], ends_s[3:], strict=False)]
    return launched_s - called_s, ends_s[0] - called_s, statistics.median(steps_s)


def measure(decode: GpuDecode, idle_s: float, rehearsed_s: float | None, repeats: int) -> dict[str, object]:
    awake = torch.zeros(1 << 20, device=decode.cache.device)
    times = [one(decode, seed, idle_s, rehearsed_s, awake) for seed in range(repeats + WARM_UPS)][WARM_UPS:]
    launch_ms, first_ms, step_ms = (round(1e3 * statistics.median(column), 3) for column in zip(*times, strict=True))
    told = {"idle_ms": 1e3 * idle_s, "rehearsed_ms_before": None if rehearsed_s is None else 1e3 * rehearsed_s}
    return told | {"launch_ms": launch_ms, "first_step_ms": first_ms, "step_ms": step_ms, "over_ms": round(first_ms - step_ms, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--without-rehearsal", action="store_true", help="also of engines that know none")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    device, config = torch.device("cuda", 0), load_config(asked.model)
    torch.cuda.set_device(device)
    decoder = GpuDecoder(random_gpu_weights(config, device=device))
    cache = GpuKvCache(gpu_kv_spec(config, dtype=decoder.weights.dtype), NUM_BLOCKS, device)
    decode = GpuDecode(decoder, cache, DecodeLimits(max_batch=8, max_model_tokens=9216))
    decode.capture()
    cases: list[tuple[float, float | None]] = [(0.0, None), (0.005, None), (0.04, None)]
    cases += [] if asked.without_rehearsal else [(0.04, 0.0003), (0.04, 0.001), (0.04, 0.002)]
    rows = [measure(decode, idle_s, rehearsed_s, asked.repeats) for idle_s, rehearsed_s in cases]
    for row in rows:
        print(json.dumps(row), flush=True)
    if asked.out is not None:
        told = {**facts("first_step", asked.repeats), "model": asked.model.name, "rows": rows}
        asked.out.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
