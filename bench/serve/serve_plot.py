"""Owns the plots of loads: throughput over the time between tokens, goodput over the rate, of `duomo bench serve`. Knows no server.

    python -m bench.serve.serve_plot serve.json      # writes serve_pareto.png and .svg, serve_goodput.png and .svg beside it

Needs matplotlib: pip install 'duomo[bench]'.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.axes import BLUE, FLOOR_GREY, GREEN, ORANGE, PURPLE, SKY, YELLOW, new_figure, plot_main, save
from bench.serve.serve_report import told_load

COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, YELLOW)
TITLE_COLUMNS = 80
MARKERS = (("o", "s"), ("^", "v"), ("D", "P"), ("<", ">"), ("X", "*"))  # of both lines; the next pair where colours begin again
MOST_FILES = len(COLOURS) * len(MARKERS)
LINES = {"tpot": ("p50_s", "TPOT p50", "-"), "itl": ("p95_s", "ITL p95", "--")}


def draw(result: Path) -> list[Path]:
    """PNG and SVG of one file. Empty where it has no load that brought tokens."""
    return draw_all([json.loads(result.read_text())], result.with_suffix(""))


def draw_all(contents: Sequence[Mapping[str, Any]], stem: Path) -> list[Path]:
    """stem_pareto and stem_goodput; a colour for each file. Throughput is that of a GPU where all say how many they have."""
    if not any(point["figures"]["itl"] for content in contents for point in content["points"]):
        return []
    load = textwrap.fill(told_load(contents[0]["asked"]["load"]), TITLE_COLUMNS)
    title = f"{load}\n{contents[0]['host']['device'] or contents[0]['host']['cpu']}"
    pareto, goodput = (stem.with_name(f"{stem.name}_{kind}") for kind in ("pareto", "goodput"))
    return [*_draw_pareto(contents, title, pareto), *_draw_goodput(contents, title, goodput)]


def look_of(number: int) -> tuple[str, tuple[str, str]]:
    """Colour and markers of one of the files. Raises ValueError beyond MOST_FILES: no two of them may look alike."""
    if number >= MOST_FILES:
        raise ValueError(f"a plot tells {MOST_FILES} files apart, and this is number {number + 1}")
    return COLOURS[number % len(COLOURS)], MARKERS[number // len(COLOURS)]


def _draw_pareto(contents: Sequence[Mapping[str, Any]], title: str, stem: Path) -> list[Path]:
    figure, axes = new_figure()
    is_a_gpu = all(content["server"]["gpus"] for content in contents)
    for number, content in enumerate(contents):
        colour, markers = look_of(number)
        for (kind, (quantile, label, line)), marker in zip(LINES.items(), markers, strict=True):
            points = [point for point in content["points"] if point["figures"][kind]]
            x = [1e3 * point["figures"][kind][quantile] for point in points]
            y = [point["figures"]["output_tokens_per_s"] / (content["server"]["gpus"] if is_a_gpu else 1) for point in points]
            axes.plot(x, y, marker + line, color=colour, label=f"{content['label']}, {label}", markersize=4)
            for point, at in zip(points, zip(x, y, strict=True), strict=True):
                axes.annotate(f"{point['rate']:g}/s", at, textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.set(xlabel="ms between tokens", ylabel="output tokens/s" + (" a GPU" if is_a_gpu else ""), title=title)
    return _saved(figure, axes, stem)


def _draw_goodput(contents: Sequence[Mapping[str, Any]], title: str, stem: Path) -> list[Path]:
    figure, axes = new_figure()
    highest = max(point["rate"] for content in contents for point in content["points"])
    axes.plot([0.0, highest], [0.0, highest], ":", color=FLOOR_GREY, label="all within limits")
    for number, content in enumerate(contents):
        colour, (marker, _) = look_of(number)
        points = [
            (point["rate"], point["figures"]["goodput_per_s"])
            for point in content["points"]
            if point["figures"]["goodput_per_s"] is not None
        ]
        axes.plot(*zip(*points, strict=True), f"{marker}-", color=colour, label=content["label"], markersize=4)
    axes.set(xlabel="requests/s", ylabel="goodput, requests/s within limits", title=title)
    return _saved(figure, axes, stem)


def _saved(figure: Any, axes: Any, stem: Path) -> list[Path]:
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.grid(True, alpha=0.25)
    axes.legend(frameon=False)
    return save(figure, stem)


def main() -> int:
    return plot_main(draw, program="-m bench.serve.serve_plot", file_of="duomo bench serve", if_nothing="no load brought tokens")


if __name__ == "__main__":
    sys.exit(main())
