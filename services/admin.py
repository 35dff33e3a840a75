"""Owns the operator's Unix socket of a running `duomo serve`: one JSON line in, one out. Knows neither Ray nor what a command does.

The socket lies in the run's folder (mode 0700): who may open it may scale. Requests and replies:

    {"command": "status"}                                        -> {"replicas": {"decode": {"RUNNING": 2}}}
    {"command": "scale", "pool": "decode", "replicas": 1}        -> the same, as it is now; replicas that go drain first
    anything that cannot be done                                 -> {"error": "one sentence"}
"""

from __future__ import annotations

import json
import os
import socket
import socketserver
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from duomo.errors import ConfigError, DuomoError

MAX_LINE_BYTES = 4096
SOCKET_NAME = "admin.sock"
Replicas = dict[str, dict[str, int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class AdminCommand:
    """What an operator asks. pool and replicas are set for "scale" alone."""

    command: Literal["status", "scale"]
    pool: Literal["prefill", "decode"] | None = None
    replicas: int | None = None


def default_run_dir(port: int) -> Path:
    """Where a run keeps its sockets when no folder is named: found again by whoever knows the port."""
    return Path(tempfile.gettempdir()) / f"duomo-{os.getuid()}-{port}"


def parse_command(line: bytes) -> AdminCommand:
    """Raises ConfigError naming the field at fault."""
    try:
        raw = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"a command must be one line of JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError("a command must be a JSON object")
    command, pool, replicas = raw.get("command"), raw.get("pool"), raw.get("replicas")
    if command == "status":
        return AdminCommand(command="status")
    if command != "scale":
        raise ConfigError(f"command must be status or scale, not {command!r}")
    if pool not in ("prefill", "decode"):
        raise ConfigError(f"pool must be prefill or decode, not {pool!r}")
    if not isinstance(replicas, int) or isinstance(replicas, bool) or not 1 <= replicas <= 256:
        raise ConfigError(f"replicas must be a whole number from 1 to 256, not {replicas!r}")
    return AdminCommand(command="scale", pool=pool, replicas=replicas)


class AdminSocket:
    """Listens in a thread of its own. `run` is called for one command at a time, in that thread."""

    def __init__(self, path: Path, run: Callable[[AdminCommand], Replicas]) -> None:
        self._path = path
        self._run = run
        self._server = _Server(str(path), _handler(self._answer))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="admin", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._path.unlink(missing_ok=True)
        self._thread.join(5)

    def _answer(self, line: bytes) -> dict[str, object]:
        try:
            return {"replicas": self._run(parse_command(line))}
        except DuomoError as error:
            return {"error": error.detail}
        except Exception as error:  # the operator gets what went wrong; the system serves on
            return {"error": f"{type(error).__name__}: {error}"}


def ask(path: Path, command: AdminCommand, timeout_s: float = 40.0) -> Replicas:
    """Send one command to a running system. Raises ConfigError when none listens at path or it refuses."""
    asked: dict[str, object] = {"command": command.command}
    if command.command == "scale":
        asked |= {"pool": command.pool, "replicas": command.replicas}
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        try:
            connection.connect(str(path))
            connection.sendall(json.dumps(asked).encode() + b"\n")
            line = connection.makefile("rb").readline()
        except OSError as error:
            raise ConfigError(f"no running `duomo serve` answers at {path} ({error}); name it by --port or --run-dir") from error
    reply = json.loads(line or b'{"error": "it closed the connection"}')
    if "error" in reply:
        raise ConfigError(f"refused: {reply['error']}")
    replicas: Replicas = reply["replicas"]
    return replicas


def is_alive(path: Path) -> bool:
    """Whether somebody listens on the socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(1)
        try:
            connection.connect(str(path))
        except OSError:
            return False
        return True


class _Server(socketserver.UnixStreamServer):
    allow_reuse_address = False


def _handler(answer: Callable[[bytes], dict[str, object]]) -> type[socketserver.StreamRequestHandler]:
    class Handler(socketserver.StreamRequestHandler):
        timeout = 10

        def handle(self) -> None:
            line = self.rfile.readline(MAX_LINE_BYTES)
            if line:
                self.wfile.write(json.dumps(answer(line)).encode() + b"\n")

    return Handler
