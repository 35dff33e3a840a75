"""Owns the line that says how far an engine's start is: its replica writes it, `duomo serve` reads it in the run's folder. Knows no engine.

A replica under Ray has no terminal, and its log lies in Ray's folder. Only a replica on the machine of `duomo serve` is seen so; on other
machines its log says the same.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

SUFFIX: Final = ".starting"
STILL_PERIOD_S: Final = 10.0  # who waits hears at least this often that something goes on

log = logging.getLogger(__name__)


class StartBoard:
    """One replica's line. run_dir None, or a folder that is not there: its log alone says it. Whoever makes it closes it."""

    def __init__(self, run_dir: Path | None, name: str) -> None:
        self._name = name
        self._file = None if run_dir is None else run_dir / f"{name}{SUFFIX}"

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
    """Says every replica's line when it changes, and now and then that it still stands. look() is called again and again."""

    def __init__(self, run_dir: Path, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._run_dir = run_dir
        self._say = say
        self._clock = clock
        self._seen: dict[str, tuple[str, float, float]] = {}  # the line, since when, and when it was last said

    def look(self) -> None:
        now_s = self._clock()
        for name, line in _lines(self._run_dir).items():
            seen, since_s, said_s = self._seen.get(name, ("", now_s, now_s))
            if line != seen:
                self._say(f"{name}: {line}")
                self._seen[name] = (line, now_s, now_s)
            elif now_s - said_s >= STILL_PERIOD_S:
                self._say(f"{name}: {line}, for {now_s - since_s:.0f} s now")
                self._seen[name] = (line, since_s, now_s)


def _lines(run_dir: Path) -> dict[str, str]:
    found = {}
    for file in sorted(run_dir.glob(f"*{SUFFIX}")):
        with contextlib.suppress(OSError):  # closed meanwhile
            found[file.stem] = file.read_text()
    return found
