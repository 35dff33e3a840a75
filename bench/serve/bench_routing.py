"""Routing and admission in a simulated system: the gateway's own files in virtual time, beside baselines and bounds. Owns the runs.

    duomo bench routing --out bench/results/routing_sim.json      # a minute on one core; routing_sim.png and .svg beside it

Prefix-heavy traffic: 70% of each prompt are one of 32 beginnings; four prefill replicas whose caches hold them all only if each keeps some.
Hit rates beside an oracle's (route_traces.py: one cache that forgets nothing), random routing, least load. Overload: three times what the
bottleneck can do; goodput in its tokens beside a bound: that pool busy with requests that end in time from first to last. A run in
which a request got neither an answer nor a refusal that says when to come back, or waited past its time, reports nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.serve.host_facts import commit, cpu_name
from bench.serve.route_gateway import Way
from bench.serve.route_machines import Machine
from bench.serve.route_plot import draw
from bench.serve.route_simulator import Found, System, simulate
from bench.serve.route_traces import Prefixes, SimRequest, fresh, oracle_tokens, shared_prefixes
from services.router import policy

KIND = Prefixes(num_groups=32, prompt_tokens=512, share=0.7)
NUM_REQUESTS = 1500
RATES = (8.0, 16.0, 24.0, 32.0)
WORTHS = (1.0, 1.5, 2.0, 3.0, 5.0)
WAYS: tuple[Way, ...] = ("duomo", "least_loaded", "random")
LIMIT_S = 4.0
DEADLINE_S = 60.0
OVERLOAD = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Overload:
    """A case. tokens_per_s: what the bottleneck does at most; work: what a request takes of it."""

    name: str
    system: System
    prompt_tokens: tuple[int, int]
    output_tokens: tuple[int, int]
    tokens_per_s: float
    work: Callable[[SimRequest], int]
    ends_with_first: bool


def prefix_rows() -> list[dict[str, Any]]:
    rows = []
    for skew, num_gateways in ((0.0, 1), (0.0, 4), (1.0, 4)):
        for rate in RATES:
            kind = replace(KIND, skew=skew)
            trace = shared_prefixes(NUM_REQUESTS, rate, kind, output_tokens=32, seed=1, num_gateways=num_gateways)
            oracle = oracle_tokens(trace, Machine().block_tokens) / sum(len(one.prompt_ids) for one in trace)
            for way in WAYS:
                found = simulate(trace, System(num_prefills=4, num_gateways=num_gateways, way=way))
                check(found, trace)
                about = {"rate": rate, "skew": skew, "gateways": num_gateways, "way": way, "oracle_hit_rate": oracle}
                rows.append(about | _figures(found, oracle) | {"prefill_busy": found.busy_s / 4 / found.ended_s})
    return rows


def worth_rows() -> list[dict[str, Any]]:
    rows = []
    trace = shared_prefixes(NUM_REQUESTS, 32.0, KIND, output_tokens=32, seed=1, num_gateways=2)
    oracle = oracle_tokens(trace, Machine().block_tokens) / sum(len(one.prompt_ids) for one in trace)
    for worth in WORTHS:
        with _prefix_worth(worth):
            found = simulate(trace, System(num_prefills=4, num_gateways=2))
        rows.append({"worth": worth} | _figures(found, oracle))
    return rows


def overloads() -> list[Overload]:
    machine = Machine()
    prefill_rate = 1 / machine.row_s
    batch = machine.max_batch
    small = replace(machine, decode_blocks=160)
    mean_blocks = (48 + 128) / machine.block_tokens
    fits = int((small.decode_blocks - small.watermark_blocks) / mean_blocks)
    long, short = (384, 640), (32, 64)
    some, many = (8, 24), (96, 160)

    def step_rate(num: int) -> float:
        return num / (machine.step_s + machine.step_row_s * num)

    def prompt(request: SimRequest) -> int:
        return len(request.prompt_ids)

    def output(request: SimRequest) -> int:
        return request.output_tokens

    return [
        Overload(
            name="prefill",
            system=System(),
            prompt_tokens=long,
            output_tokens=some,
            tokens_per_s=prefill_rate,
            work=prompt,
            ends_with_first=True,
        ),
        Overload(
            name="prefill, 2 replicas, 3 gateways",
            system=System(num_prefills=2, num_gateways=3),
            prompt_tokens=long,
            output_tokens=some,
            tokens_per_s=2 * prefill_rate,
            work=prompt,
            ends_with_first=True,
        ),
        Overload(
            name="decode's batch",
            system=System(),
            prompt_tokens=short,
            output_tokens=many,
            tokens_per_s=step_rate(batch),
            work=output,
            ends_with_first=False,
        ),
        Overload(
            name="decode's blocks",
            system=System(machine=small),
            prompt_tokens=short,
            output_tokens=many,
            tokens_per_s=step_rate(fits),
            work=output,
            ends_with_first=False,
        ),
    ]


def overload_row(case: Overload, seconds: float = 120.0, seed: int = 2) -> dict[str, Any]:
    """Goodput over what the bottleneck could do until the last good request had what it needed of it."""
    num_gateways = case.system.num_gateways
    work = statistics.mean(case.prompt_tokens if case.ends_with_first else case.output_tokens)
    rate = OVERLOAD * case.tokens_per_s / work
    drawn = fresh(int(rate * seconds), rate, prompt_tokens=case.prompt_tokens, output_tokens=case.output_tokens, seed=seed)
    trace = [replace(one, limit_s=LIMIT_S, deadline_s=DEADLINE_S, gateway=idx % num_gateways) for idx, one in enumerate(drawn)]
    found = simulate(trace, case.system)
    check(found, trace)
    good = found.good(LIMIT_S)
    until_s = max(one.first_s if case.ends_with_first else one.ended_s for one in good)
    goodput = sum(case.work(one.request) for one in good) / until_s
    return {
        "case": case.name,
        "gateways": num_gateways,
        "requests": len(trace),
        "answered": len(found.answers),
        "good": len(good),
        "refused": dict(Counter(f"{one.status} {one.code}" for one in found.refusals)),
        "retry_after_s": [min(one.retry_after_s for one in found.refusals), max(one.retry_after_s for one in found.refusals)],
        "longest_until_refused_s": max(found.refused_s[one.request.name] - one.request.at_s for one in found.refusals),
        "goodput_tokens_per_s": goodput,
        "best_tokens_per_s": case.tokens_per_s,
        "goodput_over_best": goodput / case.tokens_per_s,
    } | _times(found)


def check(found: Found, trace: Sequence[SimRequest]) -> None:
    """Raises SystemExit where a request was forgotten, refused without a time to come back, or waited past its time."""
    ended = Counter([one.request.name for one in found.answers] + [one.request.name for one in found.refusals])
    wrong = [one.name for one in trace if ended[one.name] != 1]
    wrong += [one.request.name for one in found.refusals if one.status not in (429, 503) or one.retry_after_s < 1]
    for one in found.refusals:
        useful_s = min(one.request.limit_s or one.request.deadline_s, one.request.deadline_s)
        if (
            found.refused_s[one.request.name] - one.request.at_s > useful_s + 0.11
        ):  # a simulated gateway looks at its line ten times a second
            wrong.append(one.request.name)
    if wrong:
        raise SystemExit(f"refusing to report: {wrong[:10]} were forgotten, refused without a time, or kept past theirs")


def _figures(found: Found, oracle: float) -> dict[str, Any]:
    return {"hit_rate": found.hit_rate, "hit_over_oracle": found.hit_rate / oracle, "reasons": dict(found.reasons)} | _times(found)


def _times(found: Found) -> dict[str, float]:
    ttft = sorted(one.ttft_s for one in found.answers)
    return {"ttft_p50_s": ttft[len(ttft) // 2], "ttft_p99_s": ttft[int(0.99 * len(ttft))], "ttft_mean_s": statistics.mean(ttft)}


@contextmanager
def _prefix_worth(worth: float) -> Iterator[None]:
    """What it would be like."""
    usual = policy.PREFIX_WORTH
    setattr(policy, "PREFIX_WORTH", worth)  # noqa: B010 - mypy knows it as final
    try:
        yield
    finally:
        setattr(policy, "PREFIX_WORTH", usual)  # noqa: B010 - mypy knows it as final


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    prefix, overload = prefix_rows(), [overload_row(case) for case in overloads()]
    facts = {
        "benchmark": "routing",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": cpu_name(),
        "machine": asdict(Machine()),
        "prefixes": asdict(KIND),
        "limit_s": LIMIT_S,
        "prefix": prefix,
        "worth": worth_rows(),
        "overload": overload,
    }
    print(f"{'rate':>5} {'skew':>5} {'gateways':>8} {'way':>13} {'hit rate':>8} {'of oracle':>9} {'TTFT p50 s':>10} {'p99 s':>7}")
    for row in prefix:
        left = f"{row['rate']:>5g} {row['skew']:>5g} {row['gateways']:>8} {row['way']:>13} {row['hit_rate']:>8.3f}"
        print(f"{left} {row['hit_over_oracle']:>9.3f} {row['ttft_p50_s']:>10.3f} {row['ttft_p99_s']:>7.3f}")
    for row in overload:
        share = f"goodput {row['goodput_over_best']:.3f} of the best"
        print(f"{row['case']}: {share}, {row['good']} good of {row['answered']}, refused {row['refused']}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(facts, indent=1) + "\n")
        draw(options.out)


if __name__ == "__main__":
    main()
