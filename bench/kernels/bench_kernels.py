"""Measures the kernels of a layer against their floors and against vLLM's, in one process on one GPU (`duomo bench kernels`).

Prints what it does as it goes, writes the result file, draws the plots, and prints the table and the verdicts last. A
verdict over fewer cases than were asked for, as where the budget ends a run, says how many were left out. Exit codes: 0 measured, 1 a
result was wrong (its time is not reported, and the file is called .red.json), 2 there is no GPU.

    duomo bench kernels                                         # everything, within --budget-s
    duomo bench kernels --only layer,gate --shapes olmoe,qwen3 --tokens 1,8,1024 --skews uniform

The peer is found where DUOMO_BENCH_VLLM points (peers_vllm.py). Clock: router's logits to the layer's output, cold L2, median of replays.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from bench.gpu_stopwatch import RESULTS, facts, require_gpu, write_result
from bench.kernels.shapes import SHAPES, SKEWS, LayerShape, Skew
from bench.kernels.targets import Case, table, verdicts

SECTIONS = ("layer", "gate", "attention", "fp8", "rest", "component")
USUAL = SECTIONS[:-1]  # components are for who looks for time: each is part of a layer that is measured whole
FP8_SHAPES = ("qwen3", "olmoe")
ATTENTION_SHAPES = ("qwen3", "olmoe")


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """The command line, checked."""

    only: tuple[str, ...]
    shapes: tuple[LayerShape, ...]
    tokens: frozenset[int]
    skews: tuple[Skew, ...]
    repeats: int
    budget_s: float
    out: Path
    plots: bool


def parse(arguments: Sequence[str] | None = None) -> Asked:
    parser = argparse.ArgumentParser(prog="duomo bench kernels", description="kernels against their floors and against vLLM's")
    parser.add_argument("--only", default=",".join(USUAL), help=f"sections, of {','.join(SECTIONS)}")
    parser.add_argument("--shapes", default=",".join(SHAPES), help=f"layers, of {','.join(SHAPES)}")
    parser.add_argument("--tokens", default="", help="numbers of tokens (attention: of sequences), such as 1,8,1024; default: all")
    parser.add_argument("--skews", default=",".join(SKEWS), help="popularity of experts: uniform,zipf")
    parser.add_argument("--repeats", type=int, default=50, help="replays of each graph; under 50 a result does not count")
    parser.add_argument("--budget-s", type=float, default=240.0, help="cases that would start later are left out and named")
    parser.add_argument("--out", type=Path, default=RESULTS / "kernels.json", help="result file; plots are written beside it")
    parser.add_argument("--no-plots", action="store_true", help="only the numbers (plots: python -m bench.kernels.plot FILE)")
    options = parser.parse_args(arguments)

    def words(name: str, allowed: Sequence[str]) -> tuple[str, ...]:
        found = tuple(word for word in getattr(options, name).split(",") if word)
        if unknown := [word for word in found if word not in allowed]:
            parser.error(f"--{name}: {', '.join(unknown)}: not among {', '.join(allowed)}")
        return found

    if not all(word.strip().isdigit() and int(word) > 0 for word in options.tokens.split(",") if word):
        parser.error(f"--tokens: {options.tokens!r}: whole numbers above 0, such as 1,8,1024")
    if options.repeats < 1 or options.budget_s <= 0:
        parser.error("--repeats and --budget-s are above 0")
    return Asked(
        only=words("only", SECTIONS),
        shapes=tuple(SHAPES[name] for name in words("shapes", tuple(SHAPES))),
        tokens=frozenset(int(word) for word in options.tokens.split(",") if word),
        skews=cast(tuple[Skew, ...], words("skews", SKEWS)),
        repeats=options.repeats,
        budget_s=options.budget_s,
        out=options.out,
        plots=not options.no_plots,
    )


def main() -> int:
    asked = parse()
    require_gpu("duomo bench kernels")
    # Below: what imports Triton and, where it is there, vLLM.
    from bench.gpu_ceilings import ceilings
    from bench.kernels import peers_vllm
    from bench.kernels.layer_section import Run

    started_s = time.monotonic()
    device = torch.device("cuda", torch.cuda.current_device())
    run = Run(device=device, repeats=asked.repeats, deadline_s=started_s + asked.budget_s, tokens=asked.tokens, skews=asked.skews)
    head = facts("kernels", asked.repeats) | {"vllm": peers_vllm.version(), "ceilings": ceilings()}
    if (reason := peers_vllm.why_absent()) is not None:
        print(f"vLLM is absent ({reason}): ours is measured against the floors alone; {peers_vllm.FOLDER_VARIABLE} names its folder")
    cases = _measure(asked, run)
    is_red = any(case.red for case in cases)
    out = asked.out.with_suffix(".red.json") if is_red else asked.out
    judged = verdicts([*cases, *run.late])
    content = head | {
        "seconds": round(time.monotonic() - started_s, 1),
        "left_out": run.left_out,
        "cases": [case.as_json() for case in cases],
        "verdicts": [verdict.line() for verdict in judged],
    }
    write_result(out, content)
    if asked.plots:
        _draw(out)
    for what in run.left_out:
        print(f"left out: {what}")
    print(f"\n{head['device']}, {', '.join(f'{name} {head[name]}' for name in ('driver', 'torch', 'triton', 'vllm', 'commit'))}")
    print(f"ceilings of this run: {head['ceilings']}; result file {out}\n")
    print("\n".join([*table(cases), "", *(verdict.line() for verdict in judged)]))
    return 1 if is_red else 0


def _measure(asked: Asked, run: object) -> list[Case]:
    """Section by section; what is asked about most comes first, since the budget may end it."""
    from bench.kernels.component_section import measure_components
    from bench.kernels.layer_section import Run, measure_layers
    from bench.kernels.op_sections import measure_attention, measure_gate, measure_rest

    assert isinstance(run, Run), "made by main"
    cases: list[Case] = []

    def add(what: str, found: list[Case]) -> None:
        cases.extend(found)
        print(f"{what}: {len(found)} cases, {sum(bool(case.red) for case in found)} red", file=sys.stderr, flush=True)
        torch.cuda.empty_cache()

    if "gate" in asked.only:
        for shape in asked.shapes:
            add(f"gate {shape.name}", measure_gate(run, shape))
    if "attention" in asked.only:
        for shape in asked.shapes:
            if shape.name in ATTENTION_SHAPES:
                add(f"attention {shape.name}", measure_attention(run, shape))
    if "fp8" in asked.only:
        for shape in asked.shapes:
            if shape.name in FP8_SHAPES:
                add(f"fp8 {shape.name}", measure_layers(run, shape, is_fp8=True))
    if "layer" in asked.only:
        for shape in asked.shapes:
            add(f"layer {shape.name}", measure_layers(run, shape))
    if "component" in asked.only:
        for shape in asked.shapes:
            add(f"component {shape.name}", measure_components(run, shape))
    if "rest" in asked.only:
        add("rest", measure_rest(run))
    return cases


def _draw(result: Path) -> None:
    from bench.axes import PlotsNeedMatplotlib
    from bench.kernels.plot import draw

    try:
        for path in draw(result):
            print(f"plot: {path}")
    except PlotsNeedMatplotlib as missing:
        print(f"no plots: {missing}")


if __name__ == "__main__":
    sys.exit(main())
