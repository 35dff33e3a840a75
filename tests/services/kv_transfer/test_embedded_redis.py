"""The embedded server starts, answers, and leaves neither process nor file, however its owner ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from duomo.errors import ConfigError
from services.kv_transfer import embedded_redis
from services.kv_transfer.embedded_redis import EmbeddedRedis


def answers(url: str) -> bool:
    with socket.socket(socket.AF_UNIX) as door:
        door.connect(url.removeprefix("unix://"))
        door.sendall(b"PING\r\n")
        return door.recv(16) == b"+PONG\r\n"


def is_gone(pid: int) -> bool:
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        status = Path(f"/proc/{pid}/status")
        if not status.exists() or "State:\tZ" in status.read_text():
            return True
        time.sleep(0.02)
    return False


def test_start_answer_stop(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path / "run")
    server.start()
    pid = server.pid
    assert answers(server.url) and os.getsid(pid) == pid != os.getsid(0), "Ctrl-C does not reach it"
    server.stop()
    server.stop()
    assert is_gone(pid) and list((tmp_path / "run").iterdir()) == []


def test_two_servers_share_a_run_directory(tmp_path: Path) -> None:
    one, two = EmbeddedRedis(tmp_path), EmbeddedRedis(tmp_path)
    one.start()
    two.start()
    assert one.url != two.url and answers(one.url) and answers(two.url)
    one.stop()
    assert answers(two.url)
    two.stop()


def test_a_long_run_directory_gets_a_short_socket(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path / ("long" * 30))
    server.start()
    assert len(server.url) < 100 and answers(server.url)
    folder = Path(server.url.removeprefix("unix://")).parent
    server.stop()
    assert not folder.exists()


def test_started_in_a_thread_it_outlives_the_thread(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path)
    starter = threading.Thread(target=server.start)
    starter.start()
    starter.join()
    time.sleep(0.1)
    assert answers(server.url)
    server.stop()


def test_it_ends_with_a_killed_owner(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from services.kv_transfer.embedded_redis import EmbeddedRedis\n"
        "server = EmbeddedRedis(Path(sys.argv[1])); server.start(); print(server.pid, flush=True); time.sleep(60)"
    )
    root = Path(__file__).parents[3]
    owner = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=root)
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    owner.send_signal(signal.SIGKILL)
    owner.wait(60)
    owner.stdout.close()
    assert is_gone(pid)


def test_a_server_that_does_not_start_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "server"
    broken.write_text("#!/bin/sh\necho out of memory; exit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(embedded_redis, "_server_binary", lambda: broken)
    with pytest.raises(ConfigError, match="DUOMO_REDIS_URL.*out of memory"):
        EmbeddedRedis(tmp_path / "run").start()
    assert list((tmp_path / "run").iterdir()) == []
