"""Draws a soak: gaps between tokens by minute, and memory over time, from a result file of `duomo bench soak`. Knows no server.

    python -m bench.serve.soak_plot soak.json      # writes soak.png and soak.svg beside it

Needs matplotlib: pip install 'duomo[bench]'.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bench.axes import BLUE, GREEN, ORANGE, PURPLE, SKY, YELLOW, new_figure, plot_main, save

GAPS = {"p50": ("p50", BLUE), "p90": ("p90", SKY), "p99": ("p99", ORANGE), "p99_9": ("p99.9", YELLOW)}
MIB = 2**20


def draw(result: Path) -> list[Path]:
    """PNG and SVG. Empty where no minute was whole."""
    content = json.loads(result.read_text())
    minutes = content["itl_by_minute"]
    if not minutes:
        return []
    figure, (gaps, memory) = new_figure(num_rows=2)
    middle = [(at + 0.5) for at in range(len(minutes))]
    for name, (label, colour) in GAPS.items():
        points = [(at, 1e3 * minute["quantile_s"][name]) for at, minute in zip(middle, minutes, strict=True) if minute["quantile_s"]]
        gaps.plot(*zip(*points, strict=True), "o-", color=colour, label=label, markersize=4)
    gaps.set(
        ylabel="ms between tokens",
        title=f"{content['asked']['num_streams']} streams for {content['asked']['duration_s']:.0f} s\n{content['device']}",
    )
    gaps.set_ylim(bottom=0)
    _draw_memory(memory, content["samples"])
    memory.set(xlabel="minutes", ylabel="MiB since the first minute's end")
    for axes in (gaps, memory):
        axes.grid(True, axis="y", alpha=0.25)
        if axes.lines:
            axes.legend(frameon=False)
    return save(figure, result.with_suffix(""))


def _draw_memory(axes: Any, samples: list[dict[str, Any]]) -> None:
    """Each series less what it was after a minute (at the end, where the soak was shorter): levels differ by gigabytes."""
    at = [sample["at_s"] / 60 for sample in samples]
    base = next((index for index, minute in enumerate(at) if minute >= 1), len(at) - 1)
    series = {f"RSS of {pid} and below": [sample["rss_bytes"].get(pid) for sample in samples] for pid in samples[0]["rss_bytes"]}
    series["GPU"] = [sample["gpu_bytes"] for sample in samples]
    for (label, values), colour in zip(series.items(), (GREEN, PURPLE, BLUE, ORANGE, SKY, YELLOW), strict=False):
        if all(value is not None for value in values):
            axes.plot(
                at, [(value - values[base]) / MIB for value in values], "-", color=colour, label=f"{label}, {values[base] / MIB:,.0f} MiB"
            )


def main() -> int:
    return plot_main(draw, program="-m bench.serve.soak_plot", file_of="duomo bench soak", if_nothing="no half minute was whole")


if __name__ == "__main__":
    sys.exit(main())
