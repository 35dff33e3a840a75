"""What the gateway costs, its engines stubbed at the wire: time added to the first token and to the gaps, CPU a token, memory.

    duomo bench gateway --repeats 5 --out bench/results/gateway_cpu.json
    duomo bench gateway --peer litellm=/path/to/bin/litellm --memory-minutes 10 --out bench/results/gateway_cpu.json

Gateway, stub and client are three processes. The gateway is the shipped one (`duomo replica router`, default options); the stub speaks the
real wire as a prefill and a decode replica in a real directory (stub_engine.py); the client notes bytes and times and reads them later.
A peer gets the same requests, and behind it a stub that says the same over HTTP; `bare` is that stub alone: what the measuring itself adds.
Whoever says one wrong character, or not one event for each token, is not reported on: the run ends with exit code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from bench.axes import draw_beside
from bench.serve.gateway_figures import (
    Cost,
    WrongBytes,
    added_gaps_s,
    added_ttft_s,
    check_counts,
    check_streams,
    delays_s,
    quantiles_ms,
    tokens_between,
    without_silent,
)
from bench.serve.gateway_sides import MODEL, Side, bare_side, duomo_side, free_port, litellm_side
from bench.serve.host_facts import commit, cpu_name
from bench.serve.soak_verdicts import line_of, memory_verdict
from bench.serve.soak_watch import PERIOD_S, Watch
from bench.serve.sse_load import STARTED, Asking, SeenStream, run_load
from bench.serve.stub_story import StubStory

PROMPT_TOKENS: Final = 128
TTFT_TOKENS: Final = 1  # nothing but a first token: the next request follows at once
QUIET_S: Final = 0.02  # before each of the second half: caches are colder then, the more so the more else the machine does
NEW_TOKENS: Final = (192, 256, 320, 224, 288)  # so that streams begin and end all the time, as a live gateway's do
CLIENT_START_S: Final = 60.0
TARGETS: Final = {"added_ttft_p50_ms": 1.5, "tokens_per_cpu_s": 20_000, "added_gap_p99_ms": 10.0}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The command line."""

    repeats: int
    streams: int
    seconds: float
    warm_s: float
    step_s: float
    ttft_requests: int
    memory_minutes: float
    peers: dict[str, Path]
    beside: str
    out: Path | None


@dataclass(frozen=True, kw_only=True)
class Repeat:
    """One server, once. added_ttft: of requests one after another, and of some QUIET_S after the one before. Milliseconds.

    load_1m: the machine's load average while it ran, this benchmark's three processes included.
    """

    added_ttft_ms: dict[str, float]
    added_ttft_after_quiet_ms: dict[str, float]
    added_gap_ms: dict[str, float]
    delay_ms: dict[str, float]
    window_s: float
    cpu_s: float
    num_tokens: int
    tokens_per_cpu_s: float
    rate_share: float
    rss_bytes: int
    load_1m: float


class Bench:
    """One run's requests: seeds are never used twice."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._story = StubStory(MODEL)
        self._prompt = self._story.prompt(PROMPT_TOKENS)
        self._next_seed = 1

    def repeat(self, side: Side, *, is_ours: bool) -> Repeat:
        asked = self._asked
        light: dict[str, Any] = {"new_tokens": (TTFT_TOKENS,), "num_streams": 1, "num_requests": asked.ttft_requests}
        with self._client(side, **light) as client:
            one_by_one = client()
        with self._client(side, pause_s=QUIET_S, **light) as client:
            after_quiet = client()
        with self._client(side, new_tokens=NEW_TOKENS, num_streams=asked.streams, duration_s=asked.warm_s + asked.seconds) as client:
            time.sleep(asked.warm_s)
            start_s, start_cpu_s = time.monotonic(), side.cpu_s()
            time.sleep(asked.seconds)
            end_s, end_cpu_s = time.monotonic(), side.cpu_s()
            rss_bytes = side.rss_bytes()
            together = client()
        records = side.stub.take_records()
        everything = [*one_by_one, *after_quiet, *together]
        check_streams(everything, self._story, PROMPT_TOKENS if is_ours else None)
        if not is_ours:
            everything, records = without_silent(everything, records, self._story)
            one_by_one, after_quiet = everything[: len(one_by_one)], everything[len(one_by_one) : len(one_by_one) + len(after_quiet)]
            together = everything[len(one_by_one) + len(after_quiet) :]
        check_counts(everything, records)
        cost = Cost(window_s=end_s - start_s, cpu_s=end_cpu_s - start_cpu_s, num_tokens=tokens_between(together, start_s, end_s))
        return Repeat(
            added_ttft_ms=quantiles_ms(added_ttft_s(one_by_one, records)),
            added_ttft_after_quiet_ms=quantiles_ms(added_ttft_s(after_quiet, records)),
            added_gap_ms=quantiles_ms(added_gaps_s(together, records)),
            delay_ms=quantiles_ms(delays_s(together, records)),
            **asdict(cost),
            tokens_per_cpu_s=cost.tokens_per_cpu_s,
            rate_share=cost.num_tokens / (asked.streams * cost.window_s / asked.step_s),
            rss_bytes=rss_bytes,
            load_1m=os.getloadavg()[0],
        )

    def memory(self, side: Side) -> dict[str, Any]:
        """All streams for so many minutes: RSS and PSS of the gateway every few seconds, and whether they are flat."""
        duration_s = 60 * self._asked.memory_minutes
        watch, samples = Watch([side.pid], None), []
        num_requests = 0
        asking = {"new_tokens": NEW_TOKENS, "num_streams": self._asked.streams, "duration_s": duration_s}
        with self._client(side, reads_at_once=True, **asking) as client:
            start_s = time.monotonic()
            while (now_s := time.monotonic()) < start_s + duration_s:
                sample = watch.take(now_s)
                samples.append(replace(sample, at_s=now_s - start_s))
                num_requests += len(side.stub.take_records())
                time.sleep(PERIOD_S)
            streams = client()
        check_streams(streams, self._story, PROMPT_TOKENS)
        num_requests += len(side.stub.take_records())
        if num_requests != len(streams):
            raise WrongBytes(f"{len(streams)} streams were read whole, of {num_requests} that the stub served")
        line = line_of([one.at_s for one in samples], [one.rss_bytes[side.pid] for one in samples], 0.0, duration_s)
        verdict = memory_verdict("RSS of the gateway", line)
        return {
            "minutes": self._asked.memory_minutes,
            "num_streams_read": len(streams),
            "num_tokens": sum(stream.num_completion_tokens for stream in streams),
            "verdict": verdict.line(),
            "is_flat": verdict.passed,
            "samples": [{"at_s": one.at_s, "rss": one.rss_bytes[side.pid], "pss": one.pss_bytes.get(side.pid)} for one in samples],
        }

    @contextlib.contextmanager
    def _client(self, side: Side, *, reads_at_once: bool = False, **asking: Any) -> Iterator[Callable[[], list[SeenStream]]]:
        """A client process at work; what is yielded waits for its end and gives what it saw. Raises WrongBytes."""
        plan = Asking(url=side.url, model=MODEL.name, prompt=self._prompt, first_seed=self._next_seed, **asking)
        self._next_seed += 1_000_000
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=run_load, args=(plan, reads_at_once, there), daemon=True)
        process.start()
        there.close()
        if not here.poll(CLIENT_START_S) or here.recv() != STARTED:
            raise WrongBytes(f"the client process did not start in {CLIENT_START_S:g} s")

        def result() -> list[SeenStream]:
            try:
                seen: list[SeenStream] | str = here.recv()
            except EOFError:
                raise WrongBytes("the client process ended without an answer") from None
            if isinstance(seen, str):
                raise WrongBytes(seen)
            return seen

        try:
            yield result
        finally:
            process.join(30)


def sides(asked: Asked) -> dict[str, Callable[[], contextlib.AbstractContextManager[Side]]]:
    """Who is measured, by name."""
    found: dict[str, Callable[[], contextlib.AbstractContextManager[Side]]] = {
        "duomo": lambda: duomo_side(asked.step_s, free_port()),
        "bare": lambda: bare_side(asked.step_s, free_port()),
    }
    for name, program in asked.peers.items():
        found[name] = partial(_litellm, program, asked.step_s)
    return found


def _litellm(program: Path, step_s: float) -> contextlib.AbstractContextManager[Side]:
    return litellm_side(program, step_s, free_port(), free_port())


def run(asked: Asked) -> dict[str, Any]:
    """All sides in turn, repeat by repeat, so that what else the machine does falls on all. Raises WrongBytes."""
    bench = Bench(asked)
    repeats: dict[str, list[Repeat]] = {name: [] for name in sides(asked)}
    memory = None
    for number in range(asked.repeats):
        for name, start in sides(asked).items():
            with start() as side:
                repeats[name].append(bench.repeat(side, is_ours=name == "duomo"))
            print(line_of_repeat(name, number, repeats[name][-1]), flush=True)
    if asked.memory_minutes:
        with duomo_side(asked.step_s, free_port()) as side:
            memory = bench.memory(side)
        print(memory["verdict"], flush=True)
    return report(asked, repeats, memory)


def line_of_repeat(name: str, number: int, repeat: Repeat) -> str:
    return (
        f"{name:>8} {number}: TTFT +{repeat.added_ttft_ms['p50']:.2f} ms p50, +{repeat.added_ttft_ms['p99']:.2f} p99 "
        f"(+{repeat.added_ttft_after_quiet_ms['p50']:.2f} p50 after quiet); gap "
        f"+{repeat.added_gap_ms['p99']:.2f} ms p99; {repeat.tokens_per_cpu_s:,.0f} tokens per CPU second, {repeat.rate_share:.0%} of the "
        f"rate asked; {repeat.rss_bytes / 2**20:.0f} MiB; load {repeat.load_1m:.1f}"
    )


def report(asked: Asked, repeats: dict[str, list[Repeat]], memory: dict[str, Any] | None) -> dict[str, Any]:
    """What goes into the file: medians over repeats, every repeat, and how they stand to the targets."""
    medians = {
        name: {
            "added_ttft_p50_ms": statistics.median(one.added_ttft_ms["p50"] for one in rows),
            "added_ttft_after_quiet_p50_ms": statistics.median(one.added_ttft_after_quiet_ms["p50"] for one in rows),
            "added_ttft_p99_ms": statistics.median(one.added_ttft_ms["p99"] for one in rows),
            "added_gap_p99_ms": statistics.median(one.added_gap_ms["p99"] for one in rows),
            "delay_p50_ms": statistics.median(one.delay_ms["p50"] for one in rows),
            "tokens_per_cpu_s": statistics.median(one.tokens_per_cpu_s for one in rows),
            "rate_share": statistics.median(one.rate_share for one in rows),
            "rss_bytes": statistics.median(one.rss_bytes for one in rows),
        }
        for name, rows in repeats.items()
        if rows
    }
    ours = medians.get("duomo", {})
    met = {name: ours[name] >= target if name == "tokens_per_cpu_s" else ours[name] <= target for name, target in TARGETS.items() if ours}
    return {
        "benchmark": "gateway",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "beside": asked.beside,
        "python": sys.version.split()[0],
        "versions": {name: version(name) for name in ("uvicorn", "uvloop", "httptools", "fastapi", "msgspec", "tokenizers")},
        "peers": {name: peer_version(program) for name, program in asked.peers.items()},
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "streams": asked.streams,
        "step_s": asked.step_s,
        "seconds": asked.seconds,
        "ttft_requests": asked.ttft_requests,
        "targets": TARGETS,
        "met": met | ({} if memory is None else {"memory_is_flat": memory["is_flat"]}),
        "medians": medians,
        "repeats": {name: [asdict(one) for one in rows] for name, rows in repeats.items()},
        "memory": memory,
    }


def peer_version(program: Path) -> str:
    """Of the distribution of that name in the program's own environment."""
    found = sorted(program.resolve().parents[1].glob(f"lib/python*/site-packages/{program.name}-*.dist-info"))
    return found[0].name.removeprefix(f"{program.name}-").removesuffix(".dist-info") if found else "unknown"


def parse(arguments: list[str]) -> Asked:
    parser = argparse.ArgumentParser(prog="duomo bench gateway", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="0: memory alone")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each repeat's window")
    parser.add_argument("--warm-seconds", type=float, default=4.0, help="before each window, not counted")
    parser.add_argument("--step-ms", type=float, default=20.0, help="the stub's decode step")
    parser.add_argument("--ttft-requests", type=int, default=200, help="one after another, for the time to the first token")
    parser.add_argument("--memory-minutes", type=float, default=0.0, help="then all streams for so long, for the gateway's memory")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="litellm=PROGRAM", help="another gateway in the same run; repeatable"
    )
    parser.add_argument("--beside", default="nothing", help="what else the machine does meanwhile: goes into the file")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    peers = dict(peer.partition("=")[::2] for peer in options.peer)
    for name, program in peers.items():
        if name != "litellm" or not Path(program).is_file():
            parser.error(f"--peer {name}={program}: litellm=PROGRAM, where PROGRAM is litellm's own, such as /path/to/venv/bin/litellm")
    return Asked(
        repeats=options.repeats,
        streams=options.streams,
        seconds=options.seconds,
        warm_s=options.warm_seconds,
        step_s=options.step_ms / 1e3,
        ttft_requests=options.ttft_requests,
        memory_minutes=options.memory_minutes,
        peers={name: Path(program) for name, program in peers.items()},
        beside=options.beside,
        out=options.out,
    )


def main() -> int:
    asked = parse(sys.argv[1:])
    try:
        content = run(asked)
    except WrongBytes as error:
        print(f"refusing to report: {error}", file=sys.stderr)
        return 1
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(content, indent=1) + "\n")
        print(f"written: {asked.out}")
        from bench.serve.gateway_plot import draw

        draw_beside(asked.out, draw)
    print(f"met: {content['met']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
