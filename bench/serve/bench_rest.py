"""Tokens per second through REST against transformers' generate, start-up time and memory. Owns the run; knows only the public API.

    python bench/serve/bench_rest.py --out bench/results/rest_cpu.json

One run does, in this order: generate at batch 1 and 16 (the peer, alone on the machine, with one thread and with all), `duomo serve`
started (time to the first answer), one and 16 concurrent streams (every stream's tokens must equal generate's, or the run refuses to
report), memory (PSS of every process of the system), the peer once more. Ratios use the best of the peer's medians.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import httpx
import psutil
import torch

from bench.reference.tiny_moe import build_reference
from bench.serve.rest_client import StreamResult, completion_body, post

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "tiny-moe"
NEW_TOKENS = 128
PROMPT_TOKENS = 24
PEER_RUNS = tuple((streams, threads) for streams in (1, 16) for threads in sorted({1, os.cpu_count() or 1}))


@dataclass(frozen=True, kw_only=True)
class Rate:
    """One measurement: tokens per second of every repeat, and the median."""

    streams: int
    tokens_per_s: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.tokens_per_s)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One number of streams: medians over the repeats, and every repeat; the best of the peer's medians counts."""

    streams: int
    duomo_tokens_per_s: float
    peer_tokens_per_s: float
    ttft_p50_s: float
    duomo_repeats: list[float]
    peer_repeats: list[list[float]]

    @property
    def ratio(self) -> float:
        return self.duomo_tokens_per_s / self.peer_tokens_per_s


@dataclass(frozen=True, kw_only=True)
class Report:
    """A whole run."""

    rows: list[Row]
    ready_s: float
    pss_bytes: dict[str, int]


def prompts(count: int) -> list[list[int]]:
    """`count` different prompts of PROMPT_TOKENS token ids each (ids above the special ones)."""
    return [[5 + (37 * row + 11 * column * (row + 1)) % 8000 for column in range(PROMPT_TOKENS)] for row in range(count)]


def peer(model: torch.nn.Module, streams: int, repeats: int, threads: int) -> tuple[Rate, list[list[int]]]:
    """transformers.generate, greedy, NEW_TOKENS tokens, no EOS; prompts of one length, so that no padding is needed."""
    torch.set_num_threads(threads)
    ids = torch.tensor(prompts(streams))
    rates, tokens = [], None
    for _ in range(repeats):
        started = time.monotonic()
        with torch.inference_mode():
            out = model.generate(  # type: ignore[operator]  # GenerationMixin is not typed
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
            )
        rates.append(streams * NEW_TOKENS / (time.monotonic() - started))
        tokens = out[:, PROMPT_TOKENS:].tolist()
    assert tokens is not None
    return Rate(streams=streams, tokens_per_s=rates), tokens


def ours(url: str, streams: int, repeats: int, expected: list[list[int]]) -> tuple[Rate, list[float]]:
    """`streams` concurrent REST streams; refuses to go on when a stream's tokens differ from the peer's."""

    async def once() -> list[StreamResult]:
        bodies = [completion_body(prompt, NEW_TOKENS) for prompt in prompts(streams)]
        return list(await asyncio.gather(*(post(url, "/v1/completions", body) for body in bodies)))

    rates: list[float] = []
    ttfts: list[float] = []
    for _ in range(repeats):
        started = time.monotonic()
        results = asyncio.run(once())
        rates.append(streams * NEW_TOKENS / (time.monotonic() - started))
        ttfts.extend(result.ttft_s for result in results)
        wrong = [row for row, result in enumerate(results) if result.token_ids.get(0) != expected[row]]
        if wrong:
            raise SystemExit(f"refusing to report: streams {wrong} differ from transformers' tokens")
    return Rate(streams=streams, tokens_per_s=rates), ttfts


def start(port: int) -> tuple[subprocess.Popen[bytes], float]:
    """`duomo serve` and the seconds until it answers a request."""
    command = [sys.executable, "-m", "services.cli", "serve", str(MODEL), "--port", str(port)]
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


def commit() -> str:
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def run(repeats: int) -> Report:
    model = build_reference(MODEL)
    model.generation_config.eos_token_id = None  # min_new_tokens would forbid the EOS token instead of ignoring it
    peer(model, 1, 1, 1)
    peers: dict[int, list[Rate]] = {1: [], 16: []}
    expected: dict[int, list[list[int]]] = {}
    for streams, threads in PEER_RUNS:
        rate, expected[streams] = peer(model, streams, repeats, threads)
        peers[streams].append(rate)
    port = free_port()
    process, ready_s = start(port)
    try:
        url = f"http://127.0.0.1:{port}"
        measured = {streams: ours(url, streams, repeats, expected[streams]) for streams in (1, 16)}
        memory = pss_bytes(process.pid)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
    for streams, threads in PEER_RUNS:
        peers[streams].append(peer(model, streams, repeats, threads)[0])
    rows = [
        Row(
            streams=streams,
            duomo_tokens_per_s=rate.median,
            peer_tokens_per_s=max(one.median for one in peers[streams]),
            ttft_p50_s=statistics.median(ttfts),
            duomo_repeats=rate.tokens_per_s,
            peer_repeats=[one.tokens_per_s for one in peers[streams]],
        )
        for streams, (rate, ttfts) in measured.items()
    ]
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
        ours_text = f"{row.streams:>8} {row.duomo_tokens_per_s:>12.0f} {row.peer_tokens_per_s:>15.0f}"
        print(f"{ours_text} {row.ratio:>6.2f} {1000 * row.ttft_p50_s:>12.1f}")
    print(f"ready after {report.ready_s:.1f} s; PSS {pss_total / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
