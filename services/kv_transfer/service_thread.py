"""Owns the thread and event loop in which one Ray-free service lives inside a host process. Knows neither Ray nor what the service does.

A host (a Serve replica) has an event loop of its own, with calls, health checks and metrics on it. A service gets another one, so
that neither waits for the other, and so that a blocked service is seen from outside:

    thread = ServiceThread("prefill-ab12", run, ready)       # run(stop) serves until stop; ready() returns once it can be used
    thread.start(timeout_s=60)                               # raises what run() raised
    thread.check()                                           # raises when the service has ended or its loop stands still
    await thread.stop(timeout_s=30)                          # sets stop; run() drains and returns
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine

from duomo.errors import DuomoError, EngineError
from services.kv_transfer.ending import REPLICA_LIMIT_S, end_tasks
from services.kv_transfer.started_heap import freeze_started

BEAT_S = 0.5
MAX_SILENCE_S = 15.0  # a loop that shares two cores with model loading stands still for 2 to 3 s at worst

Run = Callable[[asyncio.Event], Coroutine[object, object, None]]
Ready = Callable[[], Awaitable[None]]

log = logging.getLogger(__name__)


class ServiceThread:
    """One service in one thread. Whoever starts it stops it; the thread is a daemon, so a host that dies takes it along."""

    def __init__(self, name: str, run: Run, ready: Ready, max_silence_s: float = MAX_SILENCE_S) -> None:
        self.name = name
        self._run = run
        self._ready = ready
        self._max_silence_s = max_silence_s
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._settled = threading.Event()
        self._ended = threading.Event()
        self._is_ready = False
        self._failure: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._beat_s = time.monotonic()

    def start(self, timeout_s: float) -> None:
        """Start and wait until ready; then what the process holds is the collector's no more. Raises the service's own exception, or
        EngineError after timeout_s."""
        self._thread.start()
        if not self._settled.wait(timeout_s):
            self.ask_to_stop()
            raise EngineError(f"{self.name} was not ready after {timeout_s:.0f} s", phase="start")
        if self._is_ready:
            freeze_started()
            return
        self._ended.wait(timeout_s)
        raise self._failure or EngineError(f"{self.name} ended while it started", phase="start")

    def check(self) -> None:
        """Raise when the service has ended by itself (its own exception) or its event loop has stood still."""
        if self._failure is not None:
            raise self._failure
        if self._ended.is_set():
            raise EngineError(f"{self.name} has ended", phase="start")
        silence_s = time.monotonic() - self._beat_s
        if silence_s > self._max_silence_s:
            raise EngineError(f"the event loop of {self.name} has stood still for {silence_s:.1f} s")

    def ask_to_stop(self) -> None:
        """Ask the service to drain and return; does not wait. Nothing happens when it has ended."""
        loop, stop = self._loop, self._stop
        if loop is None or stop is None:
            return
        with contextlib.suppress(RuntimeError):  # the loop closed meanwhile: the service has ended
            loop.call_soon_threadsafe(stop.set)

    async def stop(self, timeout_s: float) -> bool:
        """Drain, without blocking the caller's loop; whether the service ended within timeout_s."""
        self.ask_to_stop()
        end_s = time.monotonic() + timeout_s
        while self._thread.is_alive() and time.monotonic() < end_s:
            await asyncio.sleep(0.02)
        return not self._thread.is_alive()

    def _main(self) -> None:
        try:
            with asyncio.Runner(loop_factory=_new_loop) as runner:
                runner.run(self._serve())
        except (Exception, asyncio.CancelledError) as error:  # kept and raised again by start() and check(): the typed answer
            self._failure = error
            log.error("%s ended: %s", self.name, error if isinstance(error, DuomoError) else repr(error))
        finally:
            self._ended.set()
            self._settled.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        beats = asyncio.create_task(self._beat())
        service = asyncio.create_task(self._run(self._stop))
        ready = asyncio.ensure_future(self._ready())
        try:
            await asyncio.wait((service, ready), return_when=asyncio.FIRST_COMPLETED)
            if ready.done() and not service.done():
                ready.result()
                self._is_ready = True
                self._settled.set()
            await service
        finally:
            await end_tasks((service,), limit_s=REPLICA_LIMIT_S)  # it may still close what it opened
            await end_tasks((ready, beats))

    async def _beat(self) -> None:
        while True:
            self._beat_s = time.monotonic()
            await asyncio.sleep(BEAT_S)


def _new_loop() -> asyncio.AbstractEventLoop:
    """uvloop where it is installed (twice the messages a second), else asyncio's own."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
