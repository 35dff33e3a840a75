"""Draws time against batch or prompt with the floor, ours and vLLM, from a result file of `duomo bench engine`. Knows no GPU.

    python bench/engine/engine_plot.py bench/results/engine_h100.json      # writes engine_h100_<phase>_<model>_<format>.png and .svg

Needs matplotlib: pip install 'duomo[bench]'.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.kernels.plot import PlotsNeedMatplotlib

# Okabe and Ito's colours, as in the plots of the kernels: they stay apart in grey and for colour-blind eyes.
STYLES = {
    "ours": ("Duomo", "#0072B2", "o-"),
    "vllm_in_process": ("vLLM, in process", "#D55E00", "s--"),
    "vllm_own_process": ("vLLM, own process", "#CC79A7", "v--"),
    "vllm_extended": ("vLLM, graphs to 4,096 tokens", "#E69F00", "^--"),
    "ours_bf16": ("Duomo in bf16", "#56B4E9", "o:"),
}
Row = Mapping[str, Any]


def draw(result: Path) -> list[Path]:
    """PNG and SVG for each phase, model and format that was measured at two sizes or more: decode at 1,024 keys, single prompts."""
    content = json.loads(result.read_text())
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in content["cases"]:
        is_drawn = row["context_tokens"] == 1024 if row["section"] == "decode" else row["batch"] == 1
        if "ours" in row["times"] and is_drawn:
            groups.setdefault((row["section"], row["shape"], row["dtype"]), []).append(row)
    written: list[Path] = []
    for (section, shape, dtype), found in groups.items():
        if len(found) >= 2:
            title = f"{'decode step, 1,024 keys' if section == 'decode' else 'one prompt to its first token'}, {shape}, {dtype}"
            stem = result.with_name(f"{result.stem}_{section}_{shape}_{dtype}")
            written += _draw_one(sorted(found, key=lambda row: int(row["tokens"])), title, str(content["device"]), stem)
    return written


def _draw_one(rows: Sequence[Row], title: str, device: str, stem: Path) -> list[Path]:
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise PlotsNeedMatplotlib("matplotlib is not installed: pip install 'duomo[bench]'") from missing
    figure = Figure(figsize=(7.5, 5.0), layout="constrained")
    axes = figure.subplots()
    sizes = [row["tokens"] for row in rows]
    floors = [row["floor_us"] / 1e3 for row in rows]
    axes.fill_between(sizes, floors, color="#999999", alpha=0.25, linewidth=0, label="floor")
    for name, (label, colour, line) in STYLES.items():
        points = [(row["tokens"], row["times"][name]["median_us"] / 1e3) for row in rows if name in row["times"]]
        if points:
            axes.plot(*zip(*points, strict=True), line, color=colour, label=label, markersize=4)
    axes.set(xscale="log", yscale="log", xlabel="sequences" if rows[0]["section"] == "decode" else "tokens", ylabel="milliseconds")
    axes.set_title(f"{title}\n{device}")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=45, minor=False)
    axes.set_xticks([], minor=True)
    axes.set_ylim(bottom=0.7 * min(floors))
    axes.grid(True, which="both", axis="y", alpha=0.25)
    axes.legend(frameon=False)
    paths = [stem.with_name(stem.name + suffix) for suffix in (".png", ".svg")]
    for path in paths:
        figure.savefig(path, dpi=140, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def main() -> int:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        print("usage: python bench/engine/engine_plot.py RESULT.json, a file of `duomo bench engine`", file=sys.stderr)
        return 2
    try:
        written = draw(Path(sys.argv[1]))
    except PlotsNeedMatplotlib as missing:
        print(f"plot: {missing}", file=sys.stderr)
        return 2
    print("\n".join(map(str, written)) or "nothing to draw: no case was measured at two sizes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
