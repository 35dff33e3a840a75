"""Tokens per second through REST against transformers' generate, start-up time and memory. Owns the run; knows only the public API.

    python bench/serve/bench_rest.py --out bench/results/rest_cpu.json

`duomo serve` is started (time to the first answer); then, in turn: generate with one thread and with all (the peer, alone on the
machine: every process of the system is stopped by SIGSTOP meanwhile), and the same prompts through REST, whose tokens must equal
generate's, or the run refuses to report. A repeat's ratio is ours over the better of the peer's two; the median of the ratios counts,
since the speed of a shared machine drifts by more than the difference over minutes. Memory is the PSS of every process of the system,
after the load.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import httpx
import psutil
import torch

from bench.reference.tiny_moe import build_reference
from bench.serve.host_facts import ROOT, commit, cpu_name
from bench.serve.rest_client import StreamResult, completion_body, post

MODEL = ROOT / "models" / "tiny-moe"
NEW_TOKENS = 128
PROMPT_TOKENS = 24
SETTLE_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Repeat:
    """One turn: tokens per second of the peer by its number of threads, and ours right after it."""

    peer_tokens_per_s: dict[int, float]
    duomo_tokens_per_s: float
    ttft_p50_s: float

    @property
    def ratio(self) -> float:
        return self.duomo_tokens_per_s / max(self.peer_tokens_per_s.values())


@dataclass(frozen=True, kw_only=True)
class Row:
    """One number of streams."""

    streams: int
    repeats: list[Repeat]

    def median(self, figure: Callable[[Repeat], float]) -> float:
        return statistics.median(figure(repeat) for repeat in self.repeats)

    @property
    def ratio(self) -> float:
        return self.median(lambda repeat: repeat.ratio)


@dataclass(frozen=True, kw_only=True)
class Report:
    """A whole run."""

    rows: list[Row]
    ready_s: float
    pss_bytes: dict[str, int]


def prompts(count: int) -> list[list[int]]:
    """`count` different prompts of PROMPT_TOKENS token ids each (ids above the special ones)."""
    return [[5 + (37 * row + 11 * column * (row + 1)) % 8000 for column in range(PROMPT_TOKENS)] for row in range(count)]


def peer(model: torch.nn.Module, streams: int, threads: int) -> tuple[float, list[list[int]]]:
    """transformers.generate, greedy, NEW_TOKENS tokens, EOS ignored; prompts of one length, so that no padding is needed."""
    torch.set_num_threads(threads)
    ids = torch.tensor(prompts(streams))
    started = time.monotonic()
    with torch.inference_mode():
        out = model.generate(  # type: ignore[operator]  # GenerationMixin is not typed
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
        )
    return streams * NEW_TOKENS / (time.monotonic() - started), out[:, PROMPT_TOKENS:].tolist()


def ours(url: str, streams: int, expected: list[list[int]]) -> tuple[float, float]:
    """`streams` concurrent REST streams: tokens per second and the median TTFT. Refuses to go on when a token differs from the peer's."""

    async def once() -> list[StreamResult]:
        bodies = [completion_body(prompt, NEW_TOKENS) for prompt in prompts(streams)]
        return list(await asyncio.gather(*(post(url, "/v1/completions", body) for body in bodies)))

    started = time.monotonic()
    results = asyncio.run(once())
    rate = streams * NEW_TOKENS / (time.monotonic() - started)
    wrong = [row for row, result in enumerate(results) if result.token_ids.get(0) != expected[row]]
    if wrong:
        raise SystemExit(f"refusing to report: streams {wrong} differ from transformers' tokens")
    return rate, statistics.median(result.ttft_s for result in results)


@contextmanager
def stopped(root_pid: int) -> Iterator[None]:
    """Every process of the tree is stopped meanwhile, for a few seconds: less than any of the system's time limits."""
    root = psutil.Process(root_pid)
    tree = [root, *root.children(recursive=True)]
    for process in tree:
        process.suspend()
    try:
        yield
    finally:
        for process in tree:
            process.resume()
        time.sleep(SETTLE_S)


def one_repeat(model: torch.nn.Module, root_pid: int, url: str, streams: int) -> Repeat:
    """The peer alone, then ours."""
    rates: dict[int, float] = {}
    expected: list[list[int]] = []
    for threads in sorted({1, os.cpu_count() or 1}):
        with stopped(root_pid):
            rates[threads], expected = peer(model, streams, threads)
    rate, ttft_s = ours(url, streams, expected)
    return Repeat(peer_tokens_per_s=rates, duomo_tokens_per_s=rate, ttft_p50_s=ttft_s)


def start(port: int) -> tuple[subprocess.Popen[bytes], float]:
    """`duomo serve` and the seconds until it answers a request."""
    command = [sys.executable, "-m", "services.cli", "serve", str(MODEL), "--port", str(port)]
    command += [part for pool in ("prefill", "decode") for part in ("--set", f"{pool}.prefix_cache_blocks=0")]  # repeats ask the same
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    started = time.monotonic()
    process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)
    while time.monotonic() - started < 120:
        if process.poll() is not None:
            raise SystemExit(f"duomo serve ended with {process.returncode}")
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health/ready", timeout=2).status_code == 200:
                body = completion_body(prompts(1)[0], 8)
                assert asyncio.run(post(f"http://127.0.0.1:{port}", "/v1/completions", body)).is_done
                return process, time.monotonic() - started
        except httpx.HTTPError:
            time.sleep(0.1)
    raise SystemExit("duomo serve did not become ready in 120 s")


def pss_bytes(root_pid: int) -> dict[str, int]:
    """PSS by process name over the whole tree of `root_pid`."""
    totals: dict[str, int] = {}
    parent = psutil.Process(root_pid)
    for process in [parent, *parent.children(recursive=True)]:
        try:
            totals[process.name()] = totals.get(process.name(), 0) + process.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue
    return totals


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(num_repeats: int) -> Report:
    model = build_reference(MODEL)
    model.generation_config.eos_token_id = None  # min_new_tokens would forbid the EOS token instead of ignoring it
    port = free_port()
    process, ready_s = start(port)
    try:
        one_repeat(model, process.pid, f"http://127.0.0.1:{port}", 1)
        rows = []
        for streams in (1, 16):
            repeats = [one_repeat(model, process.pid, f"http://127.0.0.1:{port}", streams) for _ in range(num_repeats)]
            rows.append(Row(streams=streams, repeats=repeats))
        memory = pss_bytes(process.pid)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
    return Report(rows=rows, ready_s=ready_s, pss_bytes=memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    report = run(options.repeats)
    pss_total = sum(report.pss_bytes.values())
    facts = {
        "benchmark": "rest",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "new_tokens": NEW_TOKENS,
        "repeats": options.repeats,
        "pss_total_bytes": pss_total,
        "ratios": {row.streams: row.ratio for row in report.rows},
    }
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(facts | asdict(report), indent=2) + "\n")
    print(f"{'streams':>8} {'duomo tok/s':>12} {'generate tok/s':>15} {'ratio':>6} {'TTFT p50 ms':>12}")
    for row in report.rows:
        best = row.median(lambda repeat: max(repeat.peer_tokens_per_s.values()))
        rates = f"{row.streams:>8} {row.median(lambda repeat: repeat.duomo_tokens_per_s):>12.0f} {best:>15.0f}"
        print(f"{rates} {row.ratio:>6.2f} {1000 * row.median(lambda repeat: repeat.ttft_p50_s):>12.1f}")
    print(f"ready after {report.ready_s:.1f} s; PSS {pss_total / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
