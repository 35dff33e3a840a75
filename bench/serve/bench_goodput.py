"""Owns a campaign of loads on servers that it starts and ends: goodput of one system beside others on the same cards. Knows no server.

    duomo bench goodput bench/serve/goodput_two_cards.toml --out results --set vllm_path=/opt/vllm
    duomo bench goodput PLAN --out results --only split                          # some of its phases; what others measured is kept

A plan (goodput_plan.py) says which servers stand side by side and which loads each gets; loads are `duomo bench serve`'s, with the unloaded
times of one side as everybody's limits. Into the folder go each load's result file, each server's log, and goodput.json: of every side and
mix the highest rate that kept the share, and that of the others over the best peer's. Exit code 1 where a side did not start, a load failed
or was not the server's (its client was late).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from bench.serve import serve_options
from bench.serve.goodput_plan import LoadPlan, PhasePlan, Plan, PlanError, SidePlan, read_plan
from bench.serve.goodput_servers import LOG_TAIL_BYTES, Servers, served
from bench.serve.host_facts import ROOT
from bench.serve.serve_compare import tables


@dataclass(frozen=True, kw_only=True)
class Asked:
    plan: Plan
    out: Path
    only: tuple[str, ...]


class Loads:
    """Load processes, each with its clients a session of its own. Once close() is called those that run are killed and none is started."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._has_ended = False

    def run(self, command: Sequence[str], said: Path) -> int:
        """Its exit code; into `said` goes what it says."""
        with said.open("wb") as file:
            with self._lock:
                if self._has_ended:
                    return -signal.SIGKILL
                environment = os.environ | _paths()
                process = subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
                )
                self._running.add(process)
            code = process.wait()
        with self._lock:
            self._running.discard(process)
        return code

    def close(self) -> None:
        with self._lock:
            self._has_ended = True
            for process in self._running:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)


def run_phase(asked: Asked, phase: PhasePlan) -> list[str]:
    """What failed. Results of the same sides that an earlier run has left are gone once it begins."""
    limits = _limits_file(asked)
    if asked.plan.limits_from in {side.name for side in phase.sides}:
        limits.unlink(missing_ok=True)
    elif not limits.exists():
        return [f"{phase.name}: not run, there are no limits: {limits} is not there"]
    for side in phase.sides:
        for load in side.loads:
            _result_file(asked.out, side, load).unlink(missing_ok=True)
    for command in phase.prepare:
        done = subprocess.run(shlex.split(command), cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            return [f"{phase.name}: {command}: {(done.stdout + done.stderr).strip()[-LOG_TAIL_BYTES:]}"]
    # Left from the last to the first: loads are killed before their threads are waited for, those before servers are ended.
    with served(phase.sides, asked.out) as (ready, failures), ThreadPoolExecutor() as threads, contextlib.closing(Loads()) as loads:
        for servers in ready:
            if servers.side.name == asked.plan.limits_from:
                failures += _load(
                    loads, servers.side, asked.plan.limits_load, command_of(asked.plan, servers.side, asked.plan.limits_load, limits)
                )
        waits = [threads.submit(_loads, asked, servers, loads) for servers in ready]
        for wait in waits:
            failures += wait.result()
    return failures


def _limits_file(asked: Asked) -> Path:
    return asked.out / f"{asked.plan.limits_from}_unloaded.json"


def _result_file(out: Path, side: SidePlan, load: LoadPlan) -> Path:
    return out / f"{side.name}_{load.name}.json"


def _loads(asked: Asked, servers: Servers, loads: Loads) -> list[str]:
    """One after the other, until a server of these ends: what it could not answer any more says nothing of the rates it bears."""
    side, limits = servers.side, _limits_file(asked)
    if not limits.exists():
        return [f"{side.name}: not loaded, there are no limits: {limits} is not there"]
    failures = list[str]()
    for load in side.loads:
        out = _result_file(asked.out, side, load)
        failures += _load(loads, side, load, [*command_of(asked.plan, side, load, out), "--slo-from", str(limits)])
        if told := servers.ended(f"while {load.mix} was asked"):
            out.unlink(missing_ok=True)
            return [*failures, told]
    return failures


def command_of(plan: Plan, side: SidePlan, load: LoadPlan, out: Path) -> list[str]:
    """Of the load's process, but for the limits."""
    urls = [part for url in side.urls for part in ("--url", url)]
    what = ["--gpus", str(side.gpus), "--label", side.name, "--mix", load.mix, "--rates", load.rates, "--no-plots"]
    return [sys.executable, "-m", "bench.serve.bench_serve", *urls, *what, *plan.options, *load.options, "--out", str(out)]


def _load(loads: Loads, side: SidePlan, load: LoadPlan, command: Sequence[str]) -> list[str]:
    said = Path(command[command.index("--out") + 1]).with_suffix(".txt")
    code = loads.run(command, said)
    _say(f"{side.name} {load.mix}: {'done' if not code else f'exit code {code}'}")
    return [f"{side.name} {load.mix}: {said.read_text(errors='replace').strip()[-LOG_TAIL_BYTES:]}"] if code else []


def _paths() -> dict[str, str]:
    """This process' modules for the loads', however they are found here."""
    return {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def verdict_of(plan: Plan, out: Path) -> dict[str, Any]:
    """From the result files that are there: of each mix every side's best rate, and of ours that over the best peer's.

    is_highest_tried: the best rate is the highest that was asked, so more may be in the side: over such a peer the ratio is at most that.
    """
    told: dict[str, Any] = {}
    for side in plan.sides():
        for load in side.loads:
            file = _result_file(out, side, load)
            if file.exists():
                told.setdefault(load.mix, {})[side.name] = _row(side, json.loads(file.read_text()))
    for rows in told.values():
        peers = {name: row for name, row in rows.items() if row["is_peer"]}
        best = max(peers, key=lambda name: peers[name]["goodput_per_s"] or 0.0, default=None)
        best_per_s = 0.0 if best is None else peers[best]["goodput_per_s"] or 0.0
        lowest_failed = min((min(row["rates_tried"]) for row in peers.values() if row["goodput_per_s"] is None), default=None)
        for row in rows.values():
            if not row["is_peer"]:
                row["best_peer"] = best if best_per_s else None
                row["over_best_peer"] = round(row["goodput_per_s"] / best_per_s, 3) if best_per_s and row["goodput_per_s"] else None
                row["lowest_rate_at_which_a_peer_failed"] = lowest_failed
    return told


def _row(side: SidePlan, content: dict[str, Any]) -> dict[str, Any]:
    best, tried = content["best"], [side.stand_for * point["rate"] for point in content["points"]]
    rate = None if best is None else side.stand_for * best["rate"]
    goodput = None if best is None else side.stand_for * best["goodput_per_s"]
    return {
        "gpus": side.stand_for * side.gpus,
        "measured_gpus": side.gpus,
        "rate": rate,
        "is_highest_tried": rate == max(tried),
        "goodput_per_s": None if goodput is None else round(goodput, 4),
        "goodput_per_gpu_per_s": None if goodput is None or not side.gpus else round(goodput / side.stand_for / side.gpus, 4),
        "is_peer": side.is_peer,
        "rates_tried": tried,
        "limits": content["limits"],
        "date": content["date"],
        "commit": content["commit"],
    }


def report(plan: Plan, out: Path) -> None:
    """goodput.json, and a table for each mix."""
    verdict = verdict_of(plan, out)
    (out / "goodput.json").write_text(json.dumps(verdict, indent=1) + "\n")
    for mix, rows in verdict.items():
        name = LoadPlan(mix=mix, rates="1").name
        files = [json.loads((out / f"{side}_{name}.json").read_text()) for side in rows]
        _say(f"\n== {mix}\n{tables(files)}")
    _say(json.dumps(verdict, indent=1))


def parse(arguments: Sequence[str]) -> Asked:
    parser = argparse.ArgumentParser(prog="duomo bench goodput", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--only", default="", help="phases, by name: a,b; left out: all")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="instead of one of the plan's values")
    options = parser.parse_args(arguments)
    values = dict(each.partition("=")[::2] for each in options.set)
    try:
        plan = read_plan(options.plan, values | {"out": str(options.out.resolve())})
        check_loads(plan)
    except PlanError as error:
        parser.error(str(error))
    only = tuple(name for name in options.only.split(",") if name)
    names = [phase.name for phase in plan.phases]
    if unknown := [name for name in only if name not in names]:
        parser.error(f"--only {unknown[0]}: the plan has {', '.join(names)}")
    return Asked(plan=plan, out=options.out.resolve(), only=only)


def check_loads(plan: Plan) -> None:
    """Raises PlanError where `duomo bench serve` would refuse a load: before servers are started for it."""
    asked = [(f"load {load.mix} of {side.name}", side, load) for side in plan.sides() for load in side.loads]
    limiting = next(side for side in plan.sides() if side.name == plan.limits_from)
    for what, side, load in (("limits_mix and options", limiting, plan.limits_load), *asked):
        arguments = command_of(plan, side, load, Path("checked.json"))[3:]
        with contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                serve_options.parse(arguments, None)
            except SystemExit as error:
                raise PlanError(f"{what}: {(said.getvalue().strip() or f'exit code {error.code}').splitlines()[-1]}") from error


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _say(line: str) -> None:
    print(line, flush=True)


def main() -> int:
    asked = parse(sys.argv[1:])
    for number in (signal.SIGINT, signal.SIGTERM):  # either ends what was started, also of a shell's background job
        signal.signal(number, _stop)
    asked.out.mkdir(parents=True, exist_ok=True)
    failures = []
    for phase in asked.plan.phases:
        if not asked.only or phase.name in asked.only:
            _say(f"-- {phase.name}: {', '.join(side.name for side in phase.sides)}")
            failures += run_phase(asked, phase)
    report(asked.plan, asked.out)
    for failure in failures:
        _say(f"FAILED {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
