"""Draws time against tokens with the floor, ours and the peers, from a result file of `duomo bench kernels`. Knows no GPU.

    python -m bench.kernels.plot bench/results/kernels.json      # writes kernels_<section>_<shape>.png and .svg beside it

Needs matplotlib: pip install 'duomo[bench]'.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from bench.axes import BLUE, GREEN, ORANGE, SKY, YELLOW, Axes, draw_curves, plot_main
from bench.kernels.targets import OURS, Case, case_from_json

STYLES = {
    OURS: ("Duomo", BLUE, "o-"),
    "vllm": ("vLLM as shipped", ORANGE, "s--"),
    "vllm_tuned": ("vLLM re-tuned", YELLOW, "^--"),
    "torch": ("torch grouped GEMM", GREEN, "d:"),
    "ours_bf16": ("Duomo in bf16", SKY, "o:"),
}
SECTIONS = {"layer": "MoE layer, bf16", "fp8": "MoE layer, fp8 weights", "gate": "gate and sort"}


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
    how = "as one of a chain" if cases[0].section == "gate" else "L2 cold"
    axes = Axes(title=f"{title}\n{device}", xlabel="tokens", ylabel=f"microseconds, {how}")
    curves = {name: [(case.tokens, case.times[name].median_us) for case in cases if name in case.times] for name in STYLES}
    return draw_curves(stem, axes, STYLES, [(case.tokens, case.floor_us) for case in cases], curves)


def main() -> int:
    return plot_main(
        draw, program="-m bench.kernels.plot", file_of="duomo bench kernels", if_nothing="no case was measured at two numbers of tokens"
    )


if __name__ == "__main__":
    sys.exit(main())
