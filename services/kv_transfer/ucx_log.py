"""Owns UCX's log of this process: where UCX writes it, what in it are tables, and what our log is told. Knows no agent and no peer.

UCX opens its log once, when it is loaded, and else writes to standard output. Here it writes into memory: its tables (ucx_routes.py) say by
which transport KV goes, its messages come out in our log. What UCX says of a crash goes to standard error, as ever.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from services.kv_transfer import ucx_routes
from services.kv_transfer.ucx_routes import Route

_TABLES_OF_WRITES = "*ucp_put*"
_KEPT_BYTES = 256 * 1024  # what has been read is freed from here on

log = logging.getLogger(__name__)


@cache
def of_process() -> UcxLog:
    """UCX opens its log once in a process: there is one."""
    return UcxLog()


class UcxLog:
    """One in a process, made before UCX is loaded (of_process()). From any thread, but agents are made one at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tables: list[str] = []  # lines; a table may come in parts, and lines of other threads between
        self._partial = b""
        self._read_to = 0
        self._is_open = False  # by UCX
        # An operator who asks UCX for its log, or for tables of its own, gets them; then nothing is known here.
        self._file = None if {"UCX_LOG_FILE", "UCX_PROTO_INFO"} & os.environ.keys() else os.memfd_create("ucx-log", os.MFD_CLOEXEC)

    @contextmanager
    def is_making_agent(self) -> Iterator[None]:
        """An agent is made inside: the first one loads UCX, which opens its log; each is told to print tables.

        The environment is as before afterwards: children have logs of their own. One that is started meanwhile finds a file under this
        process' id, since UCX ends a process whose log it cannot open.
        """
        told = {} if self._file is None else {"UCX_PROTO_INFO": _TABLES_OF_WRITES}
        if self._file is not None and not self._is_open:
            told["UCX_LOG_FILE"] = f"/proc/{os.getpid()}/fd/{self._file}"
        os.environ.update(told)
        try:
            yield
            self._is_open = True
        finally:
            for name in told:
                del os.environ[name]

    def routes(self) -> list[Route]:
        """Every table so far, oldest first. What UCX has said beside them goes into our log now."""
        if self._file is None:
            return []
        ctypes.CDLL(None).fflush(None)  # UCX leaves tables in the C library's buffer
        with self._lock:
            lines = self._new_lines(self._file)
            self._tables += [line for line in lines if ucx_routes.is_of_table(line)]
            found = ucx_routes.routes_in(self._tables)
        for line in lines:
            if line and not ucx_routes.is_of_table(line):
                log.warning("UCX says: %s", line)
        return found

    def _new_lines(self, file: int) -> list[str]:
        """Whole lines since the last call."""
        data = self._partial
        while chunk := os.pread(file, 1 << 16, self._read_to):
            self._read_to += len(chunk)
            data += chunk
        if self._read_to > _KEPT_BYTES:
            os.ftruncate(file, 0)  # UCX goes on where it is: what lies before is a hole, and takes no memory
        whole, _, self._partial = data.rpartition(b"\n")
        return [line.replace(b"\0", b"").decode(errors="replace") for line in whole.split(b"\n")]
