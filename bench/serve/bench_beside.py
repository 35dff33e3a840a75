"""Owns what prompts do to the streams beside them, and what they wait for themselves: windows with and without, by turns. Knows no server.

    duomo serve MODEL &
    duomo bench beside --streams 15 --prompt-tokens 2048 --every-s 0.4 --window-s 3 --pairs 4 --out beside.json
    duomo bench beside --streams 0 --prompt-tokens 2048 --every-s 1 --window-s 12 --pairs 1 --out alone.json

Streams grow, and with them what each of their steps reads: a window with prompts is judged by the mean of the window before it and the one
behind it. Of the prompts themselves: the time to the first token, from there to the second, and to each one more. Exit code 1 where a
stream ended before the last window did, a prompt failed, or the client was too late for the figures to be the server's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.serve.host_facts import commit, cpu_name
from bench.serve.serve_figures import Seen, Spread, spread_of
from bench.serve.serve_plan import Piece, Request
from bench.serve.serve_pool import clients
from bench.serve.server_facts import meet
from bench.serve.soak_verdicts import client_verdict
from bench.serve.soak_watch import gpu_name

SETTLE_SHARE = 0.1  # of a window, at its start: what the one before began is still under way
DRAIN_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A run: 2 * pairs + 1 windows, the first and every second one quiet. lead_s: from the streams' start to the first window."""

    url: str
    vocab: int | None
    streams: int
    stream_prompt_tokens: int
    stream_tokens: int
    prompt_tokens: int
    output_tokens: int
    every_s: float
    window_s: float
    pairs: int
    lead_s: float
    salt: str
    out: Path

    @property
    def num_windows(self) -> int:
        return 2 * self.pairs + 1

    @property
    def end_s(self) -> float:
        return self.lead_s + self.num_windows * self.window_s


@dataclass(frozen=True, kw_only=True)
class Window:
    """ITL of all streams in it, what a window's beginning still has of the one before left out."""

    has_prompts: bool
    itl: Spread | None


def requests_of(asked: Asked) -> list[Request]:
    """The streams, then the prompts of every second window; ordered by when they are due."""
    streams = [
        Request(number, 0.02 * number, asked.stream_tokens, (Piece(f"{asked.salt} stream {number}", asked.stream_prompt_tokens),))
        for number in range(asked.streams)
    ]
    each_window = max(1, int(asked.window_s / asked.every_s))
    due_s = [
        asked.lead_s + window * asked.window_s + number * asked.every_s
        for window in range(1, asked.num_windows, 2)
        for number in range(each_window)
    ]
    prompts = [
        Request(asked.streams + number, at_s, asked.output_tokens, (Piece(f"{asked.salt} prompt {number}", asked.prompt_tokens),))
        for number, at_s in enumerate(due_s)
    ]
    return sorted([*streams, *prompts], key=lambda request: request.due_s)


def windows_of(seen: Sequence[Seen], asked: Asked) -> list[Window]:
    """By the streams' gaps that end in each."""
    streams = [one for one in seen if one.index < asked.streams]
    ends_s = np.concatenate([np.asarray(one.event_s)[1:] for one in streams] or [np.empty(0)])
    gaps_s = np.concatenate([one.gaps_s for one in streams] or [np.empty(0)])
    found = []
    for number in range(asked.num_windows):
        begin_s = asked.lead_s + number * asked.window_s
        inside = (ends_s >= begin_s + SETTLE_SHARE * asked.window_s) & (ends_s < begin_s + asked.window_s)
        found.append(Window(has_prompts=number % 2 == 1, itl=spread_of(gaps_s[inside])))
    return found


def ratios_of(windows: Sequence[Window]) -> dict[str, list[float]]:
    """Of each window with prompts: its figure over the mean of its two neighbours'. Nothing where there are no streams."""
    told: dict[str, list[float]] = {}
    for before, beside, behind in zip(windows[::2], windows[1::2], windows[2::2], strict=False):
        if before.itl is None or beside.itl is None or behind.itl is None:
            continue
        for name in ("mean_s", "p50_s", "p95_s"):
            quiet = (getattr(before.itl, name) + getattr(behind.itl, name)) / 2
            told.setdefault(name.removesuffix("_s"), []).append(round(getattr(beside.itl, name) / quiet, 4))
    return told


def prompts_of(seen: Sequence[Seen], asked: Asked) -> dict[str, Any]:
    """Of the prompts that ended whole, the first one left out. further: from each token to the next, from the second on."""
    whole = [one for one in seen if one.index > asked.streams and not one.error and len(one.event_s) > 1]
    gaps = [one.gaps_s for one in whole]
    further: NDArray[np.float64] = np.concatenate([each[1:] for each in gaps] or [np.empty(0)])
    second, step = spread_of([float(each[0]) for each in gaps]), spread_of(further)
    return {
        "requests": len(whole),
        "failed": sum(bool(one.error) for one in seen if one.index >= asked.streams),
        "ttft": _plain(spread_of([one.ttft_s for one in whole])),
        "to_second": _plain(second),
        "further": _plain(step),
        "second_over_step_ms": None if second is None or step is None else round(1e3 * (second.p50_s - step.p50_s), 3),
    }


def _plain(spread: Spread | None) -> dict[str, Any] | None:
    return None if spread is None else asdict(spread)


def conduct(asked: Asked) -> tuple[dict[str, Any], bool]:
    """The result, and whether it is the server's."""
    server = meet((asked.url,), "", "auto", asked.vocab, {})
    with clients(2) as pool:
        played = pool.play(server.target, requests_of(asked), asked.end_s + DRAIN_S)
    seen = [one for each in played for one in each.seen]
    lag_s = {str(number): np.asarray(each.lag_s) for number, each in enumerate(played)}
    verdict = client_verdict(lag_s, {str(number): each.cpu_share for number, each in enumerate(played)})
    last_s = asked.end_s - asked.window_s
    short = {one.index: one.error for one in seen if one.index < asked.streams and (not one.event_s or one.event_s[-1] < last_s)}
    windows, prompts = windows_of(seen, asked), prompts_of(seen, asked)
    content = {
        "benchmark": "beside",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "host": {"device": gpu_name(), "cpu": cpu_name()},
        "server": {"version": server.version, "model": dict(server.model)},
        "asked": {name: value for name, value in asdict(asked).items() if name not in ("out", "url")},
        "client": verdict.figures,
        "windows": [asdict(window) for window in windows],
        "itl_over_quiet": ratios_of(windows),
        "prompts": prompts,
        "streams_that_ended_early": short,
    }
    return content, verdict.passed is True and not short and not prompts["failed"]


def report(content: dict[str, Any]) -> str:
    """For people, in milliseconds."""
    lines = []
    for window in content["windows"]:
        if itl := window["itl"]:
            what = "with prompts" if window["has_prompts"] else "quiet       "
            lines.append(f"{what}  ITL mean {1e3 * itl['mean_s']:7.3f}  p50 {1e3 * itl['p50_s']:7.3f}  p95 {1e3 * itl['p95_s']:7.3f}")
    for name, ratios in content["itl_over_quiet"].items():
        lines.append(f"ITL {name} over the quiet neighbours': median {float(np.median(ratios)):.4f}, {ratios}")
    told = content["prompts"]
    if told["ttft"]:
        ttft, second, further = (1e3 * told[name]["p50_s"] if told[name] else 0.0 for name in ("ttft", "to_second", "further"))
        lines.append(f"{told['requests']} prompts: TTFT {ttft:.2f} ms, second token after {second:.2f}, further ones {further:.2f} (p50)")
    lines += [
        f"stream {number} ended early: {error or 'it had all its tokens'}" for number, error in content["streams_that_ended_early"].items()
    ]
    return "\n".join([*lines, f"failed: {told['failed']}; client: {content['client']}"])


def parse(arguments: Sequence[str]) -> Asked:
    parser = argparse.ArgumentParser(prog="duomo bench beside", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--vocab", type=int, help="prompt ids lie below it; left out: what the server says")
    parser.add_argument("--streams", type=int, default=15, help="that decode all the while; 0: only the prompts are judged")
    parser.add_argument("--stream-prompt-tokens", type=int, default=64)
    parser.add_argument("--stream-tokens", type=int, default=4000, help="of each stream; enough to last")
    parser.add_argument("--prompt-tokens", type=int, default=2048)
    parser.add_argument("--output-tokens", type=int, default=8, help="of each prompt's answer; 3 at least")
    parser.add_argument("--every-s", type=float, default=0.4, help="from one prompt to the next")
    parser.add_argument("--window-s", type=float, default=3.0)
    parser.add_argument("--pairs", type=int, default=4, help="windows with prompts, each between two quiet ones")
    parser.add_argument("--lead-s", type=float, default=2.0, help="before the first window")
    parser.add_argument("--salt", default="beside", help="of the prompts: another one for a server that remembers the last run's")
    parser.add_argument("--out", type=Path, default=Path("beside.json"))
    asked = Asked(**vars(parser.parse_args(arguments)))
    for name, least in (("streams", 0), ("stream_prompt_tokens", 1), ("prompt_tokens", 1), ("output_tokens", 3), ("pairs", 1)):
        if getattr(asked, name) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(asked, name)}: at least {least}")
    for name in ("every_s", "window_s"):
        if getattr(asked, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(asked, name):g}: above 0")
    if asked.every_s > asked.window_s:
        parser.error(f"--every-s {asked.every_s:g}: at most --window-s, {asked.window_s:g}")
    return asked


def main() -> int:
    asked = parse(sys.argv[1:])
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    content, is_servers = conduct(asked)
    asked.out.write_text(json.dumps(content, indent=1) + "\n")
    print(report(content), flush=True)
    return 0 if is_servers else 1


if __name__ == "__main__":
    sys.exit(main())
