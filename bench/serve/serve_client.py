"""Owns the requests of one client process: sends each when it is due, whatever came of those before, and reads its stream. Knows no limit.

A process of its own, so that no stream waits for another process' interpreter. Bodies are made before the load begins; how late sends
and the loop were is measured beside.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

from bench.serve.rest_client import OddEventError, StreamResult, post
from bench.serve.serve_figures import Seen
from bench.serve.serve_plan import Request
from bench.serve.serve_prompts import Dialect, body_of
from bench.serve.soak_client import fault_of, measure_lag


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A server and how it is spoken to. urls: its replicas', which are asked in turn. headers: beside the usual ones, say Authorization."""

    urls: tuple[str, ...]
    dialect: Dialect
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one process plays. limit_s: since the load began, when what is still open is cut off."""

    target: Target
    requests: tuple[Request, ...]
    limit_s: float


@dataclass(slots=True)
class Played:
    """What came of a batch. lag_s: of the process' loop; cpu_share: of a core, over the load."""

    seen: list[Seen]
    lag_s: list[float]
    cpu_share: float


class _Flight:
    """One request under way: what it brought until now, so that one that is cut off is seen as far as it came."""

    def __init__(self, request: Request, body: bytes) -> None:
        self.request = request
        self.body = body
        self._sent_s = 0.0
        self._event_s: list[float] = []
        self._event_tokens: list[int] = []
        self._num_tokens = 0
        self._finish_reason = ""
        self._error = "unfinished when the load was cut off"

    async def fly(self, target: Target, start_s: float, timeout_s: float) -> None:
        def take(now_s: float, num_tokens: int) -> None:
            self._event_s.append(now_s - start_s)
            self._event_tokens.append(num_tokens)

        self._sent_s = time.monotonic() - start_s
        url = target.urls[self.request.index % len(target.urls)]
        try:
            result = await post(url, target.dialect.path, self.body, timeout_s=timeout_s, on_tokens=take, headers=target.headers)
        except (OSError, asyncio.IncompleteReadError, ValueError, LookupError) as error:
            if not isinstance(error, TimeoutError):  # of post's own limit: unfinished
                self._error = (str(error) if isinstance(error, OddEventError) else repr(error))[:200]
            return
        self._num_tokens = told_tokens(result)
        self._finish_reason = result.finish_reasons.get(0, "")
        self._error = self._fault(result, target.dialect.ignores_eos)

    def _fault(self, result: StreamResult, is_length_certain: bool) -> str:
        fault = fault_of(result, self.request.output_tokens if is_length_certain else result.num_tokens)
        if fault is None and is_length_certain and self._num_tokens != self.request.output_tokens:
            fault = f"{self._num_tokens} tokens, asked for {self.request.output_tokens}"
        if fault is None and not self._event_s:
            fault = "ended without a token"
        return (fault or "")[:200]

    def seen(self) -> Seen:
        return Seen(
            index=self.request.index,
            due_s=self.request.due_s,
            sent_s=self._sent_s,
            prompt_tokens=self.request.prompt_tokens,
            output_tokens=self.request.output_tokens,
            event_s=tuple(round(each, 6) for each in self._event_s),
            event_tokens=tuple(self._event_tokens),
            num_tokens=self._num_tokens or sum(self._event_tokens),
            finish_reason=self._finish_reason,
            error=self._error,
        )


def told_tokens(result: StreamResult) -> int:
    """As events tell; else as the usage at the end does; else one for each event that brought text."""
    usage = (result.usage or {}).get("completion_tokens")
    return result.num_tokens or (usage if isinstance(usage, int) else len(result.event_times_s))


def run_client(pipe: Connection) -> None:
    """The body of a client process: a Batch comes, "ready" goes, the start comes (monotonic), Played goes; until the pipe closes."""
    gc.disable()  # a collection would be a gap of ours in the server's figures; between loads there is time for it
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            batch: Batch = pipe.recv()
            flights = [_Flight(request, body_of(request, batch.target.dialect)) for request in batch.requests]
            gc.collect()
            pipe.send("ready")
            start_s: float = pipe.recv()
            pipe.send(asyncio.run(_play(batch, flights, start_s)))


async def _play(batch: Batch, flights: Sequence[_Flight], start_s: float) -> Played:
    await asyncio.sleep(max(0.0, start_s - time.monotonic()))
    cpu_s, lag_s = time.process_time(), list[float]()
    meter = asyncio.create_task(measure_lag(lag_s))
    tasks = []
    for flight in flights:
        await asyncio.sleep(max(0.0, start_s + flight.request.due_s - time.monotonic()))
        left_s = start_s + batch.limit_s - time.monotonic()
        tasks.append(asyncio.create_task(flight.fly(batch.target, start_s, max(0.001, left_s))))
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    cpu_share = (time.process_time() - cpu_s) / max(1e-3, time.monotonic() - start_s)
    meter.cancel()
    for each in ended:
        if isinstance(each, BaseException):
            raise each
    return Played(seen=[flight.seen() for flight in flights], lag_s=lag_s, cpu_share=cpu_share)


def play_alone(target: Target, requests: Sequence[Request], limit_s: float, say: Callable[[str], None]) -> list[Seen]:
    """One after the other, in this process, each due when the one before has ended. limit_s: of each."""

    async def play() -> list[Seen]:
        found = []
        for request in requests:
            flight = _Flight(request, body_of(request, target.dialect))
            await flight.fly(target, time.monotonic() - request.due_s, limit_s)
            found.append(flight.seen())
            if found[-1].error:
                say(f"{request.prompt_tokens}:{request.output_tokens} alone: {found[-1].error}")
        return found

    return asyncio.run(play())
