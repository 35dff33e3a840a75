"""Draws prompts by length and the modes beside decode, from a result file of `duomo bench prefill`. Knows no GPU.

    python -m bench.engine.prefill_plot bench/results/prefill_h100.json    # writes prefill_h100_prefill_<model>_<format>.png and .svg,
                                                                           # prefill_h100_beside_... and prefill_h100_waves_...

Needs matplotlib: pip install 'duomo[bench]'.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.axes import BLUE, ORANGE, YELLOW, new_figure, plot_main, save
from bench.engine import engine_plot
from bench.engine.arrivals_cases import LoadResult, load_result_from_json

STYLES = {"layered": ("layered", BLUE, "o-"), "chunked": ("chunked", ORANGE, "s--"), "whole": ("whole", YELLOW, "^")}


def draw(result: Path) -> list[Path]:
    """PNG and SVG of everything that was measured at two points or more."""
    content = json.loads(result.read_text())
    written = engine_plot.draw(result)
    for arrivals in content["arrivals"]:
        loads = [load_result_from_json(one) for one in arrivals["loads"] if not one["failures"]]
        beside = [one for one in loads if one.load.experiment == "beside" and one.itl is not None and one.ttft is not None]
        if len(beside) >= 2:
            stem = result.with_name(f"{result.stem}_beside_{arrivals['model']}_{arrivals['dtype']}")
            written += _draw_beside(beside, f"prompts beside decode, {arrivals['model']}, {arrivals['dtype']}\n{content['device']}", stem)
        waves = next((one for one in loads if one.load.experiment == "overtake" and one.load.mode == "layered" and one.waves), None)
        if waves is not None:
            stem = result.with_name(f"{result.stem}_waves_{arrivals['model']}_{arrivals['dtype']}")
            written += _draw_waves(waves, f"{waves.load.name}, {arrivals['model']}, {arrivals['dtype']}\n{content['device']}", stem)
    return written


def _draw_waves(one: LoadResult, title: str, stem: Path) -> list[Path]:
    """When the waves that the file lists ran: a long one goes on below while short ones overtake it."""
    figure, axes = new_figure()
    for place, (label, colour) in enumerate((("long", ORANGE), ("short", BLUE))):
        kind = [wave for wave in one.waves if (wave.num_tokens >= one.load.long_tokens) == (label == "long")]
        spans = [(1e3 * wave.started_s, 1e3 * max(wave.ended_s - wave.started_s, 1e-4)) for wave in kind]
        axes.broken_barh(spans, (place - 0.3, 0.6), facecolors=colour, edgecolors="white", linewidth=0.5)
    axes.set_yticks([0, 1], [f"{one.load.long_tokens:,} tokens", f"{min(one.load.lengths):,} tokens"])
    axes.set(xlabel="milliseconds", title=title)
    axes.grid(True, axis="x", alpha=0.25)
    return save(figure, stem)


def _draw_beside(loads: Sequence[LoadResult], title: str, stem: Path) -> list[Path]:
    """Mean time to the first token over the time between tokens, a row for each rate, a curve for each mode."""
    rates = sorted({one.load.rate_per_s for one in loads})
    figure, drawn = new_figure(len(rates))
    for axes, rate in zip([drawn] if len(rates) == 1 else list(drawn), rates, strict=True):
        for mode, (label, colour, line) in STYLES.items():
            points = sorted(_point(one) for one in loads if (one.load.mode, one.load.rate_per_s) == (mode, rate))
            if points:
                axes.plot([x for x, _, _ in points], [y for _, y, _ in points], line, color=colour, label=label, markersize=5)
            for x, y, size in points:
                axes.annotate(size, (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
        axes.set(ylabel=f"mean TTFT, ms\n{rate:g} prompts/s", yscale="log")
        axes.grid(True, which="both", alpha=0.25)
    first, last = [drawn, drawn] if len(rates) == 1 else [drawn[0], drawn[-1]]
    first.set_title(title)
    first.legend(frameon=False)
    last.set_xlabel("time between tokens, 95th percentile, ms (beside each point: piece target in chunks of 512 alone, or rows of a chunk)")
    return save(figure, stem)


def _point(one: LoadResult) -> tuple[float, float, str]:
    assert one.itl is not None and one.ttft is not None
    return 1e3 * one.itl.p95_s, 1e3 * one.ttft.mean_s, one.load.mode_name.removeprefix(one.load.mode).strip()


def main() -> int:
    return plot_main(
        draw, program="-m bench.engine.prefill_plot", file_of="duomo bench prefill", if_nothing="nothing was measured at two points"
    )


if __name__ == "__main__":
    sys.exit(main())
