"""PURE: owns the tables of a load's result file. Knows no server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

QUANTILES = ("p50_s", "p90_s", "p95_s", "p99_s")
TIMES = {"ttft": "TTFT", "itl": "ITL", "tpot": "TPOT", "e2e": "E2E"}


def progress(point: Mapping[str, Any]) -> str:
    """One load in one line, as it ends."""
    figures = point["figures"]
    ttft, itl = ms(figures["ttft"], "p95_s"), ms(figures["itl"], "p95_s")
    return (
        f"{point['rate']:g}/s: {figures['num_requests']} requests, {figures['num_failed']} failed, "
        f"{figures['output_tokens_per_s']:.0f} tokens/s, TTFT p95 {ttft} ms, ITL p95 {itl} ms, {share(figures)} within limits"
    )


def tables(content: Mapping[str, Any]) -> str:
    """What was asked, rates, times, and what speaks against them."""
    points = content["points"]
    parts = [_head(content), _rates(content, points), _times(points), *_remarks(content, points)]
    return "\n\n".join(part for part in parts if part)


def grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as what stands in them, the first to the left, the others to the right."""
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if not column else cell.rjust(width) for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in (header, *rows)
    )


def ms(spread: Mapping[str, Any] | None, name: str) -> str:
    return "-" if spread is None else f"{1e3 * spread[name]:.1f}" if spread[name] >= 0.1 else f"{1e3 * spread[name]:.2f}"


def share(figures: Mapping[str, Any]) -> str:
    kept = figures["kept_share"]
    return "-" if kept is None else f"{kept:.0%}" if kept in (0.0, 1.0) else f"{kept:.1%}"


def told_load(load: Mapping[str, Any]) -> str:
    if "trace" in load:
        return f"trace {load['trace']}, {load['num_requests']} requests"
    several = len(load["mix"]) > 1
    mix = ",".join(
        f"{shape['prompt_tokens']}:{shape['output_tokens']}" + (f"@{shape['weight']:g}" if several else "") for shape in load["mix"]
    )
    arrivals = load["arrivals"]
    parts = [
        f"mix {mix}",
        f"{arrivals['kind']} arrivals" + (f" of burstiness {arrivals['burstiness']:g}" if arrivals["kind"] == "gamma" else ""),
    ]
    if load["spread"]:
        parts.append(f"lengths within {load['spread']:.0%}")
    if load["prefix_share"]:
        parts.append(f"{load['prefix_share']:.0%} of a prompt shared in {load['prefix_groups']} groups")
    return ", ".join([*parts, f"seed {load['seed']}"])


def told_server(content: Mapping[str, Any]) -> str:
    server, host = content["server"], content["host"]
    version = f" {server['version']}" if server["version"] else ""
    return f"{server['model'].get('owned_by') or 'server'}{version}, {server['model']['id']}, {host['device'] or host['cpu']}"


def _head(content: Mapping[str, Any]) -> str:
    asked = content["asked"]
    lines = [
        f"{content['label']}: {told_server(content)}",
        f"{told_load(asked['load'])}; {asked['duration_s']:g} s a load, the first {asked['ramp_s']:g} not counted",
    ]
    for alone, limit in zip(content["unloaded"], content["limits"], strict=True):
        lines.append(
            f"{alone['prompt_tokens']} tokens alone: TTFT {1e3 * alone['ttft_s']:.2f} ms, ITL {1e3 * alone['itl_s']:.2f} ms; "
            f"limits: TTFT {1e3 * limit['ttft_s']:.1f} ms, ITL p95 {1e3 * limit['itl_s']:.2f} ms"
        )
    limits = asked["limits"]
    of = "another run's unloaded times" if limits["are_of_another_run"] else "the unloaded times"
    return "\n".join([*lines, f"limits are {limits['ttft']} and {limits['itl']}; multiples of {of}"])


def _rates(content: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> str:
    gpus = content["server"]["gpus"]
    header = [
        "rate/s",
        "requests",
        "failed",
        "finished/s",
        "prompt tok/s",
        "output tok/s",
        *(["a GPU"] if gpus else []),
        "within",
        "goodput/s",
        "late p99 ms",
    ]
    rows = []
    for point in points:
        figures = point["figures"]
        a_gpu = [f"{figures['output_tokens_per_s'] / gpus:.1f}"] if gpus else []
        goodput = figures["goodput_per_s"]
        rows.append([
            f"{point['rate']:g}", str(figures["num_requests"]), str(figures["num_failed"]), f"{figures['finished_per_s']:.2f}",
            f"{figures['prompt_tokens_per_s']:.1f}", f"{figures['output_tokens_per_s']:.1f}", *a_gpu, share(figures),
            "-" if goodput is None else f"{goodput:.2f}", ms(figures["late"], "p99_s") + ("" if point["were_clients_fine"] else " !"),
        ])  # fmt: skip
    return grid(header, rows)


def _times(points: Sequence[Mapping[str, Any]]) -> str:
    header = [
        "ms, rate/s",
        *(f"{label if name == QUANTILES[0] else ''} {name[:3]}".strip() for label in TIMES.values() for name in QUANTILES),
    ]
    return grid(
        header, [[f"{point['rate']:g}", *(ms(point["figures"][time], name) for time in TIMES for name in QUANTILES)] for point in points]
    )


def _remarks(content: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> list[str]:
    remarks = [f"note: {note}" for note in content["notes"]]
    for point in points:
        if not point["were_clients_fine"]:
            late = ms(point["figures"]["late"], "p99_s")
            remarks.append(f"! at {point['rate']:g}/s the clients did not keep up: sends {late} ms late at p99; {point['clients']}")
        remarks += [f"at {point['rate']:g}/s {count} failed: {error}" for error, count in point["figures"]["errors"].items()]
    if not all(point["were_clients_fine"] for point in points):
        remarks.append("! where clients did not keep up, times are theirs too, not the server's alone: give them cores, or more --clients")
    several = sum(point["figures"]["events_with_several_tokens"] for point in points)
    if several:
        remarks.append(f"{several} events brought several tokens: ITL is between events")
    best = content["best"]
    asked_share = content["asked"]["share"]
    remarks.append(
        f"no load kept {asked_share:.0%} of its requests within limits" if best is None
        else f"goodput {best['goodput_per_s']:.2f} requests/s, at {best['rate']:g}/s, the highest with {asked_share:.0%} within limits"
    )  # fmt: skip
    return ["\n".join([*remarks, *([f"search: {content['found']}"] if content["found"] else [])])]
