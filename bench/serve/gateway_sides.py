"""Owns what `duomo bench gateway` measures: Duomo's gateway before a stub engine, or a peer before a stub server, each a process.

Knows how each is started and what it costs (CPU seconds, memory of its process tree); knows no figure.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from bench.serve.host_facts import ROOT
from bench.serve.stub_engine import StubOptions, run_stub
from bench.serve.stub_ledger import NUM_TOKENS, READY, STOP, TAKE_RECORDS, StubRecord
from bench.serve.stub_openai import OpenAIStubOptions, run_openai_stub
from services.kv_transfer.embedded_redis import EmbeddedRedis

MODEL = ROOT / "models" / "tiny-moe"
READY_S = 120.0
STOP_S = 30.0
_PEER_MODEL = "tiny-moe"


@dataclass(frozen=True)
class Side:
    """A gateway that takes requests at url, and the stub behind it. pid: the root of the gateway's processes."""

    url: str
    pid: int
    stub: Stub

    def cpu_s(self) -> float:
        """User and system time of the whole tree so far."""
        return sum(sum(process.cpu_times()[:2]) for process in self._tree())

    def rss_bytes(self) -> int:
        return sum(process.memory_info().rss for process in self._tree())

    def pss_bytes(self) -> int:
        return sum(process.memory_full_info().pss for process in self._tree())

    def _tree(self) -> list[psutil.Process]:
        root = psutil.Process(self.pid)
        return [root, *root.children(recursive=True)]


class Stub:
    """The bench's end of a stub's pipe. pid: its process."""

    def __init__(self, pipe: Pipe, pid: int) -> None:
        self.pid = pid
        self._pipe = pipe

    def take_records(self) -> dict[int, StubRecord]:
        """Of requests that ended since the last call, by seed."""
        records: dict[int, StubRecord] = self._ask(TAKE_RECORDS)
        return records

    def num_tokens(self) -> int:
        """Sent so far."""
        return int(self._ask(NUM_TOKENS))

    def _ask(self, what: str) -> Any:
        self._pipe.send(what)
        if not self._pipe.poll(STOP_S):
            raise SystemExit("the stub does not answer")
        return self._pipe.recv()


@contextlib.contextmanager
def duomo_side(step_s: float, port: int) -> Iterator[Side]:
    """`duomo replica router` as an operator starts it, with default options but for its port."""
    with tempfile.TemporaryDirectory(prefix="duomo-bench-") as name, contextlib.ExitStack() as ends:
        folder = Path(name)
        redis = EmbeddedRedis(folder)
        redis.start()
        ends.callback(redis.stop)
        told = {"run_dir": name, "model": {"path": str(MODEL)}, "gateway": {"port": port}, "redis": {"url": redis.url}}
        (folder / "duomo.yaml").write_text(yaml.safe_dump(told))
        options = StubOptions(redis_url=redis.url, model=MODEL, step_s=step_s, folder=folder)
        stub = ends.enter_context(_stub(run_stub, options))
        command = [sys.executable, "-m", "services.cli", "replica", "router", "--config", str(folder / "duomo.yaml"), "--id", "router-0"]
        paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
        pid = ends.enter_context(_process(command, {"PYTHONPATH": paths}, folder, f"http://127.0.0.1:{port}/health/ready"))
        yield Side(f"http://127.0.0.1:{port}", pid, stub)


@contextlib.contextmanager
def litellm_side(program: Path, step_s: float, port: int, stub_port: int) -> Iterator[Side]:
    """litellm's proxy, one worker, without a database, before the OpenAI-compatible stub."""
    with tempfile.TemporaryDirectory(prefix="duomo-bench-") as name, contextlib.ExitStack() as ends:
        folder = Path(name)
        behind = {"model": f"openai/{_PEER_MODEL}", "api_base": f"http://127.0.0.1:{stub_port}/v1", "api_key": "none"}
        told = {"model_list": [{"model_name": _PEER_MODEL, "litellm_params": behind}], "litellm_settings": {"telemetry": False}}
        (folder / "litellm.yaml").write_text(yaml.safe_dump(told))
        stub = ends.enter_context(_stub(run_openai_stub, OpenAIStubOptions(port=stub_port, model=MODEL, step_s=step_s)))
        command = [str(program), "--config", str(folder / "litellm.yaml"), "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
        environment = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"}
        environment["LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY"] = "true"  # a stub's proxy on loopback, while this runs
        pid = ends.enter_context(_process(command, environment, folder, f"http://127.0.0.1:{port}/health/liveliness"))
        yield Side(f"http://127.0.0.1:{port}", pid, stub)


@contextlib.contextmanager
def bare_side(step_s: float, port: int) -> Iterator[Side]:
    """The OpenAI-compatible stub with nothing before it: what the measuring itself adds. Its CPU seconds are the stub's."""
    with _stub(run_openai_stub, OpenAIStubOptions(port=port, model=MODEL, step_s=step_s)) as stub:
        yield Side(f"http://127.0.0.1:{port}", stub.pid, stub)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _stub(run: Callable[[Any, Pipe], None], options: object) -> Iterator[Stub]:
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=run, args=(options, there), daemon=True)
    process.start()
    there.close()
    try:
        if not here.poll(READY_S) or here.recv() != READY:
            raise SystemExit(f"the stub did not become ready in {READY_S:g} s")
        assert process.pid is not None
        yield Stub(here, process.pid)
    finally:
        with contextlib.suppress(OSError):
            here.send(STOP)
        process.join(STOP_S)


@contextlib.contextmanager
def _process(command: list[str], environment: dict[str, str], folder: Path, ready_url: str) -> Iterator[int]:
    """The gateway's process, once ready_url answers 200. Raises SystemExit with the end of what it said."""
    with (folder / "gateway.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        end_s = time.monotonic() + READY_S
        while time.monotonic() < end_s and process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(ready_url, timeout=2).status_code == 200:
                    break
            time.sleep(0.1)
        else:
            raise SystemExit(f"{command[0]} did not become ready: {(folder / 'gateway.log').read_text(errors='replace')[-2000:]}")
        yield process.pid
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
