"""Measures our engine beside vLLM's on one GPU: decode by batch and context, prefill by length (`duomo bench engine`).

Same random weights (drawn by name in both), same prompts, greedy; each engine in a child process, one at a time, this process never
touches the GPU. Each child leaves its part in --parts after every case; the result file is written again after every child, so that what
an interrupted run measured is there. The table and the verdicts come last. Exit codes: 0 measured, 1 a result was wrong (its times are not
reported, and the file is called .red.json), 2 there is no GPU, or nothing to merge.

    duomo bench engine                                                # everything: about half an hour
    duomo bench engine --models olmoe --dtypes bf16 --side ours       # one child: its part is kept in --parts
    duomo bench engine --models olmoe --dtypes bf16 --side vllm       # four children
    duomo bench engine --merge                                        # no GPU: table, verdicts and plots from the parts

vLLM is found on sys.path or where DUOMO_BENCH_VLLM points.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from bench.engine.engine_cases import CASES, DTYPES, MODELS, MODELS_FOLDER, MODES, Dtype, EngineCase, Job, Mode, Part, part_from_json
from bench.engine.engine_job import FOLDER_VARIABLE, start
from bench.engine.engine_targets import first_token_lines, join, table, verdicts
from bench.gpu_stopwatch import RESULTS, require_gpu, write_result
from duomo.models.config import load_config

SIDES: dict[str, tuple[Mode, ...]] = {"both": MODES, "ours": ("ours",), "vllm": MODES[1:]}
LEAST_JOB_S = 100.0  # a child that starts later would have loaded its model and have no time for a case
PARTS = Path(tempfile.gettempdir()) / "duomo-bench-engine"


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """The command line, checked."""

    jobs: tuple[Job, ...]
    budget_s: float
    parts: Path
    out: Path | None
    merge_only: bool
    plots: bool


def parse(arguments: Sequence[str] | None = None) -> Asked:
    parser = argparse.ArgumentParser(prog="duomo bench engine", description="our engine beside vLLM's on one GPU")
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {','.join(MODELS)}")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help=f"of {','.join(DTYPES)}")
    parser.add_argument("--side", default="both", choices=tuple(SIDES), help="whose children run")
    parser.add_argument("--modes", default="", help=f"children, of {','.join(MODES)}; default: all of --side")
    parser.add_argument("--cases", default="", help="parts of cases' names, such as 'decode 1 x,prefill'; default: all")
    parser.add_argument("--repeats", type=int, default=9, help="waves of each prefill case (a decode case has 64 steps)")
    parser.add_argument("--budget-s", type=float, default=3600.0, help="cases and children that would start later are left out and named")
    parser.add_argument("--parts", type=Path, default=PARTS, help="folder of the children's results; kept for --merge")
    parser.add_argument("--merge", action="store_true", help="measure nothing: join what is in --parts")
    parser.add_argument("--out", type=Path, help=f"result file; default: {RESULTS}/engine_<gpu>.json")
    parser.add_argument("--no-plots", action="store_true", help="only the numbers (plots: python -m bench.engine.engine_plot FILE)")
    options = parser.parse_args(arguments)

    def words(name: str, allowed: Sequence[str]) -> tuple[str, ...]:
        found = tuple(word for word in getattr(options, name).split(",") if word)
        if unknown := [word for word in found if word not in allowed]:
            parser.error(f"--{name}: {', '.join(unknown)}: not among {', '.join(allowed)}")
        return found

    wanted = [word.strip() for word in options.cases.split(",") if word.strip()]
    cases = tuple(case for case in CASES if not wanted or any(word in case.name for word in wanted))
    if not cases:
        parser.error(f"--cases: {options.cases!r}: no case is called so; there are {', '.join(case.name for case in CASES)}")
    if options.repeats < 1 or options.budget_s <= 0:
        parser.error("--repeats and --budget-s are above 0")
    models, dtypes = words("models", tuple(MODELS)), words("dtypes", DTYPES)
    modes = words("modes", SIDES[options.side]) or SIDES[options.side]
    jobs = [
        Job(mode=mode, model=model, dtype=dtype, cases=asked, repeats=options.repeats, budget_s=options.budget_s)
        for dtype in cast(tuple[Dtype, ...], dtypes)
        for model in models
        for mode in cast(tuple[Mode, ...], modes)
        if (asked := _cases_of(mode, cases))
    ]
    return Asked(
        jobs=tuple(jobs),
        budget_s=options.budget_s,
        parts=options.parts,
        out=options.out,
        merge_only=options.merge,
        plots=not options.no_plots,
    )


def _cases_of(mode: Mode, cases: Sequence[EngineCase]) -> tuple[EngineCase, ...]:
    """More captured sizes change nothing for a decode step: graphs of up to 512 rows are there as shipped."""
    return tuple(case for case in cases if mode != "vllm_extended" or case.phase == "prefill")


def main() -> int:
    asked = parse()
    if not asked.merge_only:
        require_gpu("duomo bench engine")
        _measure(asked)
    parts = read_parts(asked.parts)
    if not parts:
        print(f"duomo bench engine: no part in {asked.parts}: nothing was measured there", file=sys.stderr)
        return 2
    out = report(parts, asked.out)
    if asked.plots:
        _draw(out)
    content = json.loads(out.read_text())
    for what in content["left_out"]:
        print(f"left out: {what}")
    print(f"\n{content['device']}, {', '.join(f'{name} {content[name]}' for name in ('driver', 'torch', 'triton', 'vllm', 'commit'))}")
    print(f"ceilings of this run: {content['ceilings']}; result file {out}\n")
    print("\n".join([*content["table"], "", *content["verdicts"]]))
    return 1 if content["red"] else 0


def _measure(asked: Asked) -> None:
    """Child after child, as long as there is time."""
    deadline_s = time.monotonic() + asked.budget_s
    has_vllm = _has_vllm()
    for job in asked.jobs:
        if job.mode != "ours" and not has_vllm:
            print(f"{job.name}: left out, vLLM is neither on sys.path nor where {FOLDER_VARIABLE} points", flush=True)
            continue
        left_s = deadline_s - time.monotonic()
        if left_s < LEAST_JOB_S:
            print(f"{job.name}: left out, {left_s:.0f} s of --budget-s are left", flush=True)
            continue
        started_s = time.monotonic()
        timed = Job(mode=job.mode, model=job.model, dtype=job.dtype, cases=job.cases, repeats=job.repeats, budget_s=left_s)
        part = start(timed, asked.parts / f"{job.model}_{job.dtype}_{job.mode}.json")
        said = "nothing measured" if part is None else part.red or f"{len(part.results)} of {len(job.cases)} cases"
        print(f"{job.name}: {said}, {time.monotonic() - started_s:.0f} s", flush=True)
        if parts := read_parts(asked.parts):
            report(parts, asked.out)


def _has_vllm() -> bool:
    folder = os.environ.get(FOLDER_VARIABLE)
    return importlib.util.find_spec("vllm") is not None or bool(folder and (Path(folder) / "vllm").is_dir())


def read_parts(folder: Path) -> list[Part]:
    """Ours first, models and formats in their order."""
    found = []
    for dtype in DTYPES:
        for model in MODELS:
            for mode in MODES:
                path = folder / f"{model}_{dtype}_{mode}.json"
                if path.is_file():
                    found.append(part_from_json(json.loads(path.read_text())))
    return found


def report(parts: Sequence[Part], out: Path | None) -> Path:
    """Write the result file; its path, with .red where one of ours was wrong."""
    configs = {model: load_config(MODELS_FOLDER / folder, needs_weights=False) for model, folder in MODELS.items()}
    rows = join(parts, configs)
    head = _head(parts)
    red = [f"{part.job.name}: {part.red}" for part in parts if part.red]
    path = out or RESULTS / f"engine_{gpu_name(str(head['device']))}.json"
    path = path.with_suffix(".red.json") if red else path
    jobs = [{"job": part.job.name, "facts": part.facts, "notes": part.notes} for part in parts]
    write_result(
        path,
        head
        | {
            "red": red,
            "left_out": [what for part in parts for what in part.left_out],
            "first_tokens": {name: list(found) for name, found in first_token_lines(parts)},
            "cases": [row.as_json() for row in rows],
            "table": table(rows),
            "verdicts": [verdict.line() for verdict in verdicts(rows, parts)],
            "jobs": jobs,
        },
    )
    return path


def _head(parts: Sequence[Part]) -> dict[str, Any]:
    """The facts that all children of a run share, and whether they did."""
    names = ("bench", "device", "driver", "torch", "triton", "python", "commit", "date", "repeats")
    head: dict[str, Any] = {}
    for name in (*names, "vllm", "ceilings"):
        seen = list(dict.fromkeys(json.dumps(part.facts[name]) for part in parts if name in part.facts))
        head[name] = json.loads(seen[0]) if seen else "absent"
        if len(seen) > 1 and name not in ("date", "ceilings"):
            head[f"{name}_of_others"] = [json.loads(one) for one in seen[1:]]
    return head


def gpu_name(device: str) -> str:
    """h100 of "NVIDIA H100 80GB HBM3"."""
    found = re.search(r"\b([a-z]{1,3}\d{2,4}\w*)\b", device.lower())
    return found.group(1) if found else re.sub(r"\W+", "_", device.lower()).strip("_") or "unknown"


def _draw(result: Path) -> None:
    from bench.axes import PlotsNeedMatplotlib
    from bench.engine.engine_plot import draw

    try:
        for path in draw(result):
            print(f"plot: {path}")
    except PlotsNeedMatplotlib as missing:
        print(f"no plots: {missing}")


if __name__ == "__main__":
    sys.exit(main())
