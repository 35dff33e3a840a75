"""Draws hit rates by load, from a result file of `duomo bench routing`. Knows no simulator.

    python -m bench.serve.route_plot routing_sim.json      # writes routing_sim.png and .svg beside it

Needs matplotlib: pip install 'duomo[bench]'.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from bench.axes import BLUE, FLOOR_GREY, GREEN, ORANGE, new_figure, plot_main, save

COLOURS = {"duomo": BLUE, "least_loaded": ORANGE, "random": GREEN}
LINES = {(0.0, 1): "-", (0.0, 4): "--", (1.0, 4): ":"}


def draw(result: Path) -> list[Path]:
    """PNG and SVG. Empty where there is no prefix-heavy run."""
    rows = json.loads(result.read_text())["prefix"]
    if not rows:
        return []
    figure, axes = new_figure()
    for (skew, gateways), line in LINES.items():
        for way, colour in COLOURS.items():
            points = [
                (row["rate"], row["hit_over_oracle"]) for row in rows if (row["skew"], row["gateways"], row["way"]) == (skew, gateways, way)
            ]
            if points:
                label = f"{way}, {gateways} gateway{'s' if gateways > 1 else ''}{', skewed' if skew else ''}"
                axes.plot(*zip(*points, strict=True), f"o{line}", color=colour, label=label, markersize=4)
    axes.axhline(0.9, color=FLOOR_GREY, linestyle=":")
    axes.set(
        xlabel="requests/s", ylabel="hit rate over the oracle's", title="4 simulated prefill replicas, prompts of 512 tokens, 70% shared"
    )
    axes.set_ylim(0, 1.05)
    axes.grid(True, alpha=0.25)
    axes.legend(frameon=False, fontsize="x-small", ncol=3)
    return save(figure, result.with_suffix(""))


def main() -> int:
    return plot_main(draw, program="-m bench.serve.route_plot", file_of="duomo bench routing", if_nothing="no prefix-heavy run")


if __name__ == "__main__":
    sys.exit(main())
