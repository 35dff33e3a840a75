"""Owns what a stub of `duomo bench gateway` served and when, and how the bench asks for it through a pipe. Knows no wire and no HTTP."""

from __future__ import annotations

import asyncio
import contextlib
from array import array
from dataclasses import dataclass, field
from multiprocessing.connection import Connection as Pipe

READY, TAKE_RECORDS, NUM_TOKENS, STOP = "ready", "records", "num_tokens", "stop"


@dataclass(slots=True)
class StubRecord:
    """One request: when its start was read off the socket, and when each token's bytes were about to be written (monotonic seconds)."""

    received_s: float
    num_prompt_tokens: int
    sent_s: array[float] = field(default_factory=lambda: array("d"))


class StubLedger:
    """Records by seed, which the bench gives each request anew; those that ended wait to be taken."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self._open: dict[int, StubRecord] = {}
        self._ended: dict[int, StubRecord] = {}

    def begin(self, seed: int, received_s: float, num_prompt_tokens: int = 0) -> None:
        assert seed not in self._open and seed not in self._ended, f"seed {seed} came twice: somebody retried what the stub did not lose"
        self._open[seed] = StubRecord(received_s, num_prompt_tokens)

    def sent(self, seed: int, sent_s: float) -> None:
        """One more token of this request."""
        self.num_tokens += 1
        self._open[seed].sent_s.append(sent_s)

    def end(self, seed: int) -> None:
        self._ended[seed] = self._open.pop(seed)

    def take(self) -> dict[int, StubRecord]:
        """Those that ended since the last call."""
        taken, self._ended = self._ended, {}
        return taken


async def answer_bench(pipe: Pipe, ledger: StubLedger) -> None:
    """Say that this process serves, and answer until the bench asks it to stop or is gone. On a thread: a pipe of many records blocks."""
    await asyncio.to_thread(_answer, pipe, ledger)


def _answer(pipe: Pipe, ledger: StubLedger) -> None:
    pipe.send(READY)
    with contextlib.suppress(EOFError):
        while (asked := pipe.recv()) != STOP:
            pipe.send(ledger.take() if asked == TAKE_RECORDS else ledger.num_tokens)
