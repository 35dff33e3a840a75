"""Owns the live waves: plan, run a group in the step thread, apply. Knows no socket and no handle; what follows is told to WaveEvents.

One task on the event loop plans whenever something changed; at most one layer group is in the step thread at a time. Between groups
everything is decided anew by policy.plan.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from duomo.errors import DeadlineError, DuomoError, EngineError
from services.kv_transfer.membership import Progress
from services.kv_transfer.step_thread import StepThread
from services.prefill.leg import Leg
from services.prefill.pieces import Piece
from services.prefill.policy import Failure, Key, Limits, NewWave, NextGroup, Plan, Snapshot, WaveView, plan
from services.prefill.worker import Computation, WaveOutput, WaveWorker


class WaveEvents(Protocol):
    """What the loop asks of, and tells to, the service. All on the event loop."""

    def allocate(self, leg: Leg, wave_id: int) -> bool:
        """Give the leg its blocks: it starts in this wave. False when there are not enough, or when it has failed."""

    def announce(self, leg: Leg) -> None: ...

    def group_computed(self, legs: Sequence[Leg], group: int) -> None: ...

    def wave_computed(self, legs: Sequence[Leg], outputs: Sequence[WaveOutput]) -> None:
        """The last group is computed and first tokens are sampled; its group_computed follows."""

    def wave_left(self, leg: Leg) -> None:
        """The step thread will not touch the leg's blocks again."""

    def fail(self, leg: Leg, error: DuomoError) -> None: ...


@dataclass(slots=True, kw_only=True, eq=False)
class Wave:
    """Prompts crossing the layers together. computation: the step thread's own state, None before the first group."""

    wave_id: int
    legs: tuple[Leg, ...]
    num_tokens: int
    next_group: int = 0
    num_passes: int = 0
    computation: Computation | None = None


@dataclass(slots=True, kw_only=True)
class RunningGroup:
    """A group in the step thread."""

    wave: Wave
    group: int
    done: asyncio.Future[tuple[WaveOutput, ...]]
    started_s: float = field(default_factory=time.monotonic)


class WaveLoop:
    """Drives the waves of one replica.

    waiting: legs that are not in a wave, by key; the service adds and removes them and calls wake(). num_free_blocks: how many blocks
    could be allocated now. delay_s: slept before a wave's first group, for tests (config.DelaySection). thread: the service's to close.
    """

    def __init__(
        self,
        worker: WaveWorker,
        limits: Limits,
        progress: Progress,
        thread: StepThread,
        num_free_blocks: Callable[[], int],
        events: WaveEvents,
        delay_s: float = 0.0,
    ) -> None:
        self.waiting: dict[Key, Leg] = {}
        self.num_groups_run = 0
        self.num_waves_formed = 0
        self._worker = worker
        self._limits = limits
        self._progress = progress
        self._num_free_blocks = num_free_blocks
        self._events = events
        self._delay_s = delay_s
        self._waves: dict[int, Wave] = {}
        self._running: RunningGroup | None = None
        self._woken = asyncio.Event()
        self._thread = thread

    @property
    def num_running(self) -> int:
        return sum(not leg.is_over for wave in self._waves.values() for leg in wave.legs)

    def wake(self) -> None:
        """Something changed: plan again soon."""
        self._woken.set()

    async def warm(self) -> None:
        """Run the worker's dummy waves in the step thread."""
        await self._thread.run("group", self._worker.enter_step_thread)
        await self._thread.run("group", self._worker.warm)

    async def run(self) -> None:
        """Plan, run, apply until cancelled."""
        while True:
            self._woken.clear()
            if self._running is not None and self._running.done.done():
                self._apply_group()
            decision = plan(self._snapshot(), time.monotonic())
            if self._delay_s and isinstance(decision.run, NewWave):
                await asyncio.sleep(self._delay_s)
            self._apply(decision)
            if decision.run is None or self._running is not None:
                await self._wait(decision.wake_s)

    async def _wait(self, wake_s: float | None) -> None:
        timeout_s = None if wake_s is None else max(wake_s - time.monotonic(), 0.0)
        try:
            async with asyncio.timeout(timeout_s):
                await self._woken.wait()
        except TimeoutError:
            return

    def _snapshot(self) -> Snapshot:
        return Snapshot(
            prompts=tuple(leg.view for leg in self.waiting.values()),
            waves=tuple(
                WaveView(
                    wave_id=wave.wave_id,
                    num_tokens=wave.num_tokens,
                    next_group=wave.next_group,
                    num_groups=self._worker.num_groups,
                    num_passes=wave.num_passes,
                )
                for wave in self._waves.values()
                if wave.next_group < self._worker.num_groups
            ),
            num_free_blocks=self._num_free_blocks(),
            is_running=self._running is not None,
            limits=self._limits,
        )

    def _apply(self, decision: Plan) -> None:
        for failure in decision.failures:
            late = self.waiting.get(failure.key)
            if late is not None:
                self._events.fail(late, _error(failure))
        if isinstance(decision.run, NewWave):
            self._form(decision.run.keys)
        elif isinstance(decision.run, NextGroup):
            self._start_group(self._waves[decision.run.wave_id])
        for key in decision.announce:
            leg = self.waiting.get(key)
            if leg is not None:
                self._events.announce(leg)

    def _form(self, keys: Sequence[Key]) -> None:
        legs = []
        for key in keys:
            leg = self.waiting.get(key)
            if leg is None:
                continue  # cancelled meanwhile
            if not self._events.allocate(leg, self.num_waves_formed + 1):
                break
            del self.waiting[key]
            legs.append(leg)
        if not legs:
            return
        self.num_waves_formed += 1
        num_tokens = sum(len(leg.token_ids) - leg.cached_tokens for leg in legs)
        wave = Wave(wave_id=self.num_waves_formed, legs=tuple(legs), num_tokens=num_tokens)
        self._waves[wave.wave_id] = wave
        self._start_group(wave)

    def _start_group(self, wave: Wave) -> None:
        assert self._running is None
        group = wave.next_group
        for other in self._waves.values():
            other.num_passes = 0 if other is wave else other.num_passes + 1
        wave.next_group += 1
        done = self._thread.run("group", self._compute, wave, group)
        done.add_done_callback(lambda _: self._woken.set())
        self._running = RunningGroup(wave=wave, group=group, done=done)
        self._progress.pending()
        for leg in wave.legs:
            if leg.compute_span is not None and not leg.is_over:
                leg.compute_span.event("group_started", {"duomo.group": group}, at_s=self._running.started_s)

    def _compute(self, wave: Wave, group: int) -> tuple[WaveOutput, ...]:
        """In the step thread: one group; after the last one the first tokens of every leg that is still wanted."""
        if wave.computation is None:
            wave.computation = self._worker.begin([leg.wave_row() for leg in wave.legs])
        self._worker.run_piece(wave.computation, Piece(groups=(group, group + 1), chunks=(0, wave.computation.num_chunks)))
        if group + 1 < self._worker.num_groups:
            return ()
        eos_ids = self._worker.config.eos_ids
        return self._worker.sample(wave.computation, [[] if leg.is_over else leg.choice_rows(eos_ids) for leg in wave.legs])

    def _apply_group(self) -> None:
        """A group has left the step thread: hand its KV on, then end or drop its wave."""
        running, self._running = self._running, None
        assert running is not None
        wave = running.wave
        self._progress.advance()
        self.num_groups_run += 1
        error = running.done.exception()
        if error is not None:
            self._wave_failed(wave, error)
            return
        now_s = time.monotonic()
        for leg in wave.legs:
            if leg.compute_span is not None and not leg.is_over:
                leg.compute_span.event("group_computed", {"duomo.group": running.group}, at_s=now_s)
            if not leg.is_over and now_s >= leg.deadline_s:
                self._events.fail(leg, DeadlineError("the deadline passed between two layer groups", phase="prefill.compute"))
        live = [leg for leg in wave.legs if not leg.is_over]
        outputs = running.done.result()
        for leg, output in zip(wave.legs, outputs, strict=False):
            if output.error is not None and not leg.is_over:
                self._events.fail(leg, output.error)
        if outputs:
            chosen = [(leg, output) for leg, output in zip(wave.legs, outputs, strict=True) if not leg.is_over]
            self._events.wave_computed([leg for leg, _ in chosen], [output for _, output in chosen])
        self._events.group_computed([leg for leg in live if not leg.is_over], running.group)
        if outputs or not live:
            self._leave(wave)

    def _wave_failed(self, wave: Wave, error: BaseException) -> None:
        failure = error if isinstance(error, DuomoError) else EngineError(f"a layer group failed: {error!r}")
        for leg in wave.legs:
            if not leg.is_over:
                self._events.fail(leg, failure)
        self._leave(wave)

    def _leave(self, wave: Wave) -> None:
        del self._waves[wave.wave_id]
        wave.computation = None
        for leg in wave.legs:
            leg.is_in_wave = False
            self._events.wave_left(leg)
        if not self._waves:
            self._progress.idle()


def _error(failure: Failure) -> DuomoError:
    return DuomoError(failure.detail, code=failure.code, phase=failure.phase, retryable=failure.is_retryable)
