"""Owns the comparison of loads' result files: what must be alike, a table with ratios to the first, the plots. Knows no server."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.axes import PlotsNeedMatplotlib
from bench.serve.serve_options import Comparison
from bench.serve.serve_report import grid, told_load, told_server

Content = Mapping[str, Any]
Figure = Callable[[Content], float | None]


def _time(kind: str, name: str) -> Figure:
    return lambda figures: None if figures[kind] is None else 1e3 * figures[kind][name]


# What a row shows of a load: header, figure. Ratios are to the first file's, as they are: above 1 is more, of tokens and of milliseconds.
COLUMNS: tuple[tuple[str, Figure], ...] = (
    ("output tok/s", lambda figures: figures["output_tokens_per_s"]),
    ("TTFT p50", _time("ttft", "p50_s")),
    ("TTFT p95", _time("ttft", "p95_s")),
    ("ITL p50", _time("itl", "p50_s")),
    ("ITL p95", _time("itl", "p95_s")),
    ("TPOT p50", _time("tpot", "p50_s")),
    ("E2E p95", _time("e2e", "p95_s")),
    ("goodput/s", lambda figures: figures["goodput_per_s"]),
)


def show(asked: Comparison) -> int:
    """Plots and tables of the files. The exit code: 0."""
    contents = [json.loads(file.read_text()) for file in asked.files]
    if asked.has_plots:
        from bench.serve.serve_plot import draw_all

        try:
            print("\n".join(f"plot: {path}" for path in draw_all(contents, asked.out.with_suffix(""))))
        except PlotsNeedMatplotlib as missing:
            print(f"no plots: {missing}")
    print(tables(contents))
    return 0


def tables(contents: Sequence[Content]) -> str:
    """Who they are, what is not alike, the loads at each rate, and the best of each."""
    heads = [
        f"{content['label']}: {told_server(content)}; {content['date']}, {content['commit'][:10]}"
        + ("" if content.get("has_ended", True) else "; its run was cut short")
        for content in contents
    ]
    parts = ["\n".join(heads), "\n".join(f"! not alike: {each}" for each in differences(contents)), _by_rate(contents), _best(contents)]
    return "\n\n".join(part for part in parts if part)


def differences(contents: Sequence[Content]) -> list[str]:
    """What files to be compared should have alike, and have not."""
    asked = [
        ("load", [told_load(content["asked"]["load"]) for content in contents]),
        ("seconds a load", [f"{content['asked']['duration_s']:g}" for content in contents]),
        ("limits", [_told_limits(content) for content in contents]),
        ("model", [content["server"]["model"]["id"] for content in contents]),
        ("host", [content["host"]["device"] or content["host"]["cpu"] for content in contents]),
        ("prompts", [content["server"]["dialect"]["api"] for content in contents]),
    ]
    return [f"{name}: {' | '.join(told)}" for name, told in asked if len(set(told)) > 1]


def _told_limits(content: Content) -> str:
    return ", ".join(f"{row['prompt_tokens']} tokens {1e3 * row['ttft_s']:.1f}/{1e3 * row['itl_s']:.2f} ms" for row in content["limits"])


def _by_rate(contents: Sequence[Content]) -> str:
    """Files side by side at every rate that one of them has; ratios where the first has it too."""
    at = [{point["rate"]: point for point in content["points"]} for content in contents]
    rows = []
    for rate in sorted({rate for points in at for rate in points}):
        for content, points in zip(contents, at, strict=True):
            if rate in points:
                first = at[0].get(rate) if content is not contents[0] else None
                rows.append(
                    [f"{rate:g}", content["label"], *(_cell(figure, points[rate], first) for _, figure in COLUMNS), _within(points[rate])]
                )
    return grid(["rate/s", "times in ms", *(name for name, _ in COLUMNS), "within"], rows)


def _within(point: Content) -> str:
    kept = point["figures"]["kept_share"]
    return ("-" if kept is None else f"{kept:.0%}") + ("" if point["were_clients_fine"] else " !")


def _cell(figure: Figure, point: Content, first: Content | None) -> str:
    value = figure(point["figures"])
    peer = None if first is None else figure(first["figures"])
    return "-" if value is None else f"{value:.2f}" + (f" {value / peer:.2f}x" if peer else "")


def _best(contents: Sequence[Content]) -> str:
    """Goodput of each, at the highest rate that kept enough requests within limits; of all its GPUs and of one."""
    first = contents[0]["best"]
    rows = []
    for content in contents:
        best, gpus = content["best"], content["server"]["gpus"]
        goodput = 0.0 if best is None else best["goodput_per_s"]
        ratio = f"{goodput / first['goodput_per_s']:.2f}x" if first and first["goodput_per_s"] else "-"
        a_gpu = f"{goodput / gpus:.2f}" if gpus else "-"
        rows.append(
            [
                content["label"],
                "-" if best is None else f"{best['rate']:g}",
                f"{goodput:.2f}",
                ratio,
                a_gpu,
                content["found"] or "of the rates that were asked",
            ]
        )
    return grid(["goodput", "at rate/s", "requests/s", "ratio", "a GPU", "found"], rows)
