"""Owns the streams of one client process of a soak: open one, read it, open the next; gaps between token events. Knows no server's pid.

A process of its own, so that no stream waits for another process' interpreter; how late its own loop is, is measured beside (`lag_s`).
"""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.serve.rest_client import StreamResult, completion_body, post

LAG_PERIOD_S = 0.01
SPREAD_S = 0.02  # between the starts of two neighbours: the first prompts come one by one
RETRY_S = 1.0  # after a failure: a server that is gone is not asked a thousand times a second
STREAM_TIMEOUT_S = 300.0


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a soak asks. Lengths in tokens, inclusive; ids from [10, vocab). slot numbers are over all processes."""

    url: str
    model: str
    num_streams: int
    duration_s: float
    prompt_tokens: tuple[int, int]
    new_tokens: tuple[int, int]
    vocab: int
    seed: int = 0

    def body(self, slot: int, turn: int) -> dict[str, Any]:
        """The turn-th request of a slot: the same in every run. A slot's first is cut, each slot's elsewhere: so ends, and the next
        prompts, are spread from the start over one stream's length, and contexts are of every age."""
        drawn = random.Random(f"{self.seed}:{slot}:{turn}")
        prompt = [drawn.randrange(10, self.vocab) for _ in range(drawn.randint(*self.prompt_tokens))]
        new_tokens = drawn.randint(*self.new_tokens)
        if turn == 0:
            new_tokens = max(2, new_tokens * (slot + 1) // self.num_streams)
        return completion_body(prompt, new_tokens, model=self.model)


@dataclass
class Record:
    """What one process saw. Times are monotonic seconds, which all processes of a machine share."""

    gap_end_s: list[float] = field(default_factory=list)  # when the later event of the gap came
    gap_s: list[float] = field(default_factory=list)
    gap_tokens: list[int] = field(default_factory=list)  # that the later event brought
    first_s: list[float] = field(default_factory=list)  # when first tokens came
    ttft_s: list[float] = field(default_factory=list)
    lag_s: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    num_finished: int = 0
    cpu_share: float = 0.0

    def arrays(self) -> dict[str, NDArray[np.float64]]:
        names = ("gap_end_s", "gap_s", "gap_tokens", "first_s", "ttft_s", "lag_s")
        return {name: np.asarray(getattr(self, name), np.float64) for name in names}


class _Reader:
    """Writes one stream's events down."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._started_s = time.monotonic()
        self._last_s: float | None = None

    def take(self, now_s: float, num_tokens: int) -> None:
        record = self._record
        if self._last_s is None:
            record.first_s.append(now_s)
            record.ttft_s.append(now_s - self._started_s)
        else:
            record.gap_end_s.append(now_s)
            record.gap_s.append(now_s - self._last_s)
            record.gap_tokens.append(num_tokens)
        self._last_s = now_s


def run_client(load: Load, slots: Sequence[int], start_s: float, out: Connection) -> None:
    """The body of a client process: streams in these slots from start_s (monotonic) for the load's duration; sends arrays and facts."""
    record = Record()
    gc.disable()  # a collection would be a gap of ours in the server's figures; what a soak keeps are lists of numbers
    asyncio.run(_run(load, slots, start_s, record))
    facts = {"errors": record.errors[:20], "num_errors": len(record.errors), "finished": record.num_finished, "cpu_share": record.cpu_share}
    out.send((record.arrays(), facts))
    out.close()


async def _run(load: Load, slots: Sequence[int], start_s: float, record: Record) -> None:
    await asyncio.sleep(max(0.0, start_s - time.monotonic()))
    cpu_s = time.process_time()
    tasks = [asyncio.create_task(_slot(load, slot, record)) for slot in slots] + [asyncio.create_task(measure_lag(record.lag_s))]
    await asyncio.sleep(max(0.0, start_s + load.duration_s - time.monotonic()))
    record.cpu_share = (time.process_time() - cpu_s) / load.duration_s
    for task in tasks:  # closes the sockets, which takes the requests back
        task.cancel()
    for ended in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(ended, Exception):  # not the cancelling: that is no Exception
            record.errors.append(f"the client broke: {ended!r}")


async def _slot(load: Load, slot: int, record: Record) -> None:
    await asyncio.sleep(SPREAD_S * slot)
    turn = 0
    while True:
        body = load.body(slot, turn)
        turn += 1
        try:
            result = await post(load.url, "/v1/completions", body, timeout_s=STREAM_TIMEOUT_S, on_tokens=_Reader(record).take)
        except (OSError, asyncio.IncompleteReadError, TimeoutError, ValueError, IndexError) as error:
            fault: str | None = repr(error)
        else:
            fault = fault_of(result, body["max_tokens"])
        if fault is None:
            record.num_finished += 1
        else:
            record.errors.append(f"slot {slot}, turn {turn}: {fault}"[:300])
            await asyncio.sleep(RETRY_S)


def fault_of(result: StreamResult, max_tokens: int) -> str | None:
    """Why a stream that has ended is not what was asked for; None where it is. Servers that give no ids are asked for the end alone."""
    if result.status != 200 or result.error is not None:
        return f"status {result.status}: {result.error or result.body[:200].decode(errors='replace')}"
    if not result.is_done:
        return f"ended without [DONE] after {result.num_tokens} tokens"
    if result.num_tokens not in (0, max_tokens):
        return f"{result.num_tokens} tokens, asked for {max_tokens}"
    return None


async def measure_lag(lag_s: list[float]) -> None:
    """Writes down, until it is cancelled, how late the loop wakes a sleeper, of which up to 1 ms is epoll's rounding."""
    while True:
        before_s = time.monotonic()
        await asyncio.sleep(LAG_PERIOD_S)
        lag_s.append(time.monotonic() - before_s - LAG_PERIOD_S)
