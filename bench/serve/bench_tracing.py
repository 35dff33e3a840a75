"""What tracing costs: tokens per second of 16 streams with spans written to files, and without. Owns the run; knows only the public API.

    python bench/serve/bench_tracing.py --out bench/results/tracing_cpu.json

Two systems live side by side, equal but for `tracing.directory`; only one of them is asked at a time. Repeats alternate (off, on, on,
off, ...), so that whatever else the machine does falls on both; the ratio is that of the medians. Both must give the same tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import torch
import yaml

from bench.serve.bench_rest import MODEL, free_port, prompts
from bench.serve.host_facts import ROOT, commit, cpu_name
from bench.serve.rest_client import completion_body, post
from duomo.telemetry.span_file import read_spans
from services.kv_transfer.embedded_redis import EmbeddedRedis

STREAMS = 16
NEW_TOKENS = 64
READY_S = 120.0
STOP_S = 45.0


@contextlib.contextmanager
def system(span_dir: Path | None) -> Iterator[str]:
    """One router, prefill and decode process by `duomo replica`; yields the gateway's url. span_dir None: tracing off."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="duomo-bench-") as folder, contextlib.ExitStack() as ends:
        run_dir = Path(folder)
        redis = EmbeddedRedis(run_dir)
        redis.start()
        ends.callback(redis.stop)
        told = {
            "run_dir": folder,
            "model": {"path": str(MODEL)},
            "gateway": {"port": port},
            "redis": {"url": redis.url},
            "tracing": {"directory": None if span_dir is None else str(span_dir)},
        }
        config = run_dir / "duomo.yaml"
        config.write_text(yaml.safe_dump(told))
        environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        processes: list[subprocess.Popen[bytes]] = []
        ends.callback(stop, processes)
        for role in ("router", "prefill", "decode"):
            command = [sys.executable, "-m", "services.cli", "replica", role, "--config", str(config), "--id", f"{role}-0"]
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        url = f"http://127.0.0.1:{port}"
        wait_ready(url, processes)
        yield url


def stop(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.send_signal(signal.SIGINT)
    for process in processes:
        process.wait(STOP_S)


def wait_ready(url: str, processes: list[subprocess.Popen[bytes]]) -> None:
    end_s = time.monotonic() + READY_S
    while time.monotonic() < end_s:
        ended = [process.returncode for process in processes if process.poll() is not None]
        if ended:
            raise SystemExit(f"a replica ended with {ended[0]}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health/ready", timeout=2).status_code == 200:
                return
        time.sleep(0.1)
    raise SystemExit(f"the system did not become ready in {READY_S:g} s")


def tokens_per_s(url: str) -> tuple[float, list[list[int]]]:
    """STREAMS concurrent streams, and what each of them said."""

    async def once() -> list[list[int]]:
        bodies = [completion_body(prompt, NEW_TOKENS) for prompt in prompts(STREAMS)]
        results = await asyncio.gather(*(post(url, "/v1/completions", body) for body in bodies))
        return [result.token_ids.get(0, []) for result in results]

    started = time.monotonic()
    tokens = asyncio.run(once())
    rate = STREAMS * NEW_TOKENS / (time.monotonic() - started)
    if any(len(ids) != NEW_TOKENS for ids in tokens):
        raise SystemExit("refusing to report: a stream is not whole")
    return rate, tokens


def run(repeats: int) -> tuple[dict[str, list[float]], int]:
    """Tokens per second with tracing off and on, and how many spans were written meanwhile."""
    rates: dict[str, list[float]] = {"off": [], "on": []}
    with tempfile.TemporaryDirectory(prefix="duomo-spans-") as folder, system(None) as off, system(Path(folder)) as on:
        urls = {"off": off, "on": on}
        expected = {name: tokens_per_s(url)[1] for name, url in urls.items()}  # warms both
        if expected["off"] != expected["on"]:
            raise SystemExit("refusing to report: tracing changes tokens")
        for repeat in range(repeats):
            for name in ("off", "on") if repeat % 2 == 0 else ("on", "off"):
                rate, tokens = tokens_per_s(urls[name])
                if tokens != expected[name]:
                    raise SystemExit("refusing to report: the tokens of a repeat differ")
                rates[name].append(rate)
        time.sleep(0.5)
        num_spans = len(read_spans(Path(folder)))
    if num_spans == 0:
        raise SystemExit("refusing to report: tracing was on and wrote nothing")
    return rates, num_spans


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rates, num_spans = run(options.repeats)
    off, on = statistics.median(rates["off"]), statistics.median(rates["on"])
    if options.out:
        facts = {
            "benchmark": "tracing",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "streams": STREAMS,
            "new_tokens": NEW_TOKENS,
            "repeats": options.repeats,
            "tokens_per_s": rates,
            "median_tokens_per_s": {"off": off, "on": on},
            "on_over_off": on / off,
            "num_spans": num_spans,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(facts, indent=2) + "\n")
    print(f"tracing off {off:.0f} tokens/s, on {on:.0f} tokens/s: {on / off:.3f} ({options.repeats} repeats, {num_spans} spans)")


if __name__ == "__main__":
    main()
