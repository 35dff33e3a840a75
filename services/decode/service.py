"""Owns the legs of one decode replica: messages in, handoffs and steps, tokens and endings out. Knows no torch; the worker does.

Everything here runs on the event loop. A leg ends in `_close`, and only there: whatever it holds (blocks, an open handle, places in
queues and in the batch) goes back, whichever way it ends.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import Counter

from duomo.errors import DeadlineError, DuomoError, EngineError, WireError
from duomo.telemetry.expert_tokens import ExpertTokens
from duomo.telemetry.tracing import Tracing
from duomo.wire.connection import Connection
from duomo.wire.messages import (
    Cancel,
    Message,
    PrefillDone,
    ReplicaReport,
    RequestFailed,
    Resume,
    StartDecode,
    TransferFenced,
    WaveAnnounced,
)
from services.decode.arrivals import LandedMessage
from services.decode.batch import Batch, BatchEnds, PlannedStep, Stops
from services.decode.grammars import LegGrammars
from services.decode.handoff import HandoffEnds, Handoffs, producer_lost
from services.decode.handoff_figures import HandoffFigures
from services.decode.intake import Intake
from services.decode.leg import Choice, Leg, LegKey, LegState
from services.decode.outbox import Outbox, cancel_of, failure_of, frame_of
from services.decode.pace import StepPace
from services.decode.pool import Pool
from services.decode.producers import Producers
from services.decode.reporting import Reporter
from services.decode.settings import arrivals_of, cache_of, limits_of, max_model_tokens, terms_of
from services.decode.spans import record_stream
from services.decode.steps import StepLoop
from services.decode.worker import StepOutput, StepWorker
from services.kv_transfer.agent import TransferAgent
from services.kv_transfer.directory import Directory
from services.kv_transfer.ending import end_tasks
from services.kv_transfer.loans import BlockLoans
from services.kv_transfer.membership import Membership, Progress, ReplicaCard
from services.kv_transfer.step_thread import StepThread

TICK_S = 0.05

log = logging.getLogger(__name__)


class DecodeService:
    """One replica. start() once, stop() once; what it was given is its creator's to close afterwards.

    means: how KV gets here, a TransferAgent or the blocks of this process' own pool. thread: where steps run; None: one of its own.
    """

    def __init__(
        self,
        card: ReplicaCard,
        worker: StepWorker,
        means: TransferAgent | BlockLoans,
        tracing: Tracing,
        directory: Directory | None = None,
        thread: StepThread | None = None,
    ) -> None:
        self.card = card
        self.progress = Progress(card.config.decode.hang_timeout_s)
        self.membership = Membership(card, self, directory)
        self.counters: Counter[str] = Counter()
        sizes = (worker.config.num_layers, worker.config.num_experts)
        self.prompt_experts, self.decoded_experts = ExpertTokens(*sizes), ExpertTokens(*sizes)
        self._tracing = tracing
        self._legs: dict[LegKey, Leg] = {}
        self._leg_ids = itertools.count(1)
        self._ready: list[Leg] = []
        self._intake = Intake(worker.config.vocab, max_model_tokens(card, worker), worker.check)
        self._is_pump_due = False
        self._outbox = Outbox()
        self._producers = Producers()
        self._arrivals = arrivals_of(card, worker, means, self._producers, directory, self._changed)
        self.pool = Pool(limits_of(card), means if isinstance(means, BlockLoans) else None, cache_of(card))
        figures = HandoffFigures(tracing, self._arrivals.way, self.counters)
        ends = HandoffEnds(post=self._producers.post, ready=self._ready.append, fail=self._fail, figures=figures)
        self._handoffs = Handoffs(self.pool, self._arrivals, terms_of(card, worker), ends)
        stops = Stops(eos_ids=worker.config.eos_ids, max_model_tokens=max_model_tokens(card, worker))
        self._batch = Batch(self.pool, stops, BatchEnds(preempted=self._preempted, finished=self._finish))
        self._steps = StepLoop(worker, self._arrivals, self._batch, self.progress, self, thread, self._handoffs)
        self._grammars = LegGrammars(card, worker, self._steps.wake, self._fail)
        self._ticker: asyncio.Task[None] | None = None
        self._pace = StepPace(card.config.decode)
        self._reporter = Reporter(
            card=card,
            tracing=tracing,
            worker=worker,
            pool=self.pool,
            batch=self._batch,
            arrivals=self._arrivals,
            progress=self.progress,
            pace=self._pace,
            counters=self.counters,
            experts=self.decoded_experts,
        )

    # life

    async def start(self) -> None:
        """Warm, then listen and register: a registered replica is ready."""
        await self._steps.start()
        await self._grammars.warm()
        self._ticker = asyncio.get_running_loop().create_task(self._tick_forever())
        await self.membership.start()

    async def drain(self, deadline_s: float) -> bool:
        return await self.membership.drain(deadline_s)

    async def stop(self) -> None:
        """Close every socket; legs still alive end with them."""
        await self.membership.stop()
        for leg in list(self._legs.values()):
            self._close(leg)
        if self._ticker is not None:
            await end_tasks((self._ticker,))
        await self._steps.stop()
        await self._arrivals.close()

    def check_health(self) -> None:
        """Raises EngineError when pending work does not move, what failure() says where something has ended."""
        self.progress.check()
        if (failure := self.failure()) is not None:
            raise failure

    # ReplicaLogic

    def joined(self, peer: Connection) -> None:
        if peer.peer.role == "prefill":
            self._producers.joined(peer)
            self._arrivals.joined(peer)
        elif peer.peer.role == "gateway" and self._outbox.joined(peer):
            self._gateway_gone(peer.peer.boot_id)

    def received(self, peer: Connection, message: Message) -> None:
        now_s = peer.received_s
        match message:
            case StartDecode() | Resume():
                self._start(peer, message, now_s)
            case WaveAnnounced():
                self._announced(peer, message, now_s)
            case PrefillDone():
                self._handoffs.prefill_done(peer.peer.boot_id, message, self._legs.get((message.request_id, message.attempt)), now_s)
                self._steps.wake()
            case TransferFenced():
                self._arrivals.fenced(message.handle_id)
                self._changed()
            case Cancel():
                self._cancelled(peer, message)
            case RequestFailed():
                self._taken_back(peer.peer.boot_id, message)
            case _:
                raise WireError(f"a decode replica takes no {type(message).__name__}", code="unexpected_message")

    def left(self, peer: Connection) -> None:
        boot_id = peer.peer.boot_id
        if peer.peer.role == "gateway" and self._outbox.left(peer):
            self._gateway_gone(boot_id)
        elif peer.peer.role == "prefill" and self._producers.left(peer):
            self._arrivals.left(peer)
            self._handoffs.producer_gone(boot_id)
            for leg in [leg for leg in self._legs.values() if leg.prefill.boot_id == boot_id and leg.state is not LegState.RUNNING]:
                if leg not in self._ready:
                    self._fail(leg, producer_lost(leg))

    def begin_drain(self) -> None:
        self._intake.is_draining = True

    def end_drain(self) -> None:
        self._intake.is_draining = False

    def flush_caches(self) -> int:
        num_blocks = self.pool.manager.flush()
        self.counters["prefix_blocks_flushed"] += num_blocks
        return num_blocks

    def num_live_requests(self) -> int:
        return len(self._legs)

    def failure(self) -> DuomoError | None:
        has_ticker = self._ticker is None or not self._ticker.done()
        ended = None if has_ticker else EngineError("the deadline ticker has ended", phase="decode.stream")
        return self._steps.failure or self._arrivals.failure or ended

    def report(self) -> ReplicaReport:
        """What the router's policy and the invariants read."""
        return self._reporter.report(self._legs.values(), is_draining=self._intake.is_draining)

    # StepHost

    def before_step(self, now_s: float) -> None:
        for leg in [leg for leg in self._ready if leg.may_join(now_s, self.card.config.delays.decode_admit_s)]:
            self._ready.remove(leg)
            self._batch.join(leg)
        if self._is_pump_due:
            self._is_pump_due = False
            self._handoffs.pump(now_s)

    def is_landing(self) -> bool:
        return bool(self._ready) or (self._arrivals.is_polled and self._handoffs.num_landing > 0)

    def landed(self, messages: tuple[LandedMessage, ...], now_s: float) -> None:
        for message in messages:
            self.counters["kv_mismatches"] += message.error is not None
            self._handoffs.landed(message, now_s)
        self._is_pump_due = True  # slots came back

    def stepped(self, step: PlannedStep, output: StepOutput) -> None:
        for row, error in output.errors.items():
            if step.rows[row].is_alive:
                self.pool.distrust(step.rows[row].leg)
                self._fail(step.rows[row].leg, error)
        emitted = self._batch.apply(step, output.tokens, output.routed_RE)
        now_s = time.monotonic()
        self._outbox.emit(frame_of(emitted, output, self._producers.rtt_s, now_s))
        self._pace.stepped(now_s, num_rows=len(step.rows), goes_on=self._batch.has_work)
        self.counters["tokens"] += len(emitted)
        for choice, token in emitted:
            choice.leg.routed.count_when_due(*self.decoded_experts.total_LE.shape)
            if token.finish_reason is not None:
                self._is_pump_due = True
                if not choice.leg.choices:
                    self._finish(choice.leg)

    def rested(self) -> None:
        if not self._legs:
            self.pool.check_at_rest()

    def broke(self, error: EngineError) -> None:
        log.critical("%s", error)
        self._intake.failure = error
        for leg in list(self._legs.values()):
            self._fail(leg, error)

    # messages

    def _start(self, peer: Connection, message: StartDecode | Resume, now_s: float) -> None:
        key = (message.request_id, message.attempt)
        if peer.peer.role != "gateway":
            raise WireError(f"a {peer.peer.role} may not start requests", code="unexpected_message")
        if key in self._legs:
            raise WireError(f"request {key[0]} attempt {key[1]} was started before", code="started_twice")
        leg = Leg.of(
            message,
            leg_id=next(self._leg_ids),
            gateway=peer.peer.boot_id,
            now_s=now_s,
            max_preemptions=self.pool.limits.max_preemptions,
        )
        if self._intake.is_void(*key):
            return
        if (refusal := self._intake.refusal(leg)) is not None:
            self._outbox.post(leg.gateway, failure_of(leg, refusal, now_s))
            return
        self._legs[key] = leg
        self._handoffs.expect(leg, now_s)
        self._grammars.expect(leg)
        self._steps.wake()

    def _announced(self, peer: Connection, message: WaveAnnounced, now_s: float) -> None:
        if peer.peer.role != "prefill":
            raise WireError(f"a {peer.peer.role} announces no waves", code="unexpected_message")
        if self._intake.is_void(message.request_id, message.attempt):
            self._producers.post(peer.peer.boot_id, cancel_of(message.request_id, message.attempt, message.traceparent, "void_attempt"))
            return
        self._handoffs.announced(peer.peer.boot_id, message, self._legs.get((message.request_id, message.attempt)), now_s)
        self._steps.wake()

    def _cancelled(self, peer: Connection, message: Cancel) -> None:
        if peer.peer.role == "prefill":
            self._taken_back(peer.peer.boot_id, message)
            return
        if message.choice is not None:
            self._cancel_choice(message, message.choice)
            return
        self._intake.take_back(message.request_id, message.attempt)
        void = [leg for leg in self._legs.values() if leg.request_id == message.request_id and leg.attempt <= message.attempt]
        for leg in void:
            self._abandon(leg, message.reason)

    def _cancel_choice(self, message: Cancel, number: int) -> None:
        leg = self._legs.get((message.request_id, message.attempt))
        if leg is None:
            return
        leg.cancelled_choices.add(number)
        if (choice := leg.choices.get(number)) is not None:
            self._batch.remove(choice)
            self._changed()
        if leg.state is LegState.RUNNING and not leg.choices:
            self._finish(leg)

    def _taken_back(self, producer: str, message: Cancel | RequestFailed) -> None:
        """A producer gave its leg up, and has told the gateway why; the leg waits for what the gateway makes of it."""
        self._handoffs.retract(producer, (message.request_id, message.attempt))
        leg = self._legs.get((message.request_id, message.attempt))
        if leg is None or leg.prefill.boot_id != producer or leg in self._ready or leg.state is LegState.RUNNING:
            return
        self._return(leg)
        leg.forget_handoff()

    # endings

    def _finish(self, leg: Leg) -> None:
        """The leg's last choice has ended by itself."""
        if leg.state is LegState.OVER:
            return
        now_s = time.monotonic()
        self._close(leg)
        self._outbox.finished(leg, now_s)

    def _preempted(self, choice: Choice) -> None:
        leg = choice.leg
        leg.num_preempted += 1
        self.counters["preemptions"] += 1
        self._outbox.preempted(choice, time.monotonic())
        if not leg.choices:
            self._close(leg)

    def _fail(self, leg: Leg, error: DuomoError) -> None:
        """End a leg with a typed answer to its gateway, and to its producer where that has heard of it."""
        if leg.state is LegState.OVER:
            return
        was_announced = leg.announced is not None and leg.state is not LegState.RUNNING
        self.counters[f"failed_{error.code}"] += 1
        leg.failure = error
        self._close(leg)
        failure = failure_of(leg, error, time.monotonic())
        self._outbox.post(leg.gateway, failure)
        if was_announced:
            self._producers.post(leg.prefill.boot_id, failure)

    def _gateway_gone(self, boot_id: str) -> None:
        for leg in [leg for leg in self._legs.values() if leg.gateway == boot_id]:
            self._abandon(leg, "gateway_gone")

    def _abandon(self, leg: Leg, reason: str) -> None:
        """End a leg that nobody waits for; a producer that is still sending is told to stop, so that it fences its handle."""
        is_handing_off = leg.state in (LegState.WAITING, LegState.GRANTED)
        self.counters["cancelled"] += 1
        self._close(leg)
        if is_handing_off:
            self._producers.post(leg.prefill.boot_id, cancel_of(leg.request_id, leg.attempt, leg.traceparent, reason))

    def _close(self, leg: Leg) -> None:
        """Give back everything that the leg holds."""
        if leg.state is LegState.OVER:
            return
        self._return(leg)
        if leg.times.first_token_s is not None:
            counts_LE = leg.routed.count(*self.decoded_experts.total_LE.shape)
            self.decoded_experts.add(counts_LE)
            if leg.prompt_counts_LE is not None:
                self.prompt_experts.add(leg.prompt_counts_LE)
                counts_LE += leg.prompt_counts_LE
            self.counters["expert_tokens"] += int(counts_LE.sum())
            record_stream(self._tracing, leg, time.monotonic(), counts_LE)
        leg.state = LegState.OVER
        del self._legs[leg.key]

    def _return(self, leg: Leg) -> None:
        self._handoffs.withdraw(leg)
        if leg in self._ready:
            self._ready.remove(leg)
        for choice in list(leg.choices.values()):
            self._batch.remove(choice)
        self.pool.give_back(leg.blocks)
        leg.blocks = []
        self.pool.holders.pop(leg.leg_id, None)
        self._changed()

    def _changed(self) -> None:
        """Blocks or slots came back: somebody may be granted now."""
        self._is_pump_due = True
        self._steps.wake()

    # time

    async def _tick_forever(self) -> None:
        ticked_s = time.monotonic()
        while True:
            await asyncio.sleep(TICK_S)
            now_s = time.monotonic()
            self._handoffs.tick(now_s, min(now_s - ticked_s, 2 * TICK_S))
            ticked_s = now_s
            for leg in [leg for leg in self._legs.values() if now_s > leg.deadline_s]:
                phase = "decode.stream" if leg.state is LegState.RUNNING else "decode.admit"
                self._fail(leg, DeadlineError(f"the request's time was over in state {leg.state.value}", phase=phase))
