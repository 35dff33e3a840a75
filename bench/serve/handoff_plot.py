"""Draws handoffs by message size beside one thread's memcpy, from a result file of `duomo bench handoff`. Knows no agent.

    python -m bench.serve.handoff_plot handoff.json      # writes handoff.png and handoff.svg beside it

Needs matplotlib: pip install 'duomo[bench]'.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

from bench.axes import BLUE, FLOOR_GREY, GREEN, ORANGE, PURPLE, SKY, YELLOW, new_figure, plot_main, save

COLOURS = ((BLUE, SKY, PURPLE), (ORANGE, YELLOW, GREEN))  # of each way: writes alone, whole handoffs, writes within them


def draw(result: Path) -> list[Path]:
    """PNG and SVG. Empty where no handoff was measured."""
    content = json.loads(result.read_text())
    if not any(way["handoffs"] for way in content["ways"].values()):
        return []
    figure, axes = new_figure()
    copied = [row["copy_gb_per_s"]["median"] for way in content["ways"].values() for row in way["transport"]]
    axes.axhline(statistics.median(copied), color=FLOOR_GREY, linewidth=2, label=f"{content['copy']}, {content['handoff_bytes'] >> 20} MiB")
    for (name, way), (alone, whole, within) in zip(content["ways"].items(), COLOURS, strict=False):
        writes = [(row["message_mib"], row["gb_per_s"]["median"]) for row in way["transport"] if row["what"] == "NIXL write"]
        axes.plot(*zip(*sorted(writes), strict=True), "o-", color=alone, label=f"{name}: writes alone, uncached", markersize=4)
        for part, colour, label in (("whole", whole, "whole handoff"), ("writes", within, "writes within it")):
            best: dict[int, float] = {}
            for row in way["handoffs"]:
                best[row["slot_mib"]] = max(best.get(row["slot_mib"], 0.0), row[part]["gb_per_s"]["median"])
            axes.plot(*zip(*sorted(best.items()), strict=True), "s--", color=colour, label=f"{name}: {label}", markersize=4)
    axes.set(xscale="log", xlabel="MiB in a message", ylabel="GB/s", title=f"handoff of KV, {content['device']}\n{content['cpu']}")
    ticks = sorted({row["message_mib"] for way in content["ways"].values() for row in way["transport"]})
    axes.set_xticks(ticks, [str(size) for size in ticks])
    axes.set_xticks([], minor=True)
    axes.set_ylim(0, 1.6 * axes.get_ylim()[1])  # room for the legend
    axes.grid(True, axis="y", alpha=0.25)
    axes.legend(frameon=False, fontsize="small")
    return save(figure, result.with_suffix(""))


def main() -> int:
    return plot_main(draw, program="-m bench.serve.handoff_plot", file_of="duomo bench handoff", if_nothing="no handoff was measured")


if __name__ == "__main__":
    sys.exit(main())
