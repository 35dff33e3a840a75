"""Draws time against tokens with the floor, ours and the peers, from a result file of `duomo bench kernels`. Knows no GPU.

    python bench/kernels/plot.py bench/results/kernels.json      # writes kernels_<section>_<shape>.png and .svg beside it

Needs matplotlib: pip install 'duomo[bench]'.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from bench.kernels.targets import OURS, Case, case_from_json

# Colours that stay apart in grey and for colour-blind eyes (Okabe and Ito); the floor is a grey band's edge.
STYLES = {
    OURS: ("Duomo", "#0072B2", "o-"),
    "vllm": ("vLLM as shipped", "#D55E00", "s--"),
    "vllm_tuned": ("vLLM re-tuned", "#E69F00", "^--"),
    "torch": ("torch grouped GEMM", "#009E73", "d:"),
    "ours_bf16": ("Duomo in bf16", "#56B4E9", "o:"),
}
SECTIONS = {"layer": "MoE layer, bf16", "fp8": "MoE layer, fp8 weights", "gate": "gate and sort"}


class PlotsNeedMatplotlib(ImportError):
    """matplotlib is not installed: the extra `bench` holds it."""


def draw(result: Path) -> list[Path]:
    """PNG and SVG for each section and shape of the file that was measured at two numbers of tokens or more. Returns what was written."""
    content = json.loads(result.read_text())
    cases = [case_from_json(row) for row in content["cases"]]
    groups: dict[tuple[str, str, str], list[Case]] = {}
    for case in cases:
        if case.section in SECTIONS and OURS in case.times:
            groups.setdefault((case.section, case.shape, case.skew), []).append(case)
    written: list[Path] = []
    for (section, shape, skew), found in groups.items():
        if len(found) >= 2:
            stem = "_".join([result.stem, section, shape, *([skew] if skew != "uniform" else [])])
            title = f"{SECTIONS[section]}, {shape}, {skew} routing"
            written += _draw_one(sorted(found, key=lambda case: case.tokens), title, str(content["device"]), result.with_name(stem))
    return written


def _draw_one(cases: list[Case], title: str, device: str, stem: Path) -> list[Path]:
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise PlotsNeedMatplotlib("matplotlib is not installed: pip install 'duomo[bench]'") from missing
    figure = Figure(figsize=(7.5, 5.0), layout="constrained")
    axes = figure.subplots()
    tokens = [case.tokens for case in cases]
    axes.fill_between(tokens, [case.floor_us for case in cases], color="#999999", alpha=0.25, linewidth=0, label="floor")
    for name, (label, colour, line) in STYLES.items():
        points = [(case.tokens, case.times[name].median_us) for case in cases if name in case.times]
        if points:
            axes.plot(*zip(*points, strict=True), line, color=colour, label=label, markersize=4)
    how = "as one of a chain" if cases[0].section == "gate" else "L2 cold"
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=f"microseconds, {how}", title=f"{title}\n{device}")
    axes.set_xticks(tokens, [f"{t:,}" for t in tokens], rotation=45, minor=False)
    axes.set_xticks([], minor=True)
    axes.set_ylim(bottom=0.7 * min(case.floor_us for case in cases))
    axes.grid(True, which="both", axis="y", alpha=0.25)
    axes.legend(frameon=False)
    paths = [stem.with_name(stem.name + suffix) for suffix in (".png", ".svg")]
    for path in paths:
        figure.savefig(path, dpi=140, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def main() -> int:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        print("usage: python bench/kernels/plot.py RESULT.json, a file of `duomo bench kernels`", file=sys.stderr)
        return 2
    try:
        written = draw(Path(sys.argv[1]))
    except PlotsNeedMatplotlib as missing:
        print(f"plot: {missing}", file=sys.stderr)
        return 2
    print("\n".join(map(str, written)) or "nothing to draw: no case was measured at two numbers of tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
