"""Owns the look of a plot on logarithmic axes (floor, ours, peers), its files and a plot program's command line. Knows no benchmark.

Needs matplotlib: pip install 'duomo[bench]'.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Okabe and Ito's colours: they stay apart in grey and for colour-blind eyes.
BLUE, ORANGE, PURPLE, YELLOW, GREEN, SKY = "#0072B2", "#D55E00", "#CC79A7", "#E69F00", "#009E73", "#56B4E9"
FLOOR_GREY = "#999999"
MARGIN_BELOW_FLOOR = 0.7  # of the lowest floor, where the axis begins
Style = tuple[str, str, str]  # label, colour, matplotlib's line and marker


class PlotsNeedMatplotlib(ImportError):
    """matplotlib is not installed: the extra `bench` holds it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """What a plot says beside its curves."""

    title: str
    xlabel: str
    ylabel: str


Curves = Mapping[str, Sequence[tuple[float, float]]]  # (size, time) of each series that was measured


def draw_curves(stem: Path, axes: Axes, styles: Mapping[str, Style], floors: Sequence[tuple[float, float]], curves: Curves) -> list[Path]:
    """Writes stem.png and stem.svg: each curve in its style, in the order of styles, over the floor's grey band; both axes logarithmic.

    floors: (size, floor) at every size drawn, at least one, sizes ascending. Curves that have no points are left out.
    Raises PlotsNeedMatplotlib.
    """
    figure, drawn = new_figure()
    sizes, lows = [size for size, _ in floors], [low for _, low in floors]
    drawn.fill_between(sizes, lows, color=FLOOR_GREY, alpha=0.25, linewidth=0, label="floor")
    for name, (label, colour, line) in styles.items():
        if curves.get(name):
            drawn.plot(*zip(*curves[name], strict=True), line, color=colour, label=label, markersize=4)
    drawn.set(xscale="log", yscale="log", xlabel=axes.xlabel, ylabel=axes.ylabel, title=axes.title)
    drawn.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=45, minor=False)
    drawn.set_xticks([], minor=True)
    drawn.set_ylim(bottom=MARGIN_BELOW_FLOOR * min(lows))
    drawn.grid(True, which="both", axis="y", alpha=0.25)
    drawn.legend(frameon=False)
    return save(figure, stem)


def new_figure(num_rows: int = 1) -> tuple[Any, Any]:
    """An empty figure and its axes (an array of them where num_rows > 1, one under another, sharing x). Raises PlotsNeedMatplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise PlotsNeedMatplotlib("matplotlib is not installed: pip install 'duomo[bench]'") from missing
    figure = Figure(figsize=(7.5, 5.0 if num_rows == 1 else 3.2 * num_rows), layout="constrained")
    return figure, figure.subplots(num_rows, sharex=True)


def save(figure: Any, stem: Path) -> list[Path]:
    """stem.png and stem.svg, without a date and with names of fixed salt: the same numbers give the same file."""
    from matplotlib import rc_context

    paths = [stem.with_name(stem.name + suffix) for suffix in (".png", ".svg")]
    with rc_context({"svg.hashsalt": stem.name}):
        for path in paths:
            figure.savefig(path, dpi=140, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def draw_beside(result: Path, draw: Callable[[Path], list[Path]]) -> None:
    """The plots of a result file that was just written, and where they are; without matplotlib that there are none."""
    try:
        for path in draw(result):
            print(f"plot: {path}")
    except PlotsNeedMatplotlib as missing:
        print(f"no plots: {missing}")


def plot_main(draw: Callable[[Path], list[Path]], *, program: str, file_of: str, if_nothing: str) -> int:
    """A plot program: draws the result file that sys.argv names and prints what was written. Returns the exit code, 2 on a fault of use.

    file_of: the command that writes such files; if_nothing: why a file may give no plot.
    """
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        print(f"usage: python {program} RESULT.json, a file of `{file_of}`", file=sys.stderr)
        return 2
    try:
        written = draw(Path(sys.argv[1]))
    except PlotsNeedMatplotlib as missing:
        print(f"plot: {missing}", file=sys.stderr)
        return 2
    print("\n".join(map(str, written)) or f"nothing to draw: {if_nothing}")
    return 0
