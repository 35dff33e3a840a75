"""Holds streams open against an OpenAI-compatible server for minutes: gaps between tokens, memory, counters. Owns the run, no server.

    duomo serve MODEL &
    duomo bench soak --url http://127.0.0.1:8000 --pid $! --out soak.json        # exit code 1 where a verdict is red

A stream that ends is followed by a new one, so that prompts are prefilled beside running sequences all the time: what a user sees then is
the gap between two events that bring tokens. Prompts and lengths are drawn from fixed seeds; greedy, EOS ignored. Any server of that API
will do (vLLM's too: counters are then not judged). What is judged, and by which bounds: soak_verdicts.py.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from bench.axes import draw_beside
from bench.serve.host_facts import commit, cpu_name
from bench.serve.server_facts import served_model
from bench.serve.soak_client import Load, run_client
from bench.serve.soak_verdicts import (
    MINUTE_S,
    Floats,
    Verdict,
    by_minute,
    client_verdict,
    counter_verdicts,
    itl_verdict,
    line_of,
    memory_verdict,
    spread,
)
from bench.serve.soak_watch import PERIOD_S, Sample, Watch, gpu_name

START_S = 4.0  # from the start of the client processes to the first stream: their imports, on busy cores too
RAMP_S = 5.0  # at the start, when all first prompts come at once: not counted
COLLECT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The command line."""

    load: Load
    num_clients: int
    pids: list[int]
    max_ratio: float
    has_plots: bool
    out: Path


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What all clients and the watch brought; gaps from start_s + RAMP_S on. Times monotonic."""

    start_s: float
    gap_end_s: Floats
    gap_s: Floats
    gap_tokens: Floats
    ttft_s: Floats
    lag_s: dict[str, Floats]
    cpu_share: dict[str, float]
    errors: list[str]
    num_errors: int
    num_finished: int
    samples: list[Sample]


def soak(asked: Asked) -> Seen:
    """Run it. Raises SystemExit where a client does not answer."""
    context = multiprocessing.get_context("spawn")
    start_s = time.monotonic() + START_S
    clients: list[tuple[Any, Connection]] = []
    for number in range(asked.num_clients):
        here, there = context.Pipe(duplex=False)
        slots = range(number, asked.load.num_streams, asked.num_clients)
        process = context.Process(target=run_client, args=(asked.load, slots, start_s, there), daemon=True)
        process.start()
        there.close()
        clients.append((process, here))
    samples = _watch(asked, start_s)
    answers = []
    for process, here in clients:
        if not here.poll(COLLECT_S):
            raise SystemExit(f"client process {process.pid} gave no answer in {COLLECT_S:.0f} s (exit code {process.exitcode})")
        answers.append(here.recv())
        process.join(COLLECT_S)
    return _joined(answers, start_s, samples)


def _watch(asked: Asked, start_s: float) -> list[Sample]:
    """Samples from the first stream on, at_s after start_s; the last one before the clients leave."""
    watch = Watch(asked.pids, f"{asked.load.url}/metrics")
    samples: list[Sample] = []
    due_s, end_s = start_s, start_s + asked.load.duration_s - 0.5
    while due_s <= end_s:
        time.sleep(max(0.0, due_s - time.monotonic()))
        sample = watch.take(time.monotonic())
        samples.append(replace(sample, at_s=sample.at_s - start_s))
        if due_s == end_s:
            break
        due_s = min(end_s, max(due_s + PERIOD_S, time.monotonic()))
    return samples


def _joined(answers: Sequence[tuple[dict[str, Floats], dict[str, Any]]], start_s: float, samples: list[Sample]) -> Seen:
    joined = {name: np.concatenate([arrays[name] for arrays, _ in answers]) for name in answers[0][0]}
    counts = joined["gap_end_s"] >= start_s + RAMP_S
    counts_first = joined["first_s"] >= start_s + RAMP_S
    return Seen(
        start_s=start_s,
        gap_end_s=joined["gap_end_s"][counts],
        gap_s=joined["gap_s"][counts],
        gap_tokens=joined["gap_tokens"][counts],
        ttft_s=joined["ttft_s"][counts_first],
        lag_s={str(number): arrays["lag_s"] for number, (arrays, _) in enumerate(answers)},
        cpu_share={str(number): facts["cpu_share"] for number, (_, facts) in enumerate(answers)},
        errors=[error for _, facts in answers for error in facts["errors"]],
        num_errors=sum(facts["num_errors"] for _, facts in answers),
        num_finished=sum(facts["finished"] for _, facts in answers),
        samples=samples,
    )


def verdicts(seen: Seen, asked: Asked) -> list[Verdict]:
    duration_s = asked.load.duration_s
    total = spread(seen.gap_s, seen.gap_tokens, duration_s - RAMP_S)
    answer = [
        itl_verdict(total, asked.max_ratio),
        Verdict(name="streams", passed=seen.num_errors == 0, figures=f"{seen.num_finished} whole, {seen.num_errors} failed"),
        client_verdict(seen.lag_s, seen.cpu_share),
    ]
    for pid in asked.pids:
        points = [(sample.at_s, sample.rss_bytes[pid]) for sample in seen.samples if pid in sample.rss_bytes]
        line = line_of([at for at, _ in points], [value for _, value in points], 0.0, duration_s)
        gone = len(points) < len(seen.samples)
        answer.append(Verdict(name=f"RSS of {pid}", passed=False, figures="it ended") if gone else memory_verdict(f"RSS of {pid}", line))
    on_gpu = [(sample.at_s, sample.gpu_bytes) for sample in seen.samples if sample.gpu_bytes is not None]
    if on_gpu:
        answer.append(memory_verdict("GPU memory", line_of([at for at, _ in on_gpu], [value for _, value in on_gpu], 0.0, duration_s)))
    told = [sample.counters for sample in seen.samples if sample.counters is not None]
    return answer + counter_verdicts(*((told[0], told[-1]) if told else (None, None)))


def report(seen: Seen, asked: Asked) -> tuple[dict[str, Any], list[Verdict]]:
    """What goes into the file, and the verdicts."""
    found = verdicts(seen, asked)
    duration_s = asked.load.duration_s
    total = spread(seen.gap_s, seen.gap_tokens, duration_s - RAMP_S)
    minutes = by_minute(seen.gap_end_s, seen.gap_s, seen.gap_tokens, seen.start_s + RAMP_S, seen.start_s + duration_s)
    content = {
        "benchmark": "soak",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": gpu_name() or cpu_name(),
        "cores": os.cpu_count(),
        "asked": asdict(asked.load) | {"num_clients": asked.num_clients, "max_ratio": asked.max_ratio, "ramp_s": RAMP_S},
        "itl": asdict(total),
        "itl_by_minute": [asdict(minute) for minute in minutes],
        "events_with_several_tokens": int((seen.gap_tokens > 1).sum()),
        "ttft": asdict(spread(seen.ttft_s, np.ones_like(seen.ttft_s), duration_s - RAMP_S)),
        "client_lag": {name: asdict(spread(lag, np.ones_like(lag), duration_s)) for name, lag in seen.lag_s.items()},
        "client_cpu_share": seen.cpu_share,
        "finished": seen.num_finished,
        "num_errors": seen.num_errors,
        "errors": seen.errors,
        "rss_growth_by_name": growth_by_name(seen.samples),
        "samples": [asdict(sample) for sample in seen.samples],
        "verdicts": [verdict.line() for verdict in found],
        "is_red": any(verdict.passed is False for verdict in found),
    }
    return content, found


def growth_by_name(samples: Sequence[Sample]) -> dict[str, int]:
    """Bytes of RSS that processes of each name have more at the end than after the first minute, most first. Empty where it was shorter."""
    later = [sample.rss_by_name for sample in samples if sample.at_s >= MINUTE_S]
    if not later:
        return {}
    growth = {name: size - later[0].get(name, 0) for name, size in later[-1].items()}
    return dict(sorted(growth.items(), key=lambda item: -item[1]))


def print_report(content: dict[str, Any]) -> None:
    print(
        f"{'minute':>7} {'events':>9} {'tokens/s':>9}" + "".join(f" {name:>8}" for name in ("p50", "p90", "p99", "p99.9", "max")) + "   ms"
    )
    for name, row in [*enumerate(content["itl_by_minute"], 1), ("all", content["itl"]), ("TTFT", content["ttft"])]:
        times = [1e3 * each for each in (*row["quantile_s"].values(), row["max_s"])]
        print(f"{name:>7} {row['num_events']:>9,} {row['tokens_per_s']:>9,.0f}" + "".join(f" {each:>8.2f}" for each in times))
    grown = [f"{name} {more / 2**20:+.1f}" for name, more in list(content["rss_growth_by_name"].items())[:5]]
    print("\n".join([*content["errors"][:4], *content["verdicts"], f"RSS since the first minute, MiB: {', '.join(grown) or 'too short'}"]))


def parse(arguments: list[str]) -> Asked:
    parser = argparse.ArgumentParser(prog="duomo bench soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server, on this machine")
    parser.add_argument("--model", default="", help="name to ask for; left out: the first that /v1/models names")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--duration-s", type=float, default=600.0)
    parser.add_argument("--prompt-tokens", type=_range, default=(128, 1024), help="lo:hi")
    parser.add_argument("--new-tokens", type=_range, default=(512, 1024), help="lo:hi")
    parser.add_argument("--vocab", type=int, default=8000, help="prompt ids lie below")
    parser.add_argument("--clients", type=int, default=4, help="client processes")
    parser.add_argument("--pid", type=int, action="append", default=[], help="root of a process tree whose memory is watched; repeatable")
    parser.add_argument("--max-ratio", type=float, default=1.3, help="of p99 to p50 of the gaps between tokens")
    parser.add_argument("--no-plots", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("soak.json"))
    options = parser.parse_args(arguments)
    if not 1 <= options.clients <= options.streams:
        parser.error(f"--clients {options.clients}: from 1 to --streams, {options.streams}")
    if options.duration_s < 4 * RAMP_S:
        parser.error(f"--duration-s {options.duration_s:g}: at least {4 * RAMP_S:g}; the first {RAMP_S:g} s are not counted")
    if options.vocab <= 11:
        parser.error(f"--vocab {options.vocab}: above 11; prompts are drawn from 10 on")
    load = Load(
        url=options.url.rstrip("/"),
        model=options.model or served_model(options.url.rstrip("/")),
        num_streams=options.streams,
        duration_s=options.duration_s,
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        vocab=options.vocab,
    )
    return Asked(
        load=load,
        num_clients=options.clients,
        pids=options.pid,
        max_ratio=options.max_ratio,
        has_plots=not options.no_plots,
        out=options.out,
    )


def _range(text: str) -> tuple[int, int]:
    lo, _, hi = text.partition(":")
    if not (lo.isdigit() and hi.isdigit() and 2 <= int(lo) <= int(hi)):
        raise argparse.ArgumentTypeError(f"{text!r}: two whole numbers from 2 on, the smaller first, such as 128:1024")
    return int(lo), int(hi)


def main() -> int:
    asked = parse(sys.argv[1:])
    content, _ = report(soak(asked), asked)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(content, indent=1) + "\n")
    print_report(content)
    print(f"written: {asked.out}")
    if asked.has_plots:
        from bench.serve.soak_plot import draw

        draw_beside(asked.out, draw)
    return int(content["is_red"])


if __name__ == "__main__":
    sys.exit(main())
