"""Systems for the system tests: real processes, NIXL and Redis, started by the commands that users type. Owns start, end and invariants.

    one_system          session; `duomo serve`: Ray, 1 prefill x 1 decode (the one that costs 20 s)
    scaled_system       one_system with 2 decode replicas for this test; 1 again afterwards
    pair_system         session; 2 x 2 by `duomo replica`, without Ray
    slowed_system       session; by `duomo replica`, slow enough to hit moments; for faults: shape() of slowed.py mends it first
    tools_system        session; 1 x 1 by `duomo replica`, with a chat template that has tools and reasoning
    replica_system      a factory for one test: replica_system(num_prefill=2, num_decode=1, **{"kv_transfer.max_bytes_per_s": 1e6});
                        with layout="colocated" one engine is both

What each of them offers:

    url, run_dir                 the gateway's address; the run's folder (logs of `duomo replica` in it)
    reports("decode")            the replicas' last reports, read from outside (GET /admin/pools)
    pool_report()                the whole of /admin/pools
    redis()                      a redis-py client of the system's Redis
    assert_quiet(within_s)       every invariant of style.md rule 11, read from outside; raises with all that is wrong
    scale(pool, n)               one_system and scaled_system: `duomo scale`
    pids(role), kill_pid(pid)    one_system and scaled_system: the replicas' processes
    pid(replica_id), kill(id, signal), start(role, id)      pair_system and replica_system: for fault tests
    trace_dir                    where the system writes its spans

At teardown each ends by SIGINT and must exit 0, with no process and no file left.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
import redis
import yaml

from services.kv_transfer.embedded_redis import EmbeddedRedis
from tests.ports import free_port
from tests.system.patience import Patience
from tests.system.slowed import SLOWED

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "tiny-moe"
START_S = 100.0
STOP_S = 45.0
GET_S = 60.0  # a machine under load may stand still for seconds; what is not answered at all is found all the same
TEST_S = 400.0  # with the start of a system, on a machine that has other work
SETTINGS: dict[str, object] = {"redis.lease_s": 2.0, "model.device": "cpu"}  # the same system on a host with a GPU
TEMPLATE = ROOT / "deploy" / "chat_templates" / "chatml_tools.jinja"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The limit of a test of this folder that names none: the first one of a shared system waits for its start too. Slow ones have more."""
    for item in items:
        if item.path.parent == Path(__file__).parent and not any(map(item.get_closest_marker, ("timeout", "slow"))):
            item.add_marker(pytest.mark.timeout(TEST_S))


def environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith(("DUOMO_", "OTEL_", "RAY_"))}


def launch(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """A `duomo` command in a session of its own, its output in `log`."""
    command = [sys.executable, "-m", "services.cli", *arguments]
    with log.open("ab") as out:
        return subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=out, stderr=out, start_new_session=True)


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        return [parent, *parent.children(recursive=True)]
    return []


class System:
    """A running system, seen from outside. Subclasses start and end it."""

    def __init__(self, run_dir: Path, port: int) -> None:
        self.run_dir = run_dir
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.trace_dir = run_dir.with_name(run_dir.name + "-spans")
        self.redis_url = ""
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(self, path: str) -> tuple[int, bytes]:
        try:
            with self._opener.open(self.url + path, timeout=GET_S) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def pool_report(self) -> dict[str, Any]:
        status, body = self.get("/admin/pools")
        assert status == 200, body
        report: dict[str, Any] = json.loads(body)
        return report

    def reports(self, role: str) -> list[dict[str, Any]]:
        """The last report of each connected replica of a role that has reported."""
        return [one["report"] for one in self.pool_report()["replicas"] if one["role"] == role and one["report"] is not None]

    def redis(self) -> redis.Redis:
        return redis.Redis.from_url(self.redis_url)

    def wait_for_pools(self, num_prefill: int, num_decode: int, timeout_s: float = START_S) -> None:
        """Until exactly so many replicas report to the gateway and it is ready."""
        end_s = time.monotonic() + timeout_s
        seen: object = "no answer"
        while time.monotonic() < end_s:
            self.check_alive()
            with contextlib.suppress(OSError):
                status, body = self.get("/health/ready")
                seen = (status, body)
                counts = (len(self.reports("prefill")), len(self.reports("decode")))
                seen = (status, body, counts)
                if status == 200 and counts == (num_prefill, num_decode):
                    return
            time.sleep(0.1)
        raise AssertionError(f"not ready after {timeout_s} s: {seen}\n{self.logs()}")

    def check_alive(self) -> None:
        """Raise AssertionError when a process that must live has ended."""
        raise AssertionError("a subclass says which")

    def logs(self) -> str:
        files = sorted(self.run_dir.glob("*.log")) if self.run_dir.exists() else []
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in files)

    def assert_quiet(self, within_s: float = 5.0) -> None:
        """Nothing is held by anybody within_s from now: blocks, slots, handles, spans, requests, Redis keys."""
        patience = Patience(within_s)
        while wrong := self.disquiet():
            assert not patience.is_over(), "\n".join(wrong)
            time.sleep(0.01)

    def disquiet(self) -> list[str]:
        """What is not as it is when nothing runs, one line each; [] when all is."""
        pools = self.pool_report()
        wrong = [f"gateway {key} = {pools['gateway'][key]}" for key in GATEWAY_ZEROES if pools["gateway"][key] != 0]
        for one in pools["replicas"]:
            wrong += replica_disquiet(one)
        return wrong + redis_disquiet(self.redis(), {one["boot_id"] for one in pools["replicas"]})


GATEWAY_ZEROES = ("num_live_requests", "num_open_answers", "num_waiting_requests", "num_live_legs", "num_open_spans")
REPORT_ZEROES = ("num_running", "num_queued", "num_queued_tokens", "num_quarantined_slots", "num_open_handles", "num_open_spans")


def replica_disquiet(one: dict[str, Any]) -> list[str]:
    name, report = one["replica_id"], one["report"]
    if report is None or one["report_age_s"] > 0.5:
        return [f"{name} has not reported lately"]
    wrong = [f"{name} {key} = {report[key]}" for key in REPORT_ZEROES if report[key] != 0]
    if report["num_free_blocks"] + report["num_cached_blocks"] != report["num_blocks"]:
        wrong.append(f"{name} blocks: {report['num_free_blocks']} free + {report['num_cached_blocks']} cached != {report['num_blocks']}")
    if report["num_free_slots"] != report["num_slots"]:
        wrong.append(f"{name} slots: {report['num_free_slots']} free of {report['num_slots']}")
    if one["gateway_legs"] or one["gateway_reserved_blocks"]:
        wrong.append(f"the gateway holds {one['gateway_legs']} legs and {one['gateway_reserved_blocks']} blocks of {name}")
    return wrong


def redis_disquiet(client: redis.Redis, boot_ids: set[str]) -> list[str]:
    """Keys without expiry, and members that nobody is."""
    wrong = []
    for raw in client.scan_iter(count=1000):
        key = raw.decode()
        if client.pttl(raw) == -1:
            wrong.append(f"Redis key {key} never expires")
        if ":member:" in key and key.rsplit(":", 1)[1] not in boot_ids:
            wrong.append(f"Redis key {key} belongs to nobody")
    client.close()
    return wrong


class ServeSystem(System):
    """`duomo serve` under Ray."""

    def __init__(self, *options: str, num_prefill: int = 1, num_decode: int = 1, start_s: float = START_S) -> None:
        super().__init__(Path(tempfile.mkdtemp(prefix="duomo-t-")) / "run", free_port())
        self.log = self.run_dir.with_name("serve.log")
        arguments = ["serve", str(MODEL), "--port", str(self.port), "--run-dir", str(self.run_dir), "--trace-dir", str(self.trace_dir)]
        arguments += ["--prefill-replicas", str(num_prefill), "--decode-replicas", str(num_decode), *options]
        for key, value in SETTINGS.items():
            arguments += ["--set", f"{key}={value}"]
        self.process = launch(arguments, self.log)
        try:
            self.wait_for_pools(num_prefill, num_decode, start_s)
            while "Try:" not in self.logs():
                self.check_alive()
                time.sleep(0.05)
        except BaseException:
            os.killpg(self.process.pid, signal.SIGINT)
            self.process.wait(STOP_S)
            raise
        self.redis_url = f"unix://{next(self.run_dir.glob('redis-*/redis.sock'))}"

    def check_alive(self) -> None:
        assert self.process.poll() is None, f"duomo serve ended with {self.process.returncode}:\n{self.logs()}"

    def logs(self) -> str:
        return self.log.read_text(errors="replace")

    def pids(self, role: str) -> list[int]:
        """Process ids of a deployment's replicas, by Ray's names of its workers."""
        members = family(self.process)
        return [member.pid for member in members if f"duomo:{role}" in " ".join(member.cmdline())]

    def kill_pid(self, pid: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to one replica; Serve puts another in its place."""
        assert pid in {member.pid for member in family(self.process)}, pid
        os.kill(pid, number)

    def scale(self, pool: str, replicas: int) -> None:
        """`duomo scale`; returns when the pool has that many replicas and none drains any more."""
        command = [sys.executable, "-m", "services.cli", "scale", f"--{pool}", str(replicas), "--run-dir", str(self.run_dir)]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=110)
        assert done.returncode == 0, done.stderr + done.stdout

    def stop(self) -> None:
        """SIGINT to the whole session, as Ctrl-C in a terminal does; nothing may be left."""
        members = family(self.process)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGINT)
        try:
            code = self.process.wait(STOP_S)
        finally:
            _, alive = psutil.wait_procs(members, timeout=1)
            for process in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        left = [entry.name for entry in self.run_dir.glob("*")]
        said = self.logs()
        shutil.rmtree(self.run_dir.parent, ignore_errors=True)
        assert code == 0, f"duomo serve ended with {code}:\n{said}"
        assert not alive, f"left behind: {alive}"
        assert not left, f"left in the run's folder: {left}"


class ReplicaSystem(System):
    """The same processes by `duomo replica`, without Ray: quick to start, and each can be killed."""

    def __init__(self, num_prefill: int, num_decode: int, settings: dict[str, object]) -> None:
        super().__init__(Path(tempfile.mkdtemp(prefix="duomo-t-")), free_port())
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.killed: set[str] = set()
        self._server = EmbeddedRedis(self.run_dir)
        self._server.start()
        self.redis_url = self._server.url
        self.config = self.run_dir / "duomo.yaml"
        self.config.write_text(yaml.safe_dump(self._configuration(settings)))
        try:
            self.start("router", "router-0")
            if settings.get("layout") == "colocated":
                self.start("engine", "engine-0")
            else:
                for number in range(num_prefill):
                    self.start("prefill", f"prefill-{number}")
                for number in range(num_decode):
                    self.start("decode", f"decode-{number}")
            self.wait_for_pools(num_prefill, num_decode)
        except BaseException:
            self.stop(is_checked=False)
            raise

    def _configuration(self, settings: dict[str, object]) -> dict[str, object]:
        """One torch thread a replica: two cores are shared by all."""
        told: dict[str, Any] = {"run_dir": str(self.run_dir)}
        own = {
            "model.path": str(MODEL),
            "gateway.port": self.port,
            "redis.url": self.redis_url,
            "prefill.torch_threads": 1,
            "decode.torch_threads": 1,
            "kv_transfer.ucx_net_devices": "lo",
            "tracing.directory": str(self.trace_dir),
        }
        for dotted, value in (own | SETTINGS | settings).items():
            section, _, key = dotted.rpartition(".")
            place = told.setdefault(section, {}) if section else told
            place[key] = value
        return told

    def start(self, role: str, replica_id: str) -> None:
        """Start one more process (also one that was killed); see wait_for_pools()."""
        self.killed.discard(replica_id)
        arguments = ["replica", role, "--config", str(self.config), "--id", replica_id]
        self.processes[replica_id] = launch(arguments, self.run_dir / f"{replica_id}.log")

    def pid(self, replica_id: str) -> int:
        return self.processes[replica_id].pid

    def kill(self, replica_id: str, number: int = signal.SIGKILL) -> None:
        """Send a signal; a process that was sent one may end, and with any code."""
        self.killed.add(replica_id)
        self.processes[replica_id].send_signal(number)

    def check_alive(self) -> None:
        ended = {name: p.returncode for name, p in self.processes.items() if name not in self.killed and p.poll() is not None}
        assert not ended, f"ended: {ended}\n{self.logs()}"

    def stop(self, is_checked: bool = True) -> None:
        """SIGINT to all; those that were not killed must drain and exit 0."""
        members = [member for process in self.processes.values() for member in family(process)]
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.send_signal(signal.SIGCONT)
        _, alive = psutil.wait_procs(members, timeout=STOP_S)
        for left in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        codes = {name: process.wait(5) for name, process in self.processes.items() if name not in self.killed}
        said = self.logs()
        self._server.stop()
        sockets = [entry.name for entry in self.run_dir.glob("*.sock") if entry.name.split(".")[0] not in self.killed]
        shutil.rmtree(self.run_dir, ignore_errors=True)
        shutil.rmtree(self.trace_dir, ignore_errors=True)
        if is_checked:
            assert not alive and all(code == 0 for code in codes.values()), f"{alive} {codes}\n{said}"
            assert not sockets, f"left behind: {sockets}"


AnySystem = TypeVar("AnySystem", ServeSystem, ReplicaSystem)


@contextlib.contextmanager
def running(system: AnySystem) -> Iterator[AnySystem]:
    try:
        yield system
    finally:
        system.stop()


@pytest.fixture(scope="session")
def one_system() -> Iterator[ServeSystem]:
    with running(ServeSystem()) as system:
        yield system


@pytest.fixture
def scaled_system(one_system: ServeSystem) -> Iterator[ServeSystem]:
    one_system.scale("decode", 2)
    one_system.wait_for_pools(1, 2)
    yield one_system
    one_system.scale("decode", 1)
    one_system.wait_for_pools(1, 1)


@pytest.fixture(scope="session")
def pair_system() -> Iterator[ReplicaSystem]:
    with running(ReplicaSystem(2, 2, {})) as system:
        yield system


@pytest.fixture(scope="session")
def slowed_system() -> Iterator[ReplicaSystem]:
    with running(ReplicaSystem(1, 2, SLOWED)) as system:
        yield system


@pytest.fixture(scope="session")
def tools_system() -> Iterator[ReplicaSystem]:
    with running(ReplicaSystem(1, 1, {"gateway.chat_template": str(TEMPLATE)})) as system:
        yield system


@pytest.fixture
def replica_system() -> Iterator[Callable[..., ReplicaSystem]]:
    systems: list[ReplicaSystem] = []

    def make(num_prefill: int = 1, num_decode: int = 1, **settings: object) -> ReplicaSystem:
        systems.append(ReplicaSystem(num_prefill, num_decode, settings))
        return systems[-1]

    yield make
    for system in systems:
        system.stop()
