"""Owns child processes: starting one for a job, waiting until the GPU is free again, and the child's own command line. Knows no engine.

The parent never touches the GPU. What a child prints goes to a file beside its part; its last lines are shown where it failed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from bench.engine.engine_cases import OUR_MODES, Job, Mode, Part, job_from_json, part_from_json
from bench.stopwatch import ROOT

FOLDER_VARIABLE = "DUOMO_BENCH_VLLM"  # where vLLM lies, if it is not on sys.path; the same name as in bench/kernels/peers_vllm.py
FREE_MIB = 2048  # a GPU on which less is in use is free
GRACE_S = 150.0  # beyond a job's budget: its start, its last case

MeasureJob = Callable[[Job, Part, Path, float], None]


def module_of(mode: Mode) -> str:
    """The program of a job of this mode."""
    if mode == "ours_arrivals":
        return "bench.engine.arrivals_run"
    return "bench.engine.engine_ours" if mode in OUR_MODES else "bench.engine.engine_vllm"


def run_job(measure: MeasureJob) -> int:
    """The child: `JOB.json PART.json`. Returns 2 where it was not called rightly; else it ends the process: 0 measured, 1 wrong."""
    if len(sys.argv) != 3:
        print(f"usage: {sys.argv[0]} JOB.json PART.json; started by `duomo bench engine` or `duomo bench prefill`", file=sys.stderr)
        return 2
    job, out = job_from_json(json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2])
    part = Part(job=job, facts={})
    part.write(out)
    code = 1
    try:
        measure(job, part, out, time.monotonic() + job.budget_s)
        code = 1 if part.red else 0
    except Exception:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a peer's threads may keep an ordinary exit waiting for ever, and the GPU with it


def start(job: Job, out: Path) -> Part | None:
    """Run the job to its end in a child; its part, or None where it wrote none. Kills what the child leaves behind."""
    request, log = out.with_suffix(".job.json"), out.with_suffix(".log")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    request.write_text(json.dumps(asdict(job)))
    with log.open("w") as stream:
        child = subprocess.Popen(
            [sys.executable, "-m", module_of(job.mode), str(request), str(out)],
            cwd=ROOT, env=_environment(), stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = child.wait(job.budget_s + GRACE_S)
        except subprocess.TimeoutExpired:
            code = -signal.SIGKILL
        finally:
            _end_group(child)
    request.unlink(missing_ok=True)
    if code:
        tail = "\n    ".join(log.read_text(errors="replace").splitlines()[-25:])
        print(f"{job.name}: the child ended with {code}; the end of {log}:\n    {tail}", file=sys.stderr, flush=True)
    wait_until_free()
    if not out.is_file():
        return None
    part = part_from_json(json.loads(out.read_text()))
    if code and not part.red:
        part.notes.append(f"{job.name}: the child ended with {code}")
        part.write(out)
    return part


def _environment() -> dict[str, str]:
    roots = [str(ROOT), str(ROOT / "kernels"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    roots.append(os.environ.get(FOLDER_VARIABLE, ""))
    return dict(os.environ) | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(root for root in roots if root))}


def _end_group(child: subprocess.Popen[bytes]) -> None:
    """The child and its own children: vLLM's core is one. The group's number is the child's, which started the session."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.wait()


def used_mib() -> int | None:
    """Memory in use on the first GPU; None where nobody can say."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        run = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    first = run.stdout.strip().splitlines()[:1]
    return int(first[0]) if run.returncode == 0 and first and first[0].strip().isdigit() else None


def wait_until_free(at_most_s: float = 30.0) -> None:
    """Until what a child held is given back; says so where it is not."""
    deadline_s = time.monotonic() + at_most_s
    while (used := used_mib()) is not None and used > FREE_MIB:
        if time.monotonic() > deadline_s:
            print(f"{used:,} MiB of the GPU are still in use: the next child may find too little", file=sys.stderr, flush=True)
            return
        time.sleep(0.5)
