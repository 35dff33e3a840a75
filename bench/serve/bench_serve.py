"""Owns a run of load on an OpenAI-compatible server: its order, what users saw and the file of it. Knows no server's inside, no socket.

    duomo serve MODEL &
    duomo bench serve --mix 2048:128 --rates 1,2,4,8 --duration-s 60 --out duomo.json
    duomo bench serve --url http://127.0.0.1:9000 --mix 2048:128 --search 0.5:32 --out vllm.json
    duomo bench serve --mix 2048:128 --search 0.5:32 --slo-from vllm.json --out duomo.json     # the other server's times as limits
    duomo bench serve --compare vllm.json duomo.json --out both.json                           # no load; both_pareto.png, both_goodput.png

Open loop: requests are sent when they are due (Poisson, constant, bursts, or a trace), so a server that falls behind is asked no slower.
First a warm-up, then each length alone (the unloaded times), then the loads. Goodput: requests/s that kept the limits. Exit code 1
where requests were sent too late for the figures to be the server's, or none was answered.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from bench.axes import draw_beside
from bench.serve import serve_compare, serve_report
from bench.serve.host_facts import commit, cpu_name
from bench.serve.serve_client import play_alone
from bench.serve.serve_figures import Figures, Seen, figures_of
from bench.serve.serve_limits import Limits, Unloaded
from bench.serve.serve_options import Asked, Comparison, parse
from bench.serve.serve_plan import Piece, Request, Workload, lengths_asked, requests_of
from bench.serve.serve_pool import ClientPool, clients
from bench.serve.serve_search import best_rate, finding, next_rate
from bench.serve.server_facts import Server, meet
from bench.serve.soak_verdicts import client_verdict
from bench.serve.soak_watch import gpu_name

TRACE_QUANTILES = (0.05, 0.5, 0.95, 1.0)  # of a trace's prompts, whose lengths are measured alone
TRACE_OUTPUT_TOKENS = 64  # of those, at most
SETTLE_S = 0.5  # after a load some of which was cut off: until the server knows, the next would share it with the rest
ALONE_S = 600.0  # limit of one request alone


@dataclass(frozen=True, kw_only=True)
class Point:
    """One load. rate: None is the trace's own. clients: the verdict on the processes that sent it."""

    rate: float | None
    asked: dict[str, float]
    figures: Figures
    clients: str
    were_clients_fine: bool

    @property
    def told_rate(self) -> float:
        return self.figures.offered_per_s if self.rate is None else self.rate

    def as_json(self) -> dict[str, Any]:
        return {"rate": round(self.told_rate, 6)} | {name: each for name, each in asdict(self).items() if name != "rate"}


class Run:
    """One server under one command line. `rows` is a file's lines, where they were asked for."""

    def __init__(self, asked: Asked, server: Server, pool: ClientPool) -> None:
        self._asked = asked
        self._target = server.target
        self._pool = pool
        self._load, self.notes = fitted(asked.load, server)
        self._num_loads = 0
        self.points: list[Point] = []
        self.unloaded: tuple[Unloaded, ...] = ()
        self.rows: list[str] = []

    def warm_up(self) -> None:
        if self._asked.warmup_s:
            _say(f"warm-up: {self._asked.warmup_s:g} s")
            self._play(self._asked.search.lowest if self._asked.search else self._asked.rates[0], self._asked.warmup_s)

    def measure_unloaded(self) -> None:
        """The first request of each length is not counted. Raises SystemExit where a length has none that ended whole."""
        found = {}
        for prompt_tokens, output_tokens in lengths_alone(self._load):
            keys = [f"{self._load.prompts_key} alone {prompt_tokens} {number}" for number in range(1 + self._asked.unloaded_requests)]
            requests = [Request(number, 0.0, output_tokens, (Piece(key, prompt_tokens),)) for number, key in enumerate(keys)]
            seen = [one for one in play_alone(self._target, requests, ALONE_S, _say)[1:] if not one.error]
            if not seen:
                raise SystemExit(f"requests of {prompt_tokens}:{output_tokens} tokens fail even alone; what they said stands above")
            alone = found[prompt_tokens] = unloaded_of(prompt_tokens, seen)
            _say(f"alone: {prompt_tokens} tokens, TTFT {1e3 * alone.ttft_s:.2f} ms, ITL {1e3 * alone.itl_s:.2f} ms")
        self.unloaded = tuple(found[length] for length in sorted(found))

    @property
    def limits(self) -> Limits:
        return Limits(ttft=self._asked.ttft, itl=self._asked.itl, unloaded=self._asked.limits_from or self.unloaded)

    def measure(self, keep: Callable[[], None]) -> None:
        """All loads. keep: called after each but the last, so that what was measured outlives whatever ends the run."""
        rate: float | None
        if self._asked.search is None:
            for number, rate in enumerate(self._asked.rates):
                if number:
                    keep()
                self._measure_at(rate)
            return
        while (rate := next_rate(self._asked.search, self._shares())) is not None:
            if self.points:
                keep()
            self._measure_at(rate)

    def found(self) -> str:
        """What a search found; "" where there was none."""
        return finding(self._asked.search, self._shares()) if self._asked.search else ""

    def best(self) -> Point | None:
        """The highest rate at which enough requests kept the limits, below all that failed where it was searched for."""
        tried = self._shares()
        if self._asked.search is not None:
            rate = best_rate(self._asked.search, tried)
        else:
            rate = max((rate for rate, share in tried.items() if share >= self._asked.share), default=None)
        return next((point for point in self.points if point.told_rate == rate), None)

    def _shares(self) -> dict[float, float]:
        """Of requests that kept the limits, by rate. No load has none that counts: it would not have been sent."""
        return {point.told_rate: point.figures.kept_share for point in self.points if point.figures.kept_share is not None}

    def _measure_at(self, rate: float | None) -> Point:
        point, seen = self._play(rate, self._asked.duration_s, is_counted=True)
        self.points.append(point)
        _say(serve_report.progress(point.as_json()))
        if self._asked.has_rows:
            self.rows += [json.dumps({"rate": point.told_rate} | asdict(one)) for one in sorted(seen, key=lambda one: one.index)]
        return point

    def _play(self, rate: float | None, duration_s: float, *, is_counted: bool = False) -> tuple[Point, list[Seen]]:
        """Raises SystemExit, before anything is sent, where figures of the load are wanted and no request counts for them."""
        self._num_loads += 1
        requests = requests_of(self._load, rate, duration_s, self._num_loads)
        ramp_s, end_s = window_of(requests, self._asked.ramp_s, duration_s, is_trace=bool(self._load.trace))
        if is_counted and requests[-1].due_s < ramp_s:
            raise SystemExit(
                f"no request in the window: at {rate or 1.0:g}/s for {duration_s:g} s the last is due at {requests[-1].due_s:.3g} s, and "
                f"the first {ramp_s:g} s are not counted; take a longer --duration-s, a higher rate or a shorter --ramp-s"
            )
        played = self._pool.play(self._target, requests, end_s + self._asked.drain_s)
        seen = [one for each in played for one in each.seen]
        if any(one.error for one in seen):
            time.sleep(SETTLE_S)
        lag_s = {str(number): np.asarray(each.lag_s) for number, each in enumerate(played)}
        verdict = client_verdict(lag_s, {str(number): each.cpu_share for number, each in enumerate(played)})
        is_kept = self.limits.are_kept_by if self.unloaded else None
        figures = figures_of(seen, ramp_s, end_s, is_kept)
        were_fine = figures.was_in_time and verdict.passed is True
        point = Point(rate=rate, asked=lengths_asked(requests), figures=figures, clients=verdict.figures, were_clients_fine=were_fine)
        return point, seen


def fitted(load: Workload, server: Server) -> tuple[Workload, tuple[str, ...]]:
    """The load without requests of a trace that the server's context cannot hold. Raises SystemExit where nothing or a mix does not fit."""
    context = server.context_tokens
    if context is None:
        return load, ()
    for shape in () if load.trace else load.mix:
        longest = round(shape.prompt_tokens * (1 + load.spread)) + round(shape.output_tokens * (1 + load.spread))
        if longest > context:
            raise SystemExit(f"--mix {shape.name}: up to {longest} tokens, and the server's context holds {context}")
    fit = tuple(row for row in load.trace if row.prompt_tokens + row.output_tokens <= context)
    if load.trace and not fit:
        raise SystemExit(f"--trace: no request fits the server's context of {context} tokens")
    left_out = len(load.trace) - len(fit)
    notes = (
        (f"{left_out} of {len(load.trace)} requests of the trace are left out: the server's context holds {context} tokens",)
        if left_out
        else ()
    )
    return replace(load, trace=fit), notes


def window_of(requests: Sequence[Request], ramp_s: float, duration_s: float, *, is_trace: bool) -> tuple[float, float]:
    """From when to when requests count, seconds since the load began: a trace's arrivals may end sooner than duration_s.

    Where a trace has one request or is one instant there is no ramp, and duration_s is the window: no time passes between its arrivals.
    """
    last_s = requests[-1].due_s
    if not is_trace:
        return min(ramp_s, duration_s / 2), duration_s
    return min(ramp_s, last_s / 2), last_s or duration_s


def lengths_alone(load: Workload) -> list[tuple[int, int]]:
    """(prompt, output) tokens of what is measured alone: each prompt of a mix with its longest answer, or a trace's quantiles."""
    found: dict[int, int] = {}
    if load.trace:
        lengths = [row.prompt_tokens for row in load.trace]
        output = int(min(TRACE_OUTPUT_TOKENS, max(2.0, float(np.median([row.output_tokens for row in load.trace])))))
        found = {int(np.quantile(lengths, share, method="nearest")): output for share in TRACE_QUANTILES}
    for shape in () if load.trace else load.mix:
        found[shape.prompt_tokens] = max(shape.output_tokens, found.get(shape.prompt_tokens, 0))
    return sorted(found.items())


def unloaded_of(prompt_tokens: int, seen: Sequence[Seen]) -> Unloaded:
    """Medians over requests, of gaps over all of them; where answers have one token, a gap is as long as a first token takes."""
    ttft_s = float(np.median([one.ttft_s for one in seen]))
    gaps = np.concatenate([one.gaps_s for one in seen])
    return Unloaded(prompt_tokens, round(ttft_s, 7), round(float(np.median(gaps)) if len(gaps) else ttft_s, 7))


def content_of(asked: Asked, server: Server, run: Run, *, has_ended: bool) -> dict[str, Any]:
    """What goes into the file; has_ended: all that was asked is in it."""
    limits, best = run.limits, run.best()
    return {
        "benchmark": "serve",
        "label": asked.label or asked.out.stem,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "host": {
            "device": gpu_name(),
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "kernel": platform.release(),
        },
        "server": {
            "urls": list(asked.urls),
            "version": server.version,
            "model": dict(server.model),
            "gpus": asked.num_gpus,
            "dialect": asdict(server.target.dialect),
        },
        "command": asked.command,
        "asked": _plain(asked),
        "salt": asked.load.salt,
        "notes": [*server.notes, *run.notes],
        "unloaded": [asdict(each) for each in run.unloaded],
        "limits": [
            {"prompt_tokens": each.prompt_tokens, "ttft_s": limits.ttft_s(each.prompt_tokens), "itl_s": limits.itl_s(each.prompt_tokens)}
            for each in run.unloaded
        ],
        "points": [point.as_json() for point in sorted(run.points, key=lambda point: point.told_rate)],
        "has_ended": has_ended,
        "found": run.found(),
        "best": None if best is None else {"rate": best.told_rate, "goodput_per_s": best.figures.goodput_per_s},
    }


def _plain(asked: Asked) -> dict[str, Any]:
    """What two runs must have alike to be compared."""
    load = asked.load
    what: Mapping[str, Any] = {"trace": asked.trace_file, "num_requests": len(load.trace)} if load.trace else {
        "mix": [asdict(shape) for shape in load.mix],
        "arrivals": asdict(load.arrivals),
        "spread": load.spread,
        "prefix_share": load.prefix_share,
        "prefix_groups": load.prefix_groups,
    }  # fmt: skip
    times = {
        name: getattr(asked, name) for name in ("duration_s", "ramp_s", "drain_s", "warmup_s", "unloaded_requests", "num_clients", "share")
    }
    limits = {"ttft": str(asked.ttft), "itl": str(asked.itl), "are_of_another_run": bool(asked.limits_from)}
    return {"load": dict(what) | {"seed": load.seed}, "limits": limits, "search": asked.search and asdict(asked.search)} | times


def conduct(asked: Asked) -> dict[str, Any]:
    """All but plots and tables."""
    server = meet(asked.urls, asked.model, asked.api, asked.vocab, asked.headers)
    for note in server.notes:
        _say(note)
    with clients(asked.num_clients) as pool:
        run = Run(asked, server, pool)
        for note in run.notes:
            _say(note)
        run.warm_up()
        run.measure_unloaded()
        run.measure(lambda: _write(asked, content_of(asked, server, run, has_ended=False), run.rows))
    content = content_of(asked, server, run, has_ended=True)
    _write(asked, content, run.rows)
    return content


def _write(asked: Asked, content: Mapping[str, Any], rows: Sequence[str]) -> None:
    """The result file, and the rows' where it was asked for: at any time the last whole one, or none."""
    texts = {asked.out: json.dumps(content, indent=1) + "\n"}
    if asked.has_rows:
        texts[asked.out.with_name(f"{asked.out.stem}_rows.jsonl")] = "\n".join([*rows, ""])
    for path, text in texts.items():
        part = path.with_name(f"{path.name}.part")
        part.write_text(text)
        part.replace(path)


def _say(line: str) -> None:
    print(line, flush=True)


def main() -> int:
    asked = parse(sys.argv[1:], __doc__)
    if isinstance(asked, Comparison):
        return serve_compare.show(asked)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    content = conduct(asked)
    if asked.has_plots:
        from bench.serve.serve_plot import draw

        draw_beside(asked.out, draw)
    print(f"written: {asked.out}\n\n{serve_report.tables(content)}")
    return int(any(not point["were_clients_fine"] or point["figures"]["ttft"] is None for point in content["points"]))


if __name__ == "__main__":
    sys.exit(main())
