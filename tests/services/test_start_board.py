"""How far a start is: written by one process, said by another, gone when it is over."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.start_board import STILL_PERIOD_S, StartBoard, StartWatch


def test_lines_are_said_when_they_change_and_when_they_stand_for_long(tmp_path: Path) -> None:
    now_s, said = 0.0, list[str]()
    watch = StartWatch(tmp_path, said.append, lambda: now_s)
    watch.look()
    board = StartBoard(tmp_path, "engine")
    for line in ("weights", "weights", "weights: 40% (4 of 10)"):
        board.show(line)
        watch.look()
        watch.look()
    assert said == ["engine: weights", "engine: weights: 40% (4 of 10)"]
    now_s = STILL_PERIOD_S - 0.1
    watch.look()
    now_s = 2 * STILL_PERIOD_S
    watch.look()
    watch.look()
    assert said[2:] == ["engine: weights: 40% (4 of 10), for 20 s now"]
    board.close()
    board.close()
    watch.look()
    assert len(said) == 3 and not list(tmp_path.iterdir())


def test_two_replicas_of_a_pool_have_a_line_each(tmp_path: Path) -> None:
    said = list[str]()
    watch = StartWatch(tmp_path, said.append)
    mine, other = StartBoard(tmp_path, "prefill"), StartBoard(tmp_path, "prefill", os.getppid())
    mine.show("weights")
    watch.look()
    other.show("import")
    watch.look()
    mine.show("capture")
    watch.look()
    mine.close()
    other.show("weights")
    watch.look()
    names = [f"prefill (process {pid})" for pid in (os.getpid(), os.getppid())]
    assert said == ["prefill: weights", f"{names[1]}: import", f"{names[0]}: capture", f"{names[1]}: weights"]


def test_what_a_killed_replica_left_is_not_said(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    said = list[str]()
    for pid in (ended.pid, None):
        StartBoard(tmp_path, "decode", pid).show(f"weights of {pid}")
    StartWatch(tmp_path, said.append).look()
    assert said == ["decode: weights of None"]


def test_what_a_killed_replica_left_is_not_said_before_its_parent_has_waited_for_it(tmp_path: Path) -> None:
    now_s, said = 0.0, list[str]()
    watch = StartWatch(tmp_path, said.append, lambda: now_s)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"]) as replica:
        StartBoard(tmp_path, "decode", replica.pid).show("weights")
        watch.look()
        replica.kill()
        os.waitid(os.P_PID, replica.pid, os.WEXITED | os.WNOWAIT)  # it is over, and stays a zombie
        now_s = 2 * STILL_PERIOD_S
        watch.look()
        assert said == ["decode: weights"]
        assert replica.wait() < 0


def test_a_start_that_is_over_is_forgotten(tmp_path: Path) -> None:
    """The same process that starts again says its line again, and counts from then on."""
    now_s, said = 0.0, list[str]()
    watch = StartWatch(tmp_path, said.append, lambda: now_s)
    for _ in range(2):
        board = StartBoard(tmp_path, "engine")
        board.show("weights")
        watch.look()
        board.close()
        now_s += 3 * STILL_PERIOD_S
        watch.look()
    assert said == ["engine: weights"] * 2


def test_a_board_that_cannot_be_written_stops_no_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        for folder in (None, tmp_path / "not" / "there"):
            board = StartBoard(folder, "engine")
            board.show("capture: waves")
            board.close()
    assert [record.getMessage() for record in caplog.records] == ["engine start: capture: waves"] * 2
