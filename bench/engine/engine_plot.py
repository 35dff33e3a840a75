"""Draws time against batch or prompt with the floor, ours and vLLM, from a result file of `duomo bench engine`. Knows no GPU.

    python -m bench.engine.engine_plot bench/results/engine_h100.json      # writes engine_h100_<phase>_<model>_<format>.png and .svg

Needs matplotlib: pip install 'duomo[bench]'.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.axes import BLUE, ORANGE, PURPLE, SKY, YELLOW, Axes, draw_curves, plot_main

STYLES = {
    "ours": ("Duomo", BLUE, "o-"),
    "vllm_in_process": ("vLLM, in process", ORANGE, "s--"),
    "vllm_own_process": ("vLLM, own process", PURPLE, "v--"),
    "vllm_extended": ("vLLM, graphs to 4,096 tokens", YELLOW, "^--"),
    "ours_bf16": ("Duomo in bf16", SKY, "o:"),
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
    axes = Axes(title=f"{title}\n{device}", xlabel="sequences" if rows[0]["section"] == "decode" else "tokens", ylabel="milliseconds")
    curves = {name: [(row["tokens"], row["times"][name]["median_us"] / 1e3) for row in rows if name in row["times"]] for name in STYLES}
    return draw_curves(stem, axes, STYLES, [(row["tokens"], row["floor_us"] / 1e3) for row in rows], curves)


def main() -> int:
    return plot_main(
        draw, program="-m bench.engine.engine_plot", file_of="duomo bench engine", if_nothing="no case was measured at two sizes"
    )


if __name__ == "__main__":
    sys.exit(main())
