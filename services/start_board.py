"""Owns the line that says how far an engine's start is: its replica writes it, `duomo serve` reads it in the run's folder. Knows no engine.

A replica under Ray has no terminal, and its log lies in Ray's folder. Only a replica on the machine of `duomo serve` is seen so; on other
machines its log says the same. The file names the process too: a pool has several replicas, and one that was killed leaves its line behind.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import psutil

SUFFIX: Final = ".starting"
STILL_PERIOD_S: Final = 10.0  # who waits hears at least this often that something goes on

Starter = tuple[str, int]  # pool and process

log = logging.getLogger(__name__)


class StartBoard:
    """One replica's line. run_dir None, or a folder that is not there: its log alone says it. Whoever makes it closes it.

    name: of its pool. pid: of the process that starts; None: this one.
    """

    def __init__(self, run_dir: Path | None, name: str, pid: int | None = None) -> None:
        self._name = name
        self._file = None if run_dir is None else run_dir / f"{name}.{os.getpid() if pid is None else pid}{SUFFIX}"

    def show(self, line: str) -> None:
        log.info("%s start: %s", self._name, line)
        if self._file is not None:
            with contextlib.suppress(OSError):  # a board that cannot be written stops no start
                whole = self._file.with_suffix(".line")
                whole.write_text(line)
                whole.replace(self._file)  # a reader sees one line or the other

    def close(self) -> None:
        """The start is over, whether well or not."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.unlink(missing_ok=True)


class StartWatch:
    """Says every replica's line when it changes, and now and then that it still stands. look() is called again and again.

    A replica goes by its pool, and by its process too once another of the pool has been seen.
    """

    def __init__(self, run_dir: Path, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._run_dir = run_dir
        self._say = say
        self._clock = clock
        self._seen: dict[Starter, tuple[str, float, float]] = {}  # the line, since when, and when it was last said; of those that start now
        self._first: dict[str, int] = {}  # process of each pool
        self._several: set[str] = set()  # pools of which another was seen

    def look(self) -> None:
        now_s = self._clock()
        lines = _lines(self._run_dir)
        self._seen = {starter: seen for starter, seen in self._seen.items() if starter in lines}
        self._several |= {pool for pool, pid in lines if self._first.setdefault(pool, pid) != pid}
        for starter, line in lines.items():
            pool, pid = starter
            name = f"{pool} (process {pid})" if pool in self._several else pool
            seen, since_s, said_s = self._seen.get(starter, ("", now_s, now_s))
            if line != seen:
                self._say(f"{name}: {line}")
                self._seen[starter] = (line, now_s, now_s)
            elif now_s - said_s >= STILL_PERIOD_S:
                self._say(f"{name}: {line}, for {now_s - since_s:.0f} s now")
                self._seen[starter] = (line, since_s, now_s)


def _lines(run_dir: Path) -> dict[Starter, str]:
    """Of the processes that live."""
    found = {}
    for file in sorted(run_dir.glob(f"*{SUFFIX}")):
        pool, _, pid = file.stem.rpartition(".")
        if pid.isdecimal() and _lives(int(pid)):
            with contextlib.suppress(OSError):  # closed meanwhile
                found[pool, int(pid)] = file.read_text()
    return found


def _lives(pid: int) -> bool:
    """One that was killed and that its parent has not waited for does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
