"""Owns the command line of `duomo bench serve`: its options, what they mean together and how they are refused. Knows no server."""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from bench.serve.serve_limits import Limit, Unloaded, parse_limit
from bench.serve.serve_plan import Shape, TraceRow, Workload, parse_arrivals, parse_mix
from bench.serve.serve_plot import MOST_FILES
from bench.serve.serve_prompts import FIRST_ID, Api
from bench.serve.serve_search import Search
from bench.serve.serve_trace import TraceError, read_trace

RAMP_SHARE = 0.1
SHORTEST_S = 0.2
DEFAULT_URL = "http://127.0.0.1:8000"
Told = TypeVar("Told")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A run. rates: None in it is the trace's own; search: instead of rates. limits_from: another run's unloaded times, for multiples.

    headers stay out of result files: they may hold a key.
    """

    urls: tuple[str, ...]
    model: str
    api: Api | Literal["auto"]
    vocab: int | None
    headers: Mapping[str, str] = field(repr=False)
    load: Workload
    trace_file: str
    rates: tuple[float | None, ...]
    search: Search | None
    share: float
    duration_s: float
    ramp_s: float
    drain_s: float
    warmup_s: float
    ttft: Limit
    itl: Limit
    limits_from: tuple[Unloaded, ...]
    unloaded_requests: int
    num_clients: int
    num_gpus: int
    label: str
    has_rows: bool
    has_plots: bool
    out: Path
    command: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Result files to put side by side; out: the stem of plots."""

    files: tuple[Path, ...]
    out: Path
    has_plots: bool


def parse(arguments: Sequence[str], about: str | None) -> Asked | Comparison:
    """Ends the program with a line on stderr where an option is wrong."""
    parser = _parser(about)
    options = parser.parse_args(arguments)
    if options.compare:
        return _comparison(parser, options)
    _check(parser, options)
    load = Workload(
        mix=options.mix,
        arrivals=options.arrivals,
        spread=options.spread,
        prefix_share=options.prefix_share,
        prefix_groups=options.prefix_groups,
        seed=options.seed,
        salt=secrets.token_hex(8) if options.salt is None else options.salt,
        trace=_trace(parser, options.trace),
    )
    lowest_highest = options.search
    search = (
        Search(lowest=lowest_highest[0], highest=lowest_highest[1], share=options.share, precision=options.precision)
        if lowest_highest
        else None
    )
    key = os.environ.get("OPENAI_API_KEY", "")
    return Asked(
        urls=tuple(url.rstrip("/") for url in options.url or [DEFAULT_URL]),
        model=options.model,
        api=options.api,
        vocab=options.vocab,
        headers={"Authorization": f"Bearer {key}"} if key else {},
        load=load,
        trace_file="" if options.trace is None else options.trace.name,
        rates=options.rates or ((None,) if options.trace else (1.0,)),
        search=search,
        share=options.share,
        duration_s=options.duration_s,
        ramp_s=RAMP_SHARE * options.duration_s if options.ramp_s is None else options.ramp_s,
        drain_s=options.drain_s,
        warmup_s=options.warmup_s,
        ttft=options.slo_ttft,
        itl=options.slo_itl,
        limits_from=_unloaded_of(parser, options.slo_from),
        unloaded_requests=options.unloaded_requests,
        num_clients=options.clients,
        num_gpus=options.gpus,
        label=options.label,
        has_rows=options.rows,
        has_plots=not options.no_plots,
        out=options.out,
        command=shlex.join(["duomo", "bench", "serve", *arguments]),
    )


def _parser(about: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="duomo bench serve", description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    server = parser.add_argument_group("the server")
    server.add_argument("--url", action="append", help=f"default {DEFAULT_URL}; its replicas are asked in turn; a key: OPENAI_API_KEY")
    server.add_argument("--model", default="", help="name to ask for; left out: the first that /v1/models names")
    server.add_argument(
        "--api", choices=("auto", "completions", "chat"), default="auto", help="token ids to completions, or text through chat"
    )
    server.add_argument("--vocab", type=_from(FIRST_ID + 2), help="prompt ids lie below; left out: what the server says, or 8000")
    server.add_argument("--gpus", type=_from(0), default=0, help="that it uses: throughput is then told for one, too")
    server.add_argument("--label", default="", help="its name in tables and plots; left out: the result file's")
    load = parser.add_argument_group("the load")
    load.add_argument(
        "--mix",
        type=_told(parse_mix),
        default=(Shape(1024, 128),),
        help="PROMPT:OUTPUT[@WEIGHT],... tokens, such as 2048:128@0.7,1024:256@0.3",
    )
    load.add_argument("--spread", type=_share, default=0.0, help="lengths lie within this share of the mix's, evenly")
    load.add_argument(
        "--arrivals", type=_told(parse_arrivals), default=parse_arrivals("poisson"), help="poisson, constant or gamma:BURSTINESS"
    )
    load.add_argument("--trace", type=Path, help="file of requests instead of a mix: JSON lines (ours, Mooncake's) or Azure's CSV")
    load.add_argument("--prefix-share", type=_share, default=0.0, help="of each prompt that it shares with its group")
    load.add_argument("--prefix-groups", type=_from(1), default=1, help="groups of prompts that share a beginning")
    load.add_argument("--seed", type=_from(0), default=0, help="of lengths and arrivals")
    load.add_argument("--salt", help="of prompts' tokens, as a result file names it, to send the same again; left out: new in every run")
    rates = parser.add_argument_group("rates and time")
    which = rates.add_mutually_exclusive_group()
    which.add_argument("--rates", type=_rates, help="requests/s, one load each: 1,2,4,8 (default 1; with --trace: its own)")
    which.add_argument("--search", type=_span, help="LOWEST:HIGHEST requests/s: find the highest rate that keeps the limits")
    rates.add_argument("--share", type=_share, default=0.9, help="of requests that must keep the limits")
    rates.add_argument("--precision", type=_share, default=0.05, help="of the rate that --search finds")
    rates.add_argument("--duration-s", type=_seconds, default=60.0, help="of each load's arrivals")
    rates.add_argument("--ramp-s", type=_seconds, help="at its start, not counted; left out: a tenth of it")
    rates.add_argument("--drain-s", type=_seconds, default=60.0, help="after it; what is unfinished then is cut off, and failed")
    rates.add_argument("--warmup-s", type=_seconds, default=5.0, help="of load before anything is measured")
    rates.add_argument("--clients", type=_from(1), default=2, help="client processes")
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--slo-ttft", type=_told(parse_limit), default=parse_limit("4x"), help="of the unloaded server's, or a time: 4x, 250ms"
    )
    limits.add_argument(
        "--slo-itl", type=_told(parse_limit), default=parse_limit("1.5x"), help="of 95 in 100 gaps of a request: 1.5x, 20ms"
    )
    limits.add_argument("--slo-from", type=Path, help="result file whose unloaded times multiples are of: another server's")
    limits.add_argument("--unloaded-requests", type=_from(1), default=5, help="of each length, one at a time, before the loads")
    files = parser.add_argument_group("files")
    files.add_argument("--out", type=Path, default=Path("serve.json"), help="result file, plots beside it")
    files.add_argument("--rows", action="store_true", help="also OUT_rows.jsonl, a line for each request")
    files.add_argument("--no-plots", action="store_true")
    files.add_argument("--compare", type=Path, nargs="+", metavar="FILE", help="no load: result files side by side, the first is 1.00x")
    return parser


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if wrong := [url for url in options.url or () if not re.match(r"https?://[^/]", url)]:
        parser.error(f"--url {wrong[0]}: such as {DEFAULT_URL}")
    if options.duration_s < SHORTEST_S:
        parser.error(f"--duration-s {options.duration_s:g}: at least {SHORTEST_S:g}")
    if options.ramp_s is not None and options.ramp_s > options.duration_s / 2:
        parser.error(f"--ramp-s {options.ramp_s:g}: at most half of --duration-s, {options.duration_s:g}")
    if options.search and not 0.01 <= options.precision:
        parser.error(f"--precision {options.precision:g}: from 0.01 on; loads of a minute tell no finer")
    if not options.spread < 1.0:
        parser.error(f"--spread {options.spread:g}: below 1; a length is above 0")


def _comparison(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Comparison:
    if len(options.compare) > MOST_FILES and not options.no_plots:
        parser.error(f"--compare: {len(options.compare)} files, and plots tell {MOST_FILES} apart; name fewer, or add --no-plots")
    for file in options.compare:
        _result(parser, "--compare", file)
    return Comparison(files=tuple(options.compare), out=options.out, has_plots=not options.no_plots)


def _trace(parser: argparse.ArgumentParser, file: Path | None) -> tuple[TraceRow, ...]:
    if file is None:
        return ()
    try:
        with file.open() as lines:
            return read_trace(lines, str(file))
    except (OSError, TraceError, UnicodeDecodeError) as error:
        parser.error(f"--trace {error}")


def _unloaded_of(parser: argparse.ArgumentParser, file: Path | None) -> tuple[Unloaded, ...]:
    if file is None:
        return ()
    content = _result(parser, "--slo-from", file)
    return tuple(Unloaded(**{name: row[name] for name in ("prompt_tokens", "ttft_s", "itl_s")}) for row in content["unloaded"])


def _result(parser: argparse.ArgumentParser, option: str, file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        parser.error(f"{option} {file}: {error}")
    if not isinstance(content, dict) or content.get("benchmark") != "serve":
        parser.error(f"{option} {file}: no result file of `duomo bench serve`")
    return content


def _told(parse_one: Callable[[str], Told]) -> Callable[[str], Told]:
    """Its ValueErrors as argparse shows them."""

    def told(text: str) -> Told:
        try:
            return parse_one(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return told


def _from(lowest: int) -> Callable[[str], int]:
    def told(text: str) -> int:
        if not text.isdigit() or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"{text!r}: a whole number from {lowest} on")
        return int(text)

    return told


def _number(text: str, what: str) -> float:
    if not re.fullmatch(r"\d*\.?\d+", text.strip()):
        raise argparse.ArgumentTypeError(f"{text!r}: {what}")
    return float(text)


def _share(text: str) -> float:
    value = _number(text, "a share from 0 to 1")
    if value > 1.0:
        raise argparse.ArgumentTypeError(f"{text!r}: a share from 0 to 1")
    return value


def _seconds(text: str) -> float:
    return _number(text, "seconds from 0 on")


def _rates(text: str) -> tuple[float, ...]:
    found = tuple(_number(part, "requests/s, such as 1,2,4,8") for part in text.split(","))
    if min(found) <= 0.0 or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r}: rates above 0, each once")
    return found


def _span(text: str) -> tuple[float, float]:
    lowest, _, highest = (
        _number(part, "LOWEST:HIGHEST requests/s, such as 0.5:32") if part != ":" else 0.0 for part in text.partition(":")
    )
    if not 0.0 < lowest < highest:
        raise argparse.ArgumentTypeError(f"{text!r}: LOWEST:HIGHEST requests/s, the first above 0 and below the second")
    return lowest, highest
