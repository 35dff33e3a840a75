"""Owns the step loop: plan on the event loop, run in the step thread, apply on the event loop. Knows no peer and no wire.

A worker on a GPU answers with the step before: while step n + 1 runs, step n is applied and step n + 2 planned. The loop keeps what is out
and applies the oldest when an output comes; where nothing is left to plan it asks for the last. So does it while a leg's KV lands: what
lands behind a step that is launched could join none before the one after the next. A step then begins when the one before is over, a launch
later, and a leg joins it whose KV came until then: messages that come while the step runs are queued behind it at once.

While a step runs, the loop serves sockets. With nothing to run it sleeps until something happens; while messages may land it looks for
them about every millisecond, and where the last of a leg's is due the step thread looks, about every 50 us, without the way to the loop and
back, and rehearses the step that will wait for it. What landed is taken in first in each step; what is only told of it comes behind the
next step's launch.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Protocol

from duomo.errors import DuomoError, EngineError
from services.decode.arrivals import Arrivals, LandedMessage
from services.decode.batch import Batch, PlannedStep
from services.decode.leg import Leg
from services.decode.worker import StepInput, StepOutput, StepWorker
from services.kv_transfer.ending import end_tasks
from services.kv_transfer.membership import Progress
from services.kv_transfer.step_thread import StepThread

LAND_PERIOD_S = 0.001
LOOK_PERIOD_S = 0.00005  # of the step thread, while a leg's KV lands
LONGEST_WATCH_S = 0.002
NO_STEP = PlannedStep(rows=(), work=StepInput(copies=(), rows=()))

log = logging.getLogger(__name__)


class StepHost(Protocol):
    """The service's side of the loop; everything is called on the event loop."""

    def before_step(self, now_s: float) -> None:
        """Grant and join before the next step is planned."""

    def is_landing(self) -> bool:
        """Whether messages may land, or a leg waits to be let in."""

    def landed(self, messages: tuple[LandedMessage, ...], now_s: float) -> None: ...

    def stepped(self, step: PlannedStep, output: StepOutput) -> None: ...

    def rested(self) -> None:
        """Nothing runs and nothing lands: the moment to check that nothing is lost."""

    def broke(self, error: EngineError) -> None:
        """The step thread failed; no step will run any more."""


class Landings(Protocol):
    """What the loop asks of, and tells to, the legs whose KV lands; on the event loop."""

    def joins_soon(self, now_s: float) -> bool:
        """Whether a leg is likely to join within a step or two."""

    def lands_still(self, now_s: float) -> Leg | None:
        """One that is likely to, though not at once."""

    def tell_arrived(self) -> None:
        """The next step is launched: time to tell, for spans and counts, of the legs whose KV is here."""


class StepLoop:
    """The task that feeds the step thread. start() once, stop() once. thread: its creator's to close; None: one of its own."""

    def __init__(
        self,
        worker: StepWorker,
        arrivals: Arrivals,
        batch: Batch,
        progress: Progress,
        host: StepHost,
        thread: StepThread | None,
        landings: Landings,
    ) -> None:
        self._landings = landings
        self._worker = worker
        self._arrivals = arrivals
        self._batch = batch
        self._progress = progress
        self._host = host
        self._thread = thread or StepThread("decode-step")
        self._owns_thread = thread is None
        self._awake = asyncio.Event()
        self._out: deque[PlannedStep] = deque()
        self._task: asyncio.Task[None] | None = None
        self._watching: asyncio.Future[tuple[LandedMessage, ...]] | None = None
        self._news = threading.Event()  # for the step thread, that it need not watch any longer
        self.failure: EngineError | None = None  # why no step runs any more

    async def start(self) -> None:
        """Warm the worker in its thread, then run."""
        await self._thread.run("step", self._worker.warm)
        self._task = asyncio.get_running_loop().create_task(self._guard())

    async def stop(self) -> None:
        """End the task; in a thread of its own a step that runs is waited for."""
        if self._task is not None:
            await end_tasks((self._task,))
        self._landings.tell_arrived()
        if self._owns_thread:
            await asyncio.to_thread(self._thread.close)

    def wake(self) -> None:
        """Something changed that the loop may be sleeping on."""
        self._news.set()
        self._awake.set()

    async def _guard(self) -> None:
        """Whatever ends the loop ends every request with a typed answer, and the replica's health with it."""
        try:
            await self._run()
        except DuomoError as error:
            self._break(EngineError(error.detail, phase="decode.stream"))
        except Exception as error:  # torch raises RuntimeError and others; broke() answers every request
            log.exception("a decode step failed")
            self._break(EngineError(f"a decode step failed: {type(error).__name__}: {error}", phase="decode.stream"))
        finally:
            self._thread.expect_steps(False)

    def _break(self, error: EngineError) -> None:
        self.failure = error
        self._host.broke(error)

    async def _run(self) -> None:
        while True:
            self._awake.clear()
            if self._out and self._arrivals.is_polled and self._host.is_landing():  # else it would only take a turn from prefill's pieces
                await self._take_landed(self._arrivals.land)
                if self._joins_soon():
                    await self._take_turn(NO_STEP)
            self._host.before_step(time.monotonic())
            step = self._batch.plan()
            self._thread.expect_steps(not step.is_empty)
            if not step.is_empty or self._out:
                await self._take_turn(step)
                self._landings.tell_arrived()
                continue
            self._progress.idle()
            self._landings.tell_arrived()
            if self._watching is not None:  # woken by what gave nothing to compute
                await asyncio.wait((self._watching,))
                self._end_watch()
                continue
            if not self._host.is_landing():
                self._host.rested()
                await self._awake.wait()
                continue
            if self._arrivals.is_polled and self._joins_soon():
                await self._watch_or_wake()
            elif not await self._take_landed(partial(self._arrivals.land, waits=True)):
                await asyncio.sleep(LAND_PERIOD_S)

    def _joins_soon(self) -> bool:
        return self._landings.joins_soon(time.monotonic())

    async def _take_landed(self, land: Callable[[], tuple[LandedMessage, ...]]) -> bool:
        """Whether something had landed. land: called in the step thread."""
        landed = await self._thread.run("step", land)
        if landed:
            self._host.landed(landed, time.monotonic())
        return bool(landed)

    async def _watch_or_wake(self) -> None:
        """Until the step thread has seen something land, or something else happened: what that lets begin is planned while the thread ends
        its look, and begins behind it."""
        if not self._awake.is_set():
            self._news.clear()
        leg = None if self._batch.has_work else self._landings.lands_still(time.monotonic())
        self._watching = self._thread.run("step", self._watch, None if leg is None else self._batch.foreseen(leg))
        self._watching.add_done_callback(lambda _: self._awake.set())
        await self._awake.wait()
        if self._watching.done():
            self._end_watch()

    def _end_watch(self) -> None:
        """What it saw land. It is over, as everything is that the step thread was given before what it has answered."""
        watching, self._watching = self._watching, None
        if watching is not None and (landed := watching.result()):
            self._host.landed(landed, time.monotonic())

    async def _take_turn(self, step: PlannedStep) -> None:
        """Run the step, or where it is empty wait for what is out; apply the oldest that is over."""
        if not step.is_empty:
            self._out.append(step)
        self._progress.pending()
        watches = self._arrivals.is_polled and self._host.is_landing()
        looks = self._watching is None  # else the thread ends its look, and the step is launched right behind it
        landed, output = await self._thread.run("step", self._turn, None if step.is_empty else step.work, watches=watches, looks=looks)
        self._end_watch()
        if landed:
            self._host.landed(landed, time.monotonic())
        if output is None:
            self._progress.idle()  # begun: the next turn waits for it
            return
        self._progress.advance()
        self._host.stepped(self._out.popleft(), output)

    def _turn(self, step: StepInput | None, *, watches: bool, looks: bool) -> tuple[tuple[LandedMessage, ...], StepOutput | None]:
        """In the step thread. looks: for what has landed, before the step. Where nothing is left under way, what has landed by then is in
        its blocks on return; watches: and what lands meanwhile is queued behind the step, as it comes."""
        if step is not None:
            return self._arrivals.land() if looks else (), self._worker.run(step)
        landed: list[LandedMessage] = []
        while watches and not self._worker.is_over():
            landed += self._arrivals.land()
            time.sleep(LOOK_PERIOD_S)
        output = self._worker.finish()
        return (*landed, *self._arrivals.land(waits=True)), output

    def _watch(self, foreseen: StepInput | None) -> tuple[LandedMessage, ...]:
        """In the step thread, with no step under way: what lands, as soon as it does; () where something else happens before, or nothing
        for some time. foreseen: a step that will wait for its launch; rehearsed each time, since what was run is soon forgotten."""
        end_s = time.monotonic() + LONGEST_WATCH_S
        if foreseen is not None:
            self._worker.rehearse(foreseen)
        while not (landed := self._arrivals.land(waits=True)) and not self._news.is_set() and time.monotonic() < end_s:
            self._news.wait(LOOK_PERIOD_S)
        return landed
