"""Owns a real system for `duomo bench routing_cpu`: Redis, a gateway, prefill and decode replicas on this machine's CPU. Knows no load.

    with RouteSystem(4, 1, {"prefill.num_blocks": 512}) as system: ...      # system.url; is_blind: a gateway that routes at random

The blind gateway is the same one, which is told nothing of load and prefixes: what is drawn decides (route_blind.py).
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from bench.serve.bench_rest import free_port
from bench.serve.host_facts import ROOT
from services.kv_transfer.embedded_redis import EmbeddedRedis

MODEL = ROOT / "models" / "tiny-moe"
START_S = 180.0
ZEROES = ("num_live_requests", "num_open_answers", "num_waiting_requests", "num_live_legs", "num_open_spans")


class RouteSystem:
    """Started and ended by `with`. Raises SystemExit where a process ends before its time."""

    def __init__(self, num_prefill: int, num_decode: int, settings: dict[str, object], *, is_blind: bool = False) -> None:
        self._run_dir = Path(tempfile.mkdtemp(prefix="duomo-r-"))
        self._counts = (num_prefill, num_decode)
        self._is_blind = is_blind
        self._settings = settings
        self._processes: list[subprocess.Popen[bytes]] = []
        self._redis = EmbeddedRedis(self._run_dir)
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        self._redis.start()
        config = self._run_dir / "duomo.yaml"
        config.write_text(yaml.safe_dump(self._configuration()))
        gateway = ["bench.serve.route_blind"] if self._is_blind else ["services.cli"]
        self._start([*gateway, "replica", "router", "--config", str(config), "--id", "router-0"])
        for role, num in zip(("prefill", "decode"), self._counts, strict=True):
            for number in range(num):
                self._start(["services.cli", "replica", role, "--config", str(config), "--id", f"{role}-{number}"])
        self._wait()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in self._processes:
            process.send_signal(signal.SIGINT)
        for process in self._processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
        self._redis.stop()
        shutil.rmtree(self._run_dir, ignore_errors=True)

    def pools(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/admin/pools", timeout=10) as response:
            told: dict[str, Any] = json.load(response)
        return told

    def disquiet(self, within_s: float = 10.0) -> list[str]:
        """What is still held by anybody within_s from now."""
        until_s = time.monotonic() + within_s
        while True:
            pools = self.pools()
            wrong = [f"gateway {key} = {pools['gateway'][key]}" for key in ZEROES if pools["gateway"][key]]
            for one in pools["replicas"]:
                report = one["report"]
                if one["gateway_legs"] or report["num_free_blocks"] + report["num_cached_blocks"] != report["num_blocks"]:
                    wrong.append(f"{one['replica_id']} holds legs or blocks")
            if not wrong or time.monotonic() > until_s:
                return wrong
            time.sleep(0.1)

    def _start(self, arguments: list[str]) -> None:
        with (self._run_dir / f"{arguments[-1]}.log").open("ab") as out:
            self._processes.append(subprocess.Popen([sys.executable, "-m", *arguments], cwd=ROOT, stdout=out, stderr=out))

    def _wait(self) -> None:
        until_s = time.monotonic() + START_S
        while time.monotonic() < until_s:
            if any(process.poll() is not None for process in self._processes):
                logs = "\n".join(path.read_text()[-2000:] for path in self._run_dir.glob("*.log"))
                raise SystemExit(f"a process of the system ended:\n{logs}")
            try:
                roles = [one["role"] for one in self.pools()["replicas"] if one["report"] is not None]
                if (roles.count("prefill"), roles.count("decode")) == self._counts:
                    return
            except OSError:
                pass
            time.sleep(0.2)
        raise SystemExit(f"the system was not ready in {START_S:g} s")

    def _configuration(self) -> dict[str, Any]:
        told: dict[str, Any] = {"run_dir": str(self._run_dir)}
        own: dict[str, object] = {
            "model.path": str(MODEL),
            "model.device": "cpu",
            "gateway.port": self._port,
            "redis.url": self._redis.url,
            "kv_transfer.ucx_net_devices": "lo",
        }
        for dotted, value in (own | self._settings).items():
            section, _, key = dotted.rpartition(".")
            told.setdefault(section, {})[key] = value
        return told
