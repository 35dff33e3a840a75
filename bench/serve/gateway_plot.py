"""Draws what `duomo bench gateway` measured: what is added to a first token, to gaps, and tokens a CPU second. Knows no server.

    python -m bench.serve.gateway_plot gateway_cpu.json      # writes gateway_cpu.png and gateway_cpu.svg beside it

Needs matplotlib: pip install 'duomo[bench]'.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from bench.axes import BLUE, GREEN, ORANGE, new_figure, plot_main, save

FIGURES = {
    "added_ttft_p50_ms": ("ms added to the first token, p50", BLUE),
    "added_gap_p99_ms": ("ms added to a gap, p99", ORANGE),
    "tokens_per_cpu_s": ("tokens a CPU second", GREEN),
}


def draw(result: Path) -> list[Path]:
    """PNG and SVG: a row for each figure, a bar for each side, the target as a line. Empty where nothing but memory was measured."""
    content = json.loads(result.read_text())
    medians = {name: figures for name, figures in content["medians"].items() if name != "bare"}  # a stub's own CPU is no gateway's
    if not medians:
        return []
    figure, rows = new_figure(num_rows=len(FIGURES))
    for axes, (key, (label, colour)) in zip(rows, FIGURES.items(), strict=True):
        values = [figures[key] for figures in medians.values()]
        axes.bar(list(medians), values, color=colour, width=0.5)
        axes.axhline(content["targets"][key], color="black", linewidth=1, linestyle="--")
        axes.set(ylabel=label, yscale="log")
        for at, value in enumerate(values):
            axes.annotate(f"{value:,.2f}" if value < 100 else f"{value:,.0f}", (at, value), ha="center", va="bottom")
        axes.margins(y=0.2)
        axes.grid(True, axis="y", alpha=0.25)
    rows[0].set_title(f"{content['streams']} streams, a step of {1e3 * content['step_s']:.0f} ms; dashed: the target\n{content['cpu']}")
    return save(figure, result.with_suffix(""))


def main() -> int:
    return plot_main(
        draw, program="-m bench.serve.gateway_plot", file_of="duomo bench gateway", if_nothing="nothing but memory was measured"
    )


if __name__ == "__main__":
    sys.exit(main())
