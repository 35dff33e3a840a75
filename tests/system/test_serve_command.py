"""`duomo serve` as a user runs it: what it prints, how it scales and heals, and that no ending leaves anything behind."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from duomo.telemetry.span_file import read_spans
from tests.ports import free_port
from tests.system.patience import Patience

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "tiny-moe"


class Run:
    """One `duomo serve` in a session of its own, whose whole family is watched."""

    def __init__(self, folder: Path, port: int, *options: str, model: Path = MODEL, environment: dict[str, str] | None = None) -> None:
        self.run_dir = folder / "run"
        self.log = folder / "log"
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("DUOMO_", "OTEL_", "RAY_"))}
        command = [sys.executable, "-m", "services.cli", "serve", str(model), "--port", str(port), "--run-dir", str(self.run_dir), *options]
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=kept | (environment or {}),
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self.seen: dict[int, psutil.Process] = {}

    def look(self) -> None:
        """Remember every process of the family, also those that later lose their parent."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                self.seen.setdefault(process.pid, process)

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, words: str, timeout_s: float = 200) -> None:
        end_s = time.monotonic() + timeout_s
        while words not in self.said():
            self.look()
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < end_s, self.said()
            time.sleep(0.1)

    def left(self) -> list[psutil.Process]:
        """Processes of the family that live on 3 s after the end."""
        _, alive = psutil.wait_procs(list(self.seen.values()), timeout=3)
        return alive

    def clear(self) -> None:
        for process in self.left():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.kill()
        self.process.wait(10)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short, since Unix sockets lie in it; pytest's own folders are too deep for Ray's."""
    path = Path(tempfile.mkdtemp(prefix="duomo-t-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def port() -> int:
    return free_port()


def _duomo(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ
    command = [sys.executable, "-m", "services.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110)


def test_the_printed_curl_line_works(one_system: Any) -> None:
    lines = one_system.logs().splitlines()
    curl = next(line for line in lines if line.startswith("Try:")).removeprefix("Try:").strip()
    assert one_system.url in curl
    done = subprocess.run([*shlex.split(curl), "--silent", "--noproxy", "*"], capture_output=True, text=True, timeout=60)
    answer = json.loads(done.stdout)
    assert answer["model"] == "tiny-moe"
    assert answer["choices"][0]["message"]["content"].strip()
    one_system.assert_quiet()


def test_router_prefill_decode_and_directory_are_processes_of_their_own(one_system: Any) -> None:
    names: dict[str, int] = {}
    for process in psutil.Process(one_system.process.pid).children(recursive=True):
        for role in ("router", "prefill", "decode", "directory"):
            if f"duomo:{role}" in " ".join(process.cmdline()):
                names[role] = process.pid
                assert process.nice() == 0, "Ray's own niceness starves replicas"
    assert set(names) == {"router", "prefill", "decode", "directory"}
    assert len(set(names.values())) == 4


def _requests(system: Any) -> list[set[str]]:
    """The names of each request's spans, the last request's last."""
    spans = read_spans(system.trace_dir)
    roots = [span.trace_id for span in spans if span.name == "gateway.request"]
    return [{span.name for span in spans if span.trace_id == root} for root in roots]


def test_chat_and_trace_commands(one_system: Any) -> None:
    one_system.assert_quiet()
    before = _requests(one_system)
    done = _duomo("chat", "Tell me about a ball.", "--url", one_system.url, "--max-tokens", "16", "--temperature", "0")
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    names, patience = {"gateway.request", "prefill.compute", "kv.handoff", "decode.first_step"}, Patience(5.0)
    while len(told := _requests(one_system)) == len(before) or not names <= told[-1]:
        assert not patience.is_over(), told  # spans are written behind
        time.sleep(0.02)
    drawn = _duomo("trace", str(one_system.trace_dir))
    for span in (*names, "unaccounted"):
        assert span in drawn.stdout, drawn.stdout + drawn.stderr
    refused = _duomo("chat", "Hello", "--url", one_system.url, "--model", "no-such-model")
    assert refused.returncode == 1 and "no-such-model" in refused.stderr


def test_a_second_system_on_the_same_port_names_the_option(one_system: Any) -> None:
    done = _duomo("serve", str(MODEL), "--port", str(one_system.port))
    assert done.returncode == 2 and f"--port {one_system.port}" in done.stderr
    done = _duomo("serve", str(MODEL), "--port", str(free_port()), "--run-dir", str(one_system.run_dir))
    assert done.returncode == 2 and "--run-dir" in done.stderr
    assert one_system.get("/health/ready")[0] == 200


def test_scale_refuses_what_cannot_be(one_system: Any) -> None:
    shown = _duomo("scale", "--run-dir", str(one_system.run_dir))
    assert shown.returncode == 0 and "decode     1 RUNNING" in shown.stdout
    refused = _duomo("scale", "--decode", "0", "--run-dir", str(one_system.run_dir))
    assert refused.returncode == 2 and "--decode" in refused.stderr


def test_a_killed_replica_is_replaced(one_system: Any) -> None:
    before = one_system.reports("decode")[0]["boot_id"]
    for process in psutil.Process(one_system.process.pid).children(recursive=True):
        if "duomo:decode" in " ".join(process.cmdline()):
            process.kill()
    end_s = time.monotonic() + 150
    while not [report for report in one_system.reports("decode") if report["boot_id"] != before]:
        assert time.monotonic() < end_s, one_system.logs()
        time.sleep(0.2)
    one_system.wait_for_pools(1, 1)
    one_system.assert_quiet()  # within it the killed member's lease ends


@pytest.mark.parametrize("words", ["redis is up", "ray is imported", "serve is up"])
def test_ctrl_c_during_the_start_leaves_nothing(folder: Path, port: int, words: str) -> None:
    run = Run(folder, port)
    try:
        run.wait_for(words)
        time.sleep(0.5)
        run.look()
        os.killpg(run.process.pid, signal.SIGINT)
        code = run.process.wait(40)
        assert code == (0 if "Try:" in run.said() else 130), run.said()  # it may have become ready by then
        assert not run.left()
        assert not run.run_dir.exists()
    finally:
        run.clear()


STUCK = """
import ctypes, pathlib, os, sys

class Stuck:
    def find_spec(self, name, path=None, target=None):
        if name == "services.colocated":
            pathlib.Path(os.environ["STUCK_BOARD"]).write_text("weights: 40% (4 of 10)")
            ctypes.PyDLL(None).sleep(600)

sys.meta_path.insert(0, Stuck())
"""


@pytest.mark.slow
def test_a_start_that_hears_nothing_is_shown_and_ends_within_seconds(folder: Path, port: int) -> None:
    """A GPU's start is minutes of calls into C; here one holds the interpreter, where the replica would import its engine."""
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(STUCK)
    environment = {"PYTHONPATH": str(folder / "site"), "STUCK_BOARD": str(folder / "run" / "engine.starting")}
    run = Run(folder, port, "--device", "cpu", "--layout", "colocated", environment=environment)
    try:
        run.wait_for("engine: weights: 40% (4 of 10)")
        run.look()
        began_s = time.monotonic()
        run.process.send_signal(signal.SIGTERM)
        assert run.process.wait(40) == 130, run.said()
        assert time.monotonic() - began_s < 15
        assert not run.left() and not run.run_dir.exists()
    finally:
        run.clear()


@pytest.mark.parametrize("layout", ["colocated", pytest.param("split", marks=pytest.mark.slow)])
def test_a_model_that_does_not_load_is_said_in_its_own_words(folder: Path, port: int, layout: str) -> None:
    broken = folder / "broken"
    shutil.copytree(MODEL, broken)
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    run = Run(folder, port, "--layout", layout, model=broken)
    try:
        began_s = time.monotonic()
        while run.process.poll() is None and time.monotonic() - began_s < 200:
            run.look()
            time.sleep(0.1)
        assert run.process.wait(1) == 2, run.said()
        last = run.said().strip().splitlines()[-1]
        assert last.startswith("duomo: error: ") and "model.safetensors" in last and "Traceback" not in run.said(), run.said()
        assert not run.left()
        assert not run.run_dir.exists()
    finally:
        run.clear()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_however_it_ends_no_process_is_left(folder: Path, port: int, number: signal.Signals) -> None:
    """SIGKILL leaves the folder and Ray's two agents, which the next run there clears; all that serves ends by itself."""
    run = Run(folder, port)
    try:
        run.wait_for("Try:")
        run.look()
        run.process.send_signal(number)
        assert run.process.wait(40) == (0 if number == signal.SIGTERM else -signal.SIGKILL)
        _, alive = psutil.wait_procs(list(run.seen.values()), timeout=20)
        names = {process.cmdline()[0] for process in alive}
        assert names <= ({"ray::DashboardAgent", "ray::RuntimeEnvAgent"} if number == signal.SIGKILL else set()), names
        assert run.run_dir.exists() == (number == signal.SIGKILL)
        if number == signal.SIGKILL:
            again = Run(folder, port)
            try:
                again.wait_for("redis is up")
                assert not run.left(), "the next run clears what the killed one left"
                os.killpg(again.process.pid, signal.SIGINT)
                assert again.process.wait(40) == 130
            finally:
                again.clear()
    finally:
        run.clear()
