"""Owns the live waves: plan, run a piece in the step thread, apply. Knows no socket and no handle; what follows is told to WaveEvents.

One task on the event loop plans whenever something changed; at most one piece is under way at a time. Between pieces everything is decided
anew by policy.plan, which is told what pieces were measured to take. A device's piece is launched by the step thread and waited for by a
thread that does nothing else, so that decode steps are launched behind it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from duomo.errors import DeadlineError, DuomoError, EngineError
from duomo.wire.prompt_logprobs import PromptScores
from services.kv_transfer.membership import Progress
from services.kv_transfer.step_thread import StepThread
from services.prefill.leg import Leg
from services.prefill.pending import Over, Pending
from services.prefill.pieces import Piece, advanced, finished_groups, next_piece, num_rows, parts_of
from services.prefill.policy import Failure, NewWave, NextPiece, Plan, new_wave, plan
from services.prefill.running_piece import LaunchedPiece, PieceOutput, RunningPiece, Wave
from services.prefill.scoring import Scoring
from services.prefill.slack import share_left
from services.prefill.snapshot import Key, Limits, Snapshot
from services.prefill.wave_costs import GroupCosts
from services.prefill.worker import Computation, WaveOutput, WaveWorker

LEAST_SHARE_MEASURED = 0.25  # of a full wave, before its speed is told

log = logging.getLogger(__name__)


class WaveEvents(Protocol):
    """What the loop asks of, and tells to, the service. All on the event loop."""

    def allocate(self, leg: Leg, wave_id: int) -> bool:
        """Give the leg its blocks: it starts in this wave. False when there are not enough, or when it has failed."""

    def announce(self, leg: Leg) -> None: ...

    @property
    def hears_groups(self) -> bool:
        """Whether group_computed has anything to do before its piece is over."""

    def groups_launched(self, legs: Sequence[Leg], groups: Sequence[tuple[int, Pending[float]]]) -> None:
        """A device computes all rows of these layer groups, each up to what stands beside it. group_computed follows, unless the wave
        fails."""

    def group_computed(self, legs: Sequence[Leg], group: int) -> None:
        """All rows of a layer group are computed. Of a piece with several groups one after the other, in order, each as soon as that is
        known: of a device's wave the last one before its first tokens are sampled, of a wave that was over at once after wave_computed."""

    def scored(self, leg: Leg, scores: PromptScores) -> None:
        """The next of a prompt's own log-probabilities, in order, all of them before wave_computed."""

    def wave_computed(self, legs: Sequence[Leg], outputs: Sequence[WaveOutput]) -> None:
        """The last group is computed and first tokens are sampled."""

    def wave_left(self, leg: Leg) -> None:
        """The step thread will not touch the leg's blocks again."""

    def fail(self, leg: Leg, error: DuomoError) -> None: ...


class WaveLoop:
    """Drives the waves of one replica.

    waiting: legs that are not in a wave, by key; the service adds and removes them and calls wake(). num_free_blocks: how many blocks
    could be allocated now. delay_s: slept before a wave's first piece, for tests (config.DelaySection). thread: the service's to close.
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
        self.expert_bytes_read = 0
        self._worker = worker
        self._limits = limits
        self._progress = progress
        self._num_free_blocks = num_free_blocks
        self._events = events
        self._delay_s = delay_s
        self._waves: dict[int, Wave] = {}
        self._costs = GroupCosts()
        self._last_pieces: deque[tuple[float, float]] = deque(maxlen=32)  # seconds computed, and from when each was wanted to its end
        self._running: RunningPiece | None = None
        self._tallies: set[asyncio.Task[None]] = set()
        self._woken = asyncio.Event()
        self._thread = thread
        self._waiting_thread = StepThread("prefill-waits")
        self._scoring = Scoring(worker, thread, self._waiting_thread, progress, events.scored)

    @property
    def num_running(self) -> int:
        return sum(not leg.is_over for wave in self._waves.values() for leg in wave.legs)

    @property
    def num_tokens_left(self) -> int:
        """Of live waves: tokens times the share of their layers that has not begun."""
        return sum(round(wave.view.num_tokens * share_left(wave.view)) for wave in self._waves.values() if wave.is_wanted)

    @property
    def tokens_per_s(self) -> float:
        """In full waves, by what they cost and by how much of the time of the last pieces was theirs; 0: nothing is known. Small waves say
        little of full ones: weights are read for few rows too."""
        if self._costs.most_rows < self._limits.company_tokens * LEAST_SHARE_MEASURED:
            return 0.0
        computed_s, took_s = (sum(part) for part in zip(*self._last_pieces, strict=True)) if self._last_pieces else (1.0, 1.0)
        return self._costs.curve.rows_per_s(self._limits.company_tokens, self._limits.num_groups) * min(computed_s / took_s, 1.0)

    @property
    def least_s(self) -> float:
        """What the smallest waves take; 0: nothing is known."""
        return self._costs.curve.least_s(self._limits.num_groups)

    def wake(self) -> None:
        """Something changed: plan again soon."""
        self._woken.set()

    async def warm(self) -> None:
        """Run the worker's dummy waves in the step thread."""
        await self._thread.run("group", self._worker.enter_step_thread)
        await self._thread.run("group", self._worker.warm)

    async def run(self) -> None:
        """Plan, run, apply until cancelled."""
        try:
            while True:
                await self._turn()
        finally:
            if self._running is not None:
                self._running.done.cancel()
            for tally in self._tallies:
                tally.cancel()

    def close(self) -> None:
        """After the end of run() and of the step thread. Waits for what a device still computes, in bounds."""
        self._waiting_thread.close()

    async def _turn(self) -> None:
        self._woken.clear()
        if self._running is not None and self._running.done.done():
            self._apply_piece()
        self._drop_unwanted()
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
            waves=tuple(wave.view for wave in self._waves.values() if wave.view.has_more),
            num_free_blocks=self._num_free_blocks(),
            is_running=self._running is not None,
            limits=self._limits,
            costs=self._costs.curve,
            is_decoding=self._thread.is_decoding,
        )

    def _apply(self, decision: Plan) -> None:
        for failure in decision.failures:
            late = self.waiting.get(failure.key)
            if late is not None:
                self._events.fail(late, _error(failure))
        if isinstance(decision.run, NewWave):
            self._form(decision.run)
        elif isinstance(decision.run, NextPiece):
            self._start_piece(self._waves[decision.run.wave_id], decision.run.piece)
        for key in decision.announce:
            leg = self.waiting.get(key)
            if leg is not None:
                self._events.announce(leg)

    def _form(self, run: NewWave) -> None:
        legs = []
        for key in run.keys:
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
        view = new_wave(self.num_waves_formed, [leg.view for leg in legs], num_tokens, self._limits, self._costs.curve)
        wave = Wave(view=view, legs=tuple(legs))
        self._waves[view.wave_id] = wave
        self._start_piece(wave, next_piece(view, self._limits, self._costs.curve, may_run_on=run.may_run_on))

    def _start_piece(self, wave: Wave, piece: Piece) -> None:
        assert self._running is None
        before = wave.view
        for other in self._waves.values():
            other.view = replace(other.view, num_passes=0 if other is wave else other.view.num_passes + 1)
        wave.view = advanced(wave.view, piece)
        done = asyncio.ensure_future(self._piece(wave, piece, is_last=not wave.view.has_more))
        done.add_done_callback(lambda _: self._woken.set())
        self._running = RunningPiece(wave=wave, before=before, piece=piece, done=done)
        self._progress.pending()
        for leg in wave.legs:
            if leg.compute_span is not None and not leg.is_over:
                leg.compute_span.event("group_started", self._running.attributes, at_s=self._running.started_s)

    async def _piece(self, wave: Wave, piece: Piece, *, is_last: bool) -> PieceOutput | None:
        """Launched by the step thread, waited for by another: decode steps are launched behind it meanwhile. None: nothing was."""
        if is_last and any(leg.is_scored for leg in wave.legs):
            return await self._scored_piece(wave, piece)
        launched = await self._thread.run("group", self._compute, wave, piece, is_last=is_last)
        return None if launched is None else await self._landed(launched)

    async def _scored_piece(self, wave: Wave, piece: Piece) -> PieceOutput | None:
        """A wave's last piece, with prompts to score between its layers and its first tokens."""
        launched = await self._thread.run("group", self._compute, wave, piece, is_last=False)
        if launched is None:
            return None
        computed = await self._landed(launched)
        assert wave.computation is not None
        await self._scoring.run(wave.computation, wave.legs)
        sampled = await self._thread.run("group", self._sample, wave)
        ended = await self._landed(LaunchedPiece(seconds=(), ends=(), outputs=sampled))
        return replace(ended, seconds=computed.seconds)

    async def _landed(self, launched: LaunchedPiece) -> PieceOutput:
        """Groups are told as they end, the last one of a wave beside its first tokens; all of a piece that is over are told by its end."""
        if launched.is_over:
            return launched.wait(lambda _: self._progress.moved())
        loop, running = asyncio.get_running_loop(), self._running
        if running is not None:
            live = [leg for leg in running.wave.legs if not leg.is_over]
            ends = zip(launched.ends, launched.seconds, strict=True)
            self._events.groups_launched(live, [(group, computed) for group, computed in ends if group is not None])

        def moved(group: int | None) -> None:
            self._progress.moved()
            if group is not None and running is not None:
                loop.call_soon_threadsafe(self._group_over, running, group)

        return await self._waiting_thread.run("group", launched.wait, moved)

    def _group_over(self, running: RunningPiece, group: int) -> None:
        """A group of the piece under way is computed, the device is at what follows."""
        if self._running is running:
            running.told.add(group)
            self._events.group_computed([leg for leg in running.wave.legs if not leg.is_over], group)

    def _compute(self, wave: Wave, piece: Piece, *, is_last: bool) -> LaunchedPiece | None:
        """In the step thread: one piece; after the last one the first tokens of every leg that is still wanted. None: nobody of it is."""
        if not wave.is_wanted:
            return None
        if wave.computation is None:
            wave.computation = self._worker.begin([leg.wave_row() for leg in wave.legs], self._limits.chunk_tokens_of(wave.view.num_tokens))
        has_all_rows = piece.chunks[1] == wave.view.num_chunks  # else no group of it is complete
        parts = parts_of(piece, by_group=has_all_rows and self._events.hears_groups)
        seconds = tuple(self._run_parts(wave.computation, [part for part, _ in parts]))
        ends = tuple(end for _, end in parts)
        return LaunchedPiece(seconds=seconds, ends=ends, outputs=self._sample(wave) if is_last else Over(()))

    def _sample(self, wave: Wave) -> Pending[tuple[WaveOutput, ...]]:
        """In the step thread, after the last layer."""
        assert wave.computation is not None
        eos_ids = self._worker.config.eos_ids
        rows = [[] if leg.is_over else leg.choice_rows(eos_ids) for leg in wave.legs]
        return self._worker.sample(wave.computation, rows)

    def _run_parts(self, computation: Computation, parts: Sequence[Piece]) -> Iterator[Pending[float]]:
        """One after the other: a long prompt's are many, and each that is over is a sign of life."""
        for part in parts:
            seconds = self._worker.run_piece(computation, part)
            if isinstance(seconds, Over):
                self._progress.moved()
            yield seconds

    def _apply_piece(self) -> None:
        """A piece is over: hand the KV of its groups on, then end or drop its wave."""
        running, self._running = self._running, None
        assert running is not None
        wave, piece = running.wave, running.piece
        self._progress.advance()
        error = running.done.exception()
        if error is not None:
            self._wave_failed(wave, error)
            return
        result, now_s = running.done.result(), time.monotonic()
        if result is None:
            self._abandon(wave)
            return
        self.num_groups_run += piece.num_groups
        if not any(leg.is_scored for leg in wave.legs):  # scoring takes its time beside the layers'
            self._last_pieces.append((result.seconds, max(now_s - running.started_s, result.seconds, 1e-9)))
        self._costs.observe(num_rows(running.before, piece, self._limits), piece.num_groups, result.seconds)
        for leg in wave.legs:
            if leg.compute_span is not None and not leg.is_over:
                leg.compute_span.event("group_computed", running.attributes, at_s=now_s)
            if not leg.is_over and now_s >= leg.deadline_s:
                self._events.fail(leg, DeadlineError("the deadline passed between two layer groups", phase="prefill.compute"))
        live = [leg for leg in wave.legs if not leg.is_over]
        for leg, output in zip(wave.legs, result.outputs, strict=False):
            if output.error is not None and not leg.is_over:
                self._events.fail(leg, output.error)
        if result.outputs:
            self.expert_bytes_read += sum(output.expert_bytes for output in result.outputs)  # of the wave, whoever of it still lives
            chosen = [(leg, output) for leg, output in zip(wave.legs, result.outputs, strict=True) if not leg.is_over]
            self._events.wave_computed([leg for leg, _ in chosen], [output for _, output in chosen])
        for group in finished_groups(running.before, piece):
            if group in running.told:
                continue
            self._events.group_computed([leg for leg in live if not leg.is_over], group)
        if result.outputs:
            self._leave(wave)

    def _drop_unwanted(self) -> None:
        """Waves between two pieces that nobody wants any more run no further."""
        for wave in list(self._waves.values()):
            if not wave.is_wanted and (self._running is None or self._running.wave is not wave):
                self._abandon(wave)

    def _abandon(self, wave: Wave) -> None:
        """What it has read was read, and is counted."""
        if wave.computation is not None:
            tally = asyncio.ensure_future(self._tally(wave.computation))
            self._tallies.add(tally)
            tally.add_done_callback(self._tallies.discard)
        self._leave(wave)

    async def _tally(self, computation: Computation) -> None:
        try:
            pending = await self._thread.run("group", self._worker.use_of, computation)
            use = pending.result if isinstance(pending, Over) else await self._waiting_thread.run("group", pending.wait)
        except Exception:  # a count is no reason to end anything: a device that is broken says so at the next piece
            log.exception("what a wave had read when it was abandoned is not counted")
            return
        self.expert_bytes_read += use.bytes_read

    def _wave_failed(self, wave: Wave, error: BaseException) -> None:
        failure = error if isinstance(error, DuomoError) else EngineError(f"a layer group failed: {error!r}")
        for leg in wave.legs:
            if not leg.is_over:
                self._events.fail(leg, failure)
        self._leave(wave)

    def _leave(self, wave: Wave) -> None:
        del self._waves[wave.view.wave_id]
        wave.computation = None
        for leg in wave.legs:
            leg.is_in_wave = False
            self._events.wave_left(leg)
        if not self._waves:
            self._progress.idle()


def _error(failure: Failure) -> DuomoError:
    return DuomoError(failure.detail, code=failure.code, phase=failure.phase, retryable=failure.is_retryable)
