"""Owns a campaign: the options that all benchmarks of an engine share, its children one after the other, their parts. Knows no engine.

This process never touches the GPU. Each child leaves its part in --parts after every case; the report is written again after every
child, so that what an interrupted run measured is there. Exit codes: 0 measured, 1 a result was wrong, 2 there is no GPU, or nothing to
merge.
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from bench.engine.engine_cases import DTYPES, MODELS, MODELS_FOLDER, MODES, Dtype, Job, Mode, Part, part_from_json
from bench.engine.engine_job import FOLDER_VARIABLE, start
from bench.gpu_stopwatch import RESULTS, require_gpu, write_result
from duomo.models.config import ModelConfig, load_config

LEAST_JOB_S = 100.0  # a child that starts later would have loaded its model and have no time for a case


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """The command line, checked. name: "engine" of `duomo bench engine`."""

    name: str
    jobs: tuple[Job, ...]
    budget_s: float
    parts: Path
    out: Path | None
    merge_only: bool
    plots: bool


Report = Callable[[Sequence[Part], Path | None], Path]  # writes the result file, returns its path
Draw = Callable[[Path], list[Path]]


def parser_of(name: str, description: str, *, modes: Sequence[str], dtypes: Sequence[str]) -> argparse.ArgumentParser:
    """The options of every campaign; dtypes: the default's."""
    parser = argparse.ArgumentParser(prog=f"duomo bench {name}", description=description)
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {','.join(MODELS)}")
    parser.add_argument("--dtypes", default=",".join(dtypes), help=f"of {','.join(DTYPES)}")
    parser.add_argument("--side", default="both", choices=("both", "ours", "vllm"), help="whose children run")
    parser.add_argument("--modes", default="", help=f"children, of {','.join(modes)}; default: all of --side")
    parser.add_argument("--cases", default="", help="parts of cases' names, such as '1 x 1024,16 x'; default: all")
    parser.add_argument("--repeats", type=int, default=9, help="waves of each prefill case (a decode case has 64 steps)")
    parser.add_argument("--budget-s", type=float, default=3600.0, help="cases and children that would start later are left out and named")
    parser.add_argument("--parts", type=Path, default=parts_folder(name), help="folder of the children's results; kept for --merge")
    parser.add_argument("--merge", action="store_true", help="measure nothing: join what is in --parts")
    parser.add_argument("--out", type=Path, help=f"result file; default: {RESULTS}/{name}_<gpu>.json")
    parser.add_argument("--no-plots", action="store_true", help="only the numbers")
    return parser


def parts_folder(name: str) -> Path:
    return Path(tempfile.gettempdir()) / f"duomo-bench-{name}"


JobOf = Callable[[Mode, str, Dtype], Job | None]  # None: nothing of what was asked for is this mode's


def asked_of(
    name: str, parser: argparse.ArgumentParser, options: argparse.Namespace, sides: Mapping[str, Sequence[Mode]], job_of: JobOf
) -> Asked:
    """A job for each model, format and mode; exits with 2 where a word is none of those allowed."""

    def words(option: str, allowed: Sequence[str]) -> tuple[str, ...]:
        found = tuple(word for word in getattr(options, option).split(",") if word)
        if unknown := [word for word in found if word not in allowed]:
            parser.error(f"--{option}: {', '.join(unknown)}: not among {', '.join(allowed)}")
        return found

    if options.repeats < 1 or options.budget_s <= 0:
        parser.error("--repeats and --budget-s are above 0")
    models, dtypes = words("models", tuple(MODELS)), words("dtypes", DTYPES)
    modes = words("modes", sides["both"]) or tuple(sides[options.side])
    jobs = [
        replace(job, repeats=options.repeats, budget_s=options.budget_s)
        for dtype in cast(tuple[Dtype, ...], dtypes)
        for model in models
        for mode in cast(tuple[Mode, ...], modes)
        if (job := job_of(mode, model, dtype)) is not None
    ]
    return Asked(
        name=name,
        jobs=tuple(jobs),
        budget_s=options.budget_s,
        parts=options.parts,
        out=options.out,
        merge_only=options.merge,
        plots=not options.no_plots,
    )


def wanted_names(parser: argparse.ArgumentParser, option: str, names: Sequence[str]) -> frozenset[str]:
    """The names that hold one of the words of --cases; all where there are none. Exits with 2 where no name does."""
    words = [word.strip() for word in option.split(",") if word.strip()]
    found = frozenset(name for name in names if not words or any(word in name for word in words))
    if not found:
        parser.error(f"--cases: {option!r}: no case is called so; there are {', '.join(names)}")
    return found


def conduct(asked: Asked, report: Report, draw: Draw) -> int:
    """Run the campaign and say what it found: the exit code."""
    command = f"duomo bench {asked.name}"
    if not asked.merge_only:
        require_gpu(command)
        _measure(asked, report)
    parts = read_parts(asked.parts)
    if not parts:
        print(f"{command}: no part in {asked.parts}: nothing was measured there", file=sys.stderr)
        return 2
    out = report(parts, asked.out)
    if asked.plots:
        _draw(out, draw)
    content = json.loads(out.read_text())
    for what in content["left_out"]:
        print(f"left out: {what}")
    print(f"\n{content['device']}, {', '.join(f'{name} {content[name]}' for name in ('driver', 'torch', 'triton', 'vllm', 'commit'))}")
    print(f"ceilings of this run: {content['ceilings']}; result file {out}\n")
    print("\n".join([*content["table"], "", *content["verdicts"]]))
    return 1 if content["red"] else 0


def _measure(asked: Asked, report: Report) -> None:
    """Child after child, as long as there is time."""
    deadline_s = time.monotonic() + asked.budget_s
    has_vllm = _has_vllm()
    for job in asked.jobs:
        if not job.is_ours and not has_vllm:
            print(f"{job.name}: left out, vLLM is neither on sys.path nor where {FOLDER_VARIABLE} points", flush=True)
            continue
        left_s = deadline_s - time.monotonic()
        if left_s < LEAST_JOB_S:
            print(f"{job.name}: left out, {left_s:.0f} s of --budget-s are left", flush=True)
            continue
        started_s = time.monotonic()
        part = start(replace(job, budget_s=left_s), asked.parts / f"{job.model}_{job.dtype}_{job.mode}.json")
        done = "nothing measured" if part is None else part.red or f"{len(part.results) + len(part.loads)} of {job.num_points} cases"
        print(f"{job.name}: {done}, {time.monotonic() - started_s:.0f} s", flush=True)
        if parts := read_parts(asked.parts):
            report(parts, asked.out)


def _has_vllm() -> bool:
    folder = os.environ.get(FOLDER_VARIABLE)
    return importlib.util.find_spec("vllm") is not None or bool(folder and (Path(folder) / "vllm").is_dir())


def read_parts(folder: Path) -> list[Part]:
    """Ours first, models and formats in their order."""
    paths = [folder / f"{model}_{dtype}_{mode}.json" for dtype in DTYPES for model in MODELS for mode in MODES]
    return [part_from_json(json.loads(path.read_text())) for path in paths if path.is_file()]


def configs() -> dict[str, ModelConfig]:
    """Every model that is measured."""
    return {model: load_config(MODELS_FOLDER / folder, needs_weights=False) for model, folder in MODELS.items()}


def write_report(name: str, parts: Sequence[Part], out: Path | None, content: Mapping[str, Any]) -> Path:
    """The result file, with what all campaigns say of their run before `content`; its path, with .red where one of ours was wrong."""
    head = _head(parts)
    red = [f"{part.job.name}: {part.red}" for part in parts if part.red]
    path = out or RESULTS / f"{name}_{gpu_name(str(head['device']))}.json"
    path = path.with_suffix(".red.json") if red else path
    jobs = [{"job": part.job.name, "facts": part.facts, "notes": part.notes} for part in parts]
    left_out = [what for part in parts for what in part.left_out]
    write_result(path, head | {"bench": name, "red": red, "left_out": left_out} | dict(content) | {"jobs": jobs})
    return path


def _head(parts: Sequence[Part]) -> dict[str, Any]:
    """The facts that all children of a run share, and whether they did."""
    names = ("bench", "device", "driver", "torch", "triton", "python", "commit", "date", "repeats")
    head: dict[str, Any] = {}
    for name in (*names, "vllm", "ceilings"):
        seen = list(dict.fromkeys(json.dumps(part.facts[name]) for part in parts if name in part.facts))
        head[name] = json.loads(seen[0]) if seen else "absent"
        if len(seen) > 1 and name not in ("bench", "date", "ceilings"):
            head[f"{name}_of_others"] = [json.loads(one) for one in seen[1:]]
    return head


def gpu_name(device: str) -> str:
    """h100 of "NVIDIA H100 80GB HBM3"."""
    found = re.search(r"\b([a-z]{1,3}\d{2,4}\w*)\b", device.lower())
    return found.group(1) if found else re.sub(r"\W+", "_", device.lower()).strip("_") or "unknown"


def _draw(result: Path, draw: Draw) -> None:
    from bench.axes import PlotsNeedMatplotlib

    try:
        for path in draw(result):
            print(f"plot: {path}")
    except PlotsNeedMatplotlib as missing:
        print(f"no plots: {missing}")
