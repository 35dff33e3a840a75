"""Owns the server processes of a campaign: their start, when they serve, and that none is left. Knows no load and no figure."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from bench.serve.goodput_plan import SidePlan
from bench.serve.host_facts import ROOT

LOOK_S = 0.25
END_S = 60.0  # from SIGTERM to SIGKILL
KILLED_S = 30.0  # from SIGKILL until a process and its memory on a card are gone
LOG_TAIL_BYTES = 2000


class StartError(Exception):
    """A server did not come to serve; the message has what its log ends with."""


class Servers:
    """The processes of a side, each the leader of a session of its own. end() is always called."""

    def __init__(self, side: SidePlan, out: Path) -> None:
        self.side = side
        self._out = out
        self._processes: list[tuple[subprocess.Popen[bytes], Path]] = []
        self._members: set[psutil.Process] = set()
        self._started_s = 0.0

    def start(self) -> None:
        """Raises StartError, also where another server has an address of these: it would be measured in their place."""
        if taken := [url for url in self._urls if _is_taken(url)]:
            raise StartError(f"{self.side.name}: something listens at {taken[0]} already")
        self._started_s = time.monotonic()
        for number, process in enumerate(self.side.processes):
            log_file = self._out / f"{self.side.name}_{number}.log"
            with log_file.open("wb") as log:
                environment = os.environ | process.env
                arguments = shlex.split(process.command)
                try:
                    started = subprocess.Popen(
                        arguments, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                    )
                except OSError as error:
                    raise StartError(f"{self.side.name}: {arguments[0]}: {error}") from error
            self._processes.append((started, log_file))

    def is_serving(self) -> bool:
        """Whether every url answers. Raises StartError where a process has ended or the time is over."""
        if told := self.ended("before it served"):
            raise StartError(told)
        if all(_answers(url + self.side.ready) for url in self._urls):
            return True
        if self.waited_s > self.side.start_limit_s:
            tails = "; ".join(_tail(log_file) for _, log_file in self._processes)
            raise StartError(f"{self.side.name}: does not serve after {self.waited_s:.0f} s: {tails}")
        return False

    @property
    def waited_s(self) -> float:
        return time.monotonic() - self._started_s

    def ended(self, when: str) -> str:
        """The first process that has, with what its log ends with; "" where all run."""
        for process, log_file in self._processes:
            if process.poll() is not None:
                return f"{self.side.name}: ended with {process.returncode} {when}: {_tail(log_file)}"
        return ""

    def terminate(self) -> None:
        """SIGTERM to every group, last started first."""
        self._members |= set(self._found())
        for process, _ in reversed(self._processes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to every process that is left."""
        for each in self.left():
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()

    def left(self) -> list[psutil.Process]:
        """What runs of all that was started: its sessions, and what descends from their leaders. Zombies hold nothing any more."""
        for process, _ in self._processes:
            process.poll()
        self._members |= set(self._found())
        return [each for each in self._members if _runs(each)]

    def _found(self) -> Iterator[psutil.Process]:
        leaders = {process.pid: process.returncode is None for process, _ in self._processes}
        for pid in psutil.pids() if leaders else ():
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError, PermissionError):
                if os.getsid(pid) in leaders:
                    yield psutil.Process(pid)
        for pid, runs in leaders.items():
            with contextlib.suppress(psutil.NoSuchProcess):
                yield from psutil.Process(pid).children(recursive=True) if runs else ()

    @property
    def _urls(self) -> list[str]:
        return [*self.side.behind, *self.side.urls]


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _is_taken(url: str) -> bool:
    address = urllib.parse.urlsplit(url)
    try:
        with socket.create_connection((address.hostname or "", address.port or 80), timeout=2.0):
            return True
    except OSError:
        return False


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2.0) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _tail(file: Path) -> str:
    return file.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace").strip() or "(its log is empty)"


def end(servers: Sequence[Servers]) -> None:
    """Ask, and after END_S or at another interrupt kill. Returns when all are gone; raises TimeoutError where one cannot be killed."""
    try:
        for each in servers:
            each.terminate()
        _wait_gone(servers, END_S)
    finally:
        for each in servers:
            each.kill()
        if left := _wait_gone(servers, KILLED_S):
            raise TimeoutError(f"processes {', '.join(str(each.pid) for each in left)} do not end {KILLED_S:g} s after SIGKILL")


def _wait_gone(servers: Sequence[Servers], limit_s: float) -> list[psutil.Process]:
    """Those that run when the time is over."""
    end_s = time.monotonic() + limit_s
    while (left := [process for each in servers for process in each.left()]) and time.monotonic() < end_s:
        time.sleep(LOOK_S)
    return left


@contextlib.contextmanager
def served(sides: Sequence[SidePlan], out: Path) -> Iterator[tuple[list[Servers], list[str]]]:
    """The sides that serve, and why the others do not. All are started at once and ended with the block; one that fails, when it does."""
    servers = [Servers(side, out) for side in sides]
    waiting, ready, failures = list(servers), list[Servers](), list[str]()
    try:
        for each in servers:
            with _noted(each, waiting, failures):
                each.start()
        while waiting:
            for each in tuple(waiting):
                with _noted(each, waiting, failures):
                    if each.is_serving():
                        print(f"{each.side.name} serves after {each.waited_s:.0f} s", flush=True)
                        waiting.remove(each)
                        ready.append(each)
            time.sleep(LOOK_S)
        yield ready, failures
    finally:
        end(servers)


@contextlib.contextmanager
def _noted(servers: Servers, waiting: list[Servers], failures: list[str]) -> Iterator[None]:
    try:
        yield
    except StartError as error:
        print(error, flush=True)
        failures.append(str(error))
        waiting.remove(servers)
        end([servers])
