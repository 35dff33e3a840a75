"""Owns the client processes of a load: deals requests out to them, starts them at one time, gathers what they saw. Knows no limit."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from bench.serve.serve_client import Batch, Played, Target, run_client
from bench.serve.serve_plan import Request

START_S = 0.1  # from the last process' "ready" to the load's beginning
READY_S = 120.0  # imports and making bodies, on busy cores too
COLLECT_S = 30.0


class ClientPool:
    """Processes that wait for loads; made by clients()."""

    def __init__(self, members: Sequence[tuple[BaseProcess, Connection]]) -> None:
        self._members = members

    def play(self, target: Target, requests: Sequence[Request], limit_s: float) -> list[Played]:
        """Of each process, in turn by requests. Raises SystemExit where a process is gone."""
        for number, (process, pipe) in enumerate(self._members):
            mine = tuple(requests[number :: len(self._members)])
            self._send(process, pipe, Batch(target=target, requests=mine, limit_s=limit_s))
        for process, pipe in self._members:
            self._receive(process, pipe, READY_S)
        start_s = time.monotonic() + START_S
        for process, pipe in self._members:
            self._send(process, pipe, start_s)
        played = [self._receive(process, pipe, START_S + limit_s + COLLECT_S) for process, pipe in self._members]
        return [each for each in played if isinstance(each, Played)]

    def _send(self, process: BaseProcess, pipe: Connection, what: object) -> None:
        try:
            pipe.send(what)
        except BrokenPipeError as error:
            raise SystemExit(f"client process {process.pid} has ended (exit code {process.exitcode})") from error

    def _receive(self, process: BaseProcess, pipe: Connection, within_s: float) -> object:
        try:
            if pipe.poll(within_s):
                return pipe.recv()
        except EOFError:
            process.join(1.0)
        raise SystemExit(f"client process {process.pid} gave no answer (exit code {process.exitcode}); what it said stands above")


@contextmanager
def clients(count: int) -> Iterator[ClientPool]:
    """`count` processes, which end with the block."""
    context = multiprocessing.get_context("spawn")
    members: list[tuple[BaseProcess, Connection]] = []
    try:
        for _ in range(count):
            here, there = context.Pipe()
            process: BaseProcess = context.Process(target=run_client, args=(there,), daemon=True)
            process.start()
            there.close()
            members.append((process, here))
        yield ClientPool(members)
    finally:
        for process, pipe in members:
            pipe.close()
            process.join(5.0)
            if process.is_alive():
                process.kill()
