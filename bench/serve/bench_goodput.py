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
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.serve.goodput_plan import LoadPlan, PhasePlan, Plan, PlanError, SidePlan, read_plan
from bench.serve.host_facts import ROOT
from bench.serve.serve_compare import tables

LOOK_S = 0.25
END_S = 60.0  # from SIGTERM to SIGKILL
LOG_TAIL_BYTES = 2000


@dataclass(frozen=True, kw_only=True)
class Asked:
    plan: Plan
    out: Path
    only: tuple[str, ...]


class StartError(Exception):
    """A server did not come to serve; the message has what its log ends with."""


class Servers:
    """The processes of a side, each the leader of a group of its own. end() is always called."""

    def __init__(self, side: SidePlan, out: Path) -> None:
        self._side = side
        self._processes: list[tuple[subprocess.Popen[bytes], Path]] = []
        self._out = out

    def start(self) -> None:
        for number, process in enumerate(self._side.processes):
            log_file = self._out / f"{self._side.name}_{number}.log"
            with log_file.open("wb") as log:
                environment = os.environ | process.env
                arguments = shlex.split(process.command)
                try:
                    started = subprocess.Popen(
                        arguments, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                    )
                except OSError as error:
                    raise StartError(f"{self._side.name}: {arguments[0]}: {error}") from error
            self._processes.append((started, log_file))

    def wait_ready(self) -> float:
        """Seconds until every url answered. Raises StartError."""
        started_s = time.monotonic()
        for url in (*self._side.behind, *self._side.urls):
            while not _answers(url + self._side.ready):
                self._check(time.monotonic() - started_s)
                time.sleep(LOOK_S)
        return time.monotonic() - started_s

    def _check(self, waited_s: float) -> None:
        for process, log_file in self._processes:
            if process.poll() is not None:
                raise StartError(f"{self._side.name}: ended with {process.returncode} before it served: {_tail(log_file)}")
        if waited_s > self._side.start_limit_s:
            tails = "; ".join(_tail(log_file) for _, log_file in self._processes)
            raise StartError(f"{self._side.name}: does not serve after {waited_s:.0f} s: {tails}")

    def end(self) -> None:
        """SIGTERM to every group, last started first, and SIGKILL to what is left of it. Returns when all are gone."""
        for process, _ in reversed(self._processes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        end_s = time.monotonic() + END_S
        for process, _ in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end_s - time.monotonic()))
            with contextlib.suppress(ProcessLookupError):  # the leader may be gone, and a child of it not
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2.0) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _tail(file: Path) -> str:
    return file.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace").strip() or "(its log is empty)"


@contextlib.contextmanager
def served(sides: Sequence[SidePlan], out: Path) -> Iterator[tuple[list[SidePlan], list[str]]]:
    """The sides that serve, and why the others do not; all started at once, all ended with the block."""
    servers = [Servers(side, out) for side in sides]
    ready, failures = list[SidePlan](), list[str]()
    try:
        for side, each in zip(sides, servers, strict=True):
            with _noted(failures):
                each.start()
                ready.append(side)
        with ThreadPoolExecutor() as threads:
            waits = [(side, threads.submit(servers[sides.index(side)].wait_ready)) for side in ready]
        ready = []
        for side, wait in waits:
            with _noted(failures):
                _say(f"{side.name} serves after {wait.result():.0f} s")
                ready.append(side)
        yield ready, failures
    finally:
        with ThreadPoolExecutor() as threads:
            list(threads.map(Servers.end, servers))


@contextlib.contextmanager
def _noted(failures: list[str]) -> Iterator[None]:
    try:
        yield
    except StartError as error:
        failures.append(str(error))
        _say(str(error))


def run_phase(asked: Asked, phase: PhasePlan) -> list[str]:
    """What failed."""
    for command in phase.prepare:
        done = subprocess.run(shlex.split(command), cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            return [f"{phase.name}: {command}: {(done.stdout + done.stderr).strip()[-LOG_TAIL_BYTES:]}"]
    with served(phase.sides, asked.out) as (ready, failures):
        limits = _limits_file(asked)
        for side in ready:
            if side.name == asked.plan.limits_from:
                alone = LoadPlan(mix=asked.plan.limits_mix, rates="2", options=["--arrivals", "constant", "--duration-s", "2"])
                failures += _load(asked, side, alone, limits, ())
        with ThreadPoolExecutor() as threads:
            for failed in threads.map(lambda side: _loads(asked, side), ready):
                failures += failed
    return failures


def _limits_file(asked: Asked) -> Path:
    return asked.out / f"{asked.plan.limits_from}_unloaded.json"


def _loads(asked: Asked, side: SidePlan) -> list[str]:
    """One after the other."""
    limits = ("--slo-from", str(_limits_file(asked)))
    if not _limits_file(asked).exists():
        return [f"{side.name}: there are no limits: {_limits_file(asked)} is not there"]
    return [failed for load in side.loads for failed in _load(asked, side, load, asked.out / f"{side.name}_{load.name}.json", limits)]


def _load(asked: Asked, side: SidePlan, load: LoadPlan, out: Path, limits: Sequence[str]) -> list[str]:
    urls = [part for url in side.urls for part in ("--url", url)]
    what = [
        *urls,
        "--gpus",
        str(side.gpus),
        "--label",
        side.name,
        "--mix",
        load.mix,
        "--rates",
        load.rates,
        "--out",
        str(out),
        "--no-plots",
    ]
    command = [sys.executable, "-m", "bench.serve.bench_serve", *what, *asked.plan.options, *limits, *load.options]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | _paths(), capture_output=True, text=True, check=False)
    out.with_suffix(".txt").write_text(done.stdout + done.stderr)
    _say(f"{side.name} {load.mix}: {'done' if not done.returncode else f'exit code {done.returncode}'}")
    return [f"{side.name} {load.mix}: {(done.stdout + done.stderr).strip()[-LOG_TAIL_BYTES:]}"] if done.returncode else []


def _paths() -> dict[str, str]:
    """This process' modules for the loads', however they are found here."""
    return {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def verdict_of(plan: Plan, out: Path) -> dict[str, Any]:
    """From the result files that are there: of each mix every side's best rate, and of ours that over the best peer's."""
    told: dict[str, Any] = {}
    for side in plan.sides():
        for load in side.loads:
            file = out / f"{side.name}_{load.name}.json"
            if not file.exists():
                continue
            best = json.loads(file.read_text())["best"]
            goodput = None if best is None else round(side.stand_for * best["goodput_per_s"], 4)
            rate = None if best is None else side.stand_for * best["rate"]
            row = {
                "gpus": side.stand_for * side.gpus,
                "measured_gpus": side.gpus,
                "rate": rate,
                "goodput_per_s": goodput,
                "is_peer": side.is_peer,
            }
            row["rates_tried"] = [side.stand_for * point["rate"] for point in json.loads(file.read_text())["points"]]
            told.setdefault(load.mix, {})[side.name] = row
    for rows in told.values():
        peers = [row for row in rows.values() if row["is_peer"]]
        best_peer = max((row["goodput_per_s"] or 0.0 for row in peers), default=0.0)
        lowest_failed = min((min(row["rates_tried"]) for row in peers if row["goodput_per_s"] is None), default=None)
        for row in rows.values():
            if not row["is_peer"]:
                row["over_best_peer"] = round(row["goodput_per_s"] / best_peer, 3) if best_peer and row["goodput_per_s"] else None
                row["lowest_rate_at_which_a_peer_failed"] = lowest_failed
    return told


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
    except PlanError as error:
        parser.error(str(error))
    only = tuple(name for name in options.only.split(",") if name)
    names = [phase.name for phase in plan.phases]
    if unknown := [name for name in only if name not in names]:
        parser.error(f"--only {unknown[0]}: the plan has {', '.join(names)}")
    return Asked(plan=plan, out=options.out.resolve(), only=only)


def _say(line: str) -> None:
    print(line, flush=True)


def main() -> int:
    asked = parse(sys.argv[1:])
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
