"""Routing and admission on real processes on this machine's CPU: what the simulator says, measured. Owns the runs and the client.

    duomo bench bench_routing_cpu --out bench/results/routing_cpu.json      # eight minutes on two cores

Prefix-heavy traffic to 4 prefill x 1 decode: cached tokens as usage tells them, beside the oracle of route_traces.py and a gateway that
routes at random. Overload: what 1 x 1 does at most is measured with 32 clients that wait for their answers, then three times as much is
sent; goodput is prompt tokens of answers whose first token came within gateway.max_ttft_s. The two take turns, since machines are not the
same from minute to minute; both are counted by first tokens, from the end of a wave to the end of a wave. Nothing is reported where a
request was answered otherwise than by 200, 429 or 503, was refused without Retry-After, or where anybody holds anything at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from bench.serve.host_facts import commit, cpu_name
from bench.serve.route_system import MODEL, RouteSystem
from bench.serve.route_traces import Prefixes, SimRequest, fresh, oracle_tokens, shared_prefixes

KIND = Prefixes(num_groups=32, prompt_tokens=512, share=0.7)
BLOCK_TOKENS = 16
CACHES: dict[str, object] = {"prefill.num_blocks": 512}  # all groups' beginnings need 704: no replica holds them all
MAX_TTFT_S = 4.0
DEADLINE_S = 30.0
MAX_CLIENTS = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Of one request; times in seconds since it was due. cached_tokens: of an answer."""

    request: SimRequest
    status: int
    retry_after: str | None
    first_s: float
    ended_s: float
    cached_tokens: int
    code: str = ""


async def ask(client: httpx.AsyncClient, request: SimRequest, due_s: float) -> Outcome:
    """Streams one completion, whose last event tells its usage."""
    body = {
        "model": MODEL.name,
        "prompt": list(request.prompt_ids),
        "max_tokens": request.output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "priority": request.priority,
    }
    first_s, code = 0.0, ""
    usage: dict[str, Any] = {}
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            code = json.loads(await answer.aread())["error"]["code"]
        else:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    first_s = first_s or time.monotonic() - due_s
                    event = json.loads(line[6:])
                    usage = event.get("usage") or usage
                    code = (event.get("error") or {}).get("code", code)
    return Outcome(
        request=request,
        status=answer.status_code if not (code and answer.status_code == 200) else 599,
        retry_after=answer.headers.get("retry-after"),
        first_s=first_s,
        ended_s=time.monotonic() - due_s,
        cached_tokens=((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0),
        code=code,
    )


async def open_loop(url: str, trace: Sequence[SimRequest]) -> list[Outcome]:
    """Each request when it is due, whatever became of those before."""
    limits = httpx.Limits(max_connections=MAX_CLIENTS)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits, trust_env=False) as client:
        start_s = time.monotonic()

        async def one(request: SimRequest) -> Outcome:
            await asyncio.sleep(max(start_s + request.at_s - time.monotonic(), 0))
            return await ask(client, request, start_s + request.at_s)

        return list(await asyncio.gather(*(one(request) for request in trace)))


async def closed_loop(url: str, trace: Sequence[SimRequest], num_clients: int, seconds: float) -> tuple[int, float]:
    """Prompt tokens of first tokens that came while every client always waited for an answer, and in how many seconds: from the last first
    token of a ramp of seconds / 4 to the last one."""
    left = iter(trace)
    served: list[tuple[float, int]] = []
    limits = httpx.Limits(max_connections=MAX_CLIENTS)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits, trust_env=False) as client:
        start_s = time.monotonic()

        async def one() -> None:
            while time.monotonic() - start_s < seconds:
                asked_s = time.monotonic()
                outcome = await ask(client, next(left), asked_s)
                assert outcome.status == 200, outcome
                served.append((asked_s - start_s + outcome.first_s, len(outcome.request.prompt_ids)))

        await asyncio.gather(*(one() for _ in range(num_clients)))
    from_s = max(at_s for at_s, _ in served if at_s < seconds / 4)
    until_s = max(at_s for at_s, _ in served if at_s < seconds)
    return sum(tokens for at_s, tokens in served if from_s < at_s <= until_s), until_s - from_s


def check(outcomes: Sequence[Outcome], system: RouteSystem) -> None:
    """Raises SystemExit naming what makes the run worth nothing."""
    odd = Counter(f"{one.status} {one.code}" for one in outcomes if one.status not in (200, 429, 503))
    untold = sum(one.status in (429, 503) and not (one.retry_after or "").isdigit() for one in outcomes)
    late = sum(one.ended_s > DEADLINE_S + 5 for one in outcomes)
    held = system.disquiet()
    if odd or untold or late or held:
        raise SystemExit(
            f"refusing to report: answers {dict(odd)}, {untold} refusals without Retry-After, {late} past the deadline; {held}"
        )


def prefix_row(way: str, num: int, rate: float) -> dict[str, Any]:
    trace = shared_prefixes(num, rate, KIND, output_tokens=8, seed=1)
    with RouteSystem(4, 1, CACHES, is_blind=way == "random") as system:
        outcomes = asyncio.run(open_loop(system.url, trace))
        check(outcomes, system)
    prompts = sum(len(one.request.prompt_ids) for one in outcomes)
    hit_rate = sum(one.cached_tokens for one in outcomes) / prompts
    oracle = oracle_tokens(trace, BLOCK_TOKENS) / prompts
    ttft = sorted(one.first_s for one in outcomes)
    return {
        "way": way,
        "requests": num,
        "rate": rate,
        "hit_rate": hit_rate,
        "oracle_hit_rate": oracle,
        "hit_over_oracle": hit_rate / oracle,
        "ttft_p50_s": statistics.median(ttft),
        "ttft_p99_s": ttft[int(0.99 * len(ttft))],
        "statuses": dict(Counter(one.status for one in outcomes)),
    }


def overload_turn(seconds: float) -> dict[str, Any]:
    """The best, then three times as much."""
    lengths: dict[str, Any] = {"prompt_tokens": (384, 640), "output_tokens": (8, 24)}
    settings: dict[str, object] = {"gateway.max_ttft_s": MAX_TTFT_S, "gateway.request_deadline_s": DEADLINE_S}
    plain: dict[str, object] = {"gateway.request_deadline_s": 120.0}
    with RouteSystem(1, 1, plain) as system:
        best_tokens, best_s = asyncio.run(closed_loop(system.url, fresh(4000, 1.0, seed=3, **lengths), 32, seconds))
    rate = 3 * best_tokens / best_s / 512
    with RouteSystem(1, 1, settings) as system:
        warm = fresh(12, 2.0, seed=5, **lengths)
        asyncio.run(open_loop(system.url, warm))  # a replica that has measured nothing predicts nothing
        trace = [replace(one, name=f"o{idx}") for idx, one in enumerate(fresh(int(rate * seconds), rate, seed=4, **lengths))]
        outcomes = asyncio.run(open_loop(system.url, trace))
        check(outcomes, system)
    good = [one for one in outcomes if one.status == 200 and one.first_s <= MAX_TTFT_S and one.ended_s <= DEADLINE_S]
    answered = [one for one in outcomes if one.status == 200]
    refused = [one for one in outcomes if one.status != 200]
    until_s = max(one.request.at_s + one.first_s for one in good)
    good_tokens = sum(len(one.request.prompt_ids) for one in good)
    ttft = sorted(one.first_s for one in answered)
    return {
        "best_tokens": best_tokens,
        "best_s": best_s,
        "rate": rate,
        "seconds": seconds,
        "requests": len(outcomes),
        "answered": len(answered),
        "good": len(good),
        "refused": dict(Counter(f"{one.status} {one.code}" for one in refused)),
        "retry_after": dict(Counter(one.retry_after for one in refused)),
        "longest_until_refused_s": max((one.ended_s for one in refused), default=0.0),
        "ttft_p50_s": statistics.median(ttft),
        "ttft_p99_s": ttft[int(0.99 * len(ttft))],
        "good_tokens": good_tokens,
        "good_s": until_s,
        "goodput_over_best": good_tokens / until_s / (best_tokens / best_s),
    }


def overload_row(seconds: float, num_turns: int) -> dict[str, Any]:
    turns = []
    for _ in range(num_turns):
        turns.append(overload_turn(seconds))
        print(json.dumps(turns[-1]))
    best = sum(turn["best_tokens"] for turn in turns) / sum(turn["best_s"] for turn in turns)
    goodput = sum(turn["good_tokens"] for turn in turns) / sum(turn["good_s"] for turn in turns)
    return {
        "best_tokens_per_s": best,
        "goodput_tokens_per_s": goodput,
        "goodput_over_best": goodput / best,
        "answered": sum(turn["answered"] for turn in turns),
        "good": sum(turn["good"] for turn in turns),
        "turns": turns,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=180, help="of each prefix-heavy run")
    parser.add_argument("--rate", type=float, default=3.0, help="prefix-heavy requests a second")
    parser.add_argument("--seconds", type=float, default=40.0, help="of the best, and of overload, in each turn")
    parser.add_argument("--turns", type=int, default=3, help="of the best and overload")
    parser.add_argument("--note", default="", help="what else ran on the machine; kept in the file")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    facts: dict[str, Any] = {
        "benchmark": "routing_cpu",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "note": options.note,
        "prefix": [],
    }
    for way in ("duomo", "random"):
        facts["prefix"].append(prefix_row(way, options.requests, options.rate))
        print(json.dumps(facts["prefix"][-1]))
    facts["overload"] = overload_row(options.seconds, options.turns)
    print(json.dumps({key: value for key, value in facts["overload"].items() if key != "turns"}))
    if options.out:
        options.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
