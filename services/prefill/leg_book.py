"""Owns the legs of one prefill replica from StartPrefill to their end. Knows no thread's work and no connection's life.

Starts waves and handoffs, answers gateway and D. A leg that is over gives back what it holds as soon as neither the step thread nor the
writer thread can touch it: `_release`, the only place that frees blocks.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from duomo.engine.blocks import prefix_hashes
from duomo.errors import CapacityError, DeadlineError, DuomoError, EngineError, PeerError, RequestError, TransferError, WireError
from duomo.grammar.cache import Grammars
from duomo.grammar.state import Grammar
from duomo.telemetry.expert_tokens import ExpertTokens
from duomo.telemetry.tracing import Tracing
from duomo.wire.connection import Connection
from duomo.wire.messages import Cancel, HandleOffered, Message, PullKv, RequestFailed, StartPrefill, TokensEmitted
from duomo.wire.prompt_logprobs import PromptScores
from duomo.wire.values import EmittedToken
from services.kv_transfer.agent import TransferAgent
from services.kv_transfer.loans import BlockLoans
from services.kv_transfer.membership import Progress, ReplicaCard
from services.kv_transfer.step_thread import StepThread
from services.prefill import first_tokens
from services.prefill.decode_peers import DecodePeers
from services.prefill.handoff import Handoffs
from services.prefill.leg import Leg, Stage
from services.prefill.leg_messages import announcement_of, cancel_of, done_of, failed_of, finished_of, scored_of
from services.prefill.loan_handoffs import LoanHandoffs
from services.prefill.pending import Pending
from services.prefill.prompt_blocks import LentTables, PromptBlocks, TableSource
from services.prefill.ring_handoffs import RingHandoffs
from services.prefill.snapshot import Key, Limits
from services.prefill.waves import WaveLoop
from services.prefill.worker import WaveOutput, WaveWorker

LEASE_S = 10.0  # after the last push: D lands, verifies or pulls within this, or the handoff has failed
ENDED_LEASE_S = 1.0  # where every choice ended here, D needs no KV: what it has not released by then nobody misses


class LegBook:
    """All legs. means: how KV gets to decode, a TransferAgent or, in decode's own process, the blocks that it lends.

    connect: opens a socket to a decode replica whose messages come back through the service. thread: the caller's to close.
    """

    def __init__(
        self,
        card: ReplicaCard,
        worker: WaveWorker,
        means: TransferAgent | BlockLoans,
        tracing: Tracing,
        progress: Progress,
        connect: Callable[[str], Awaitable[Connection]],
        thread: StepThread,
    ) -> None:
        section = card.config.prefill
        self.card = card
        self.counters: Counter[str] = Counter()
        self.experts = ExpertTokens(worker.config.num_layers, worker.config.num_experts)
        self.is_draining = False
        self.blocks: TableSource
        self.handoffs: Handoffs
        if isinstance(means, BlockLoans):
            self.peers = DecodePeers(None, connect, self._peer_changed, self._peer_lost)
            self.blocks, self.handoffs = LentTables(means), LoanHandoffs(means)
        else:
            self.peers = DecodePeers(means, connect, self._peer_changed, self._peer_lost)
            self.blocks = PromptBlocks(section.num_blocks, card.config.model.block_tokens, section.prefix_cache_blocks)
            self.handoffs = RingHandoffs(means, self.peers, worker, tracing, self._moved, self.fail, self.counters)
        self._max_tokens = min(card.config.model.max_model_tokens or worker.config.max_position_tokens, worker.config.max_position_tokens)
        num_blocks = self.blocks.manager.num_blocks
        limits = Limits.of(
            section,
            num_groups=worker.num_groups,
            num_blocks=num_blocks,
            max_prompt_tokens=self._max_tokens,
            max_ttft_s=card.config.gateway.max_ttft_s,
        )
        delay_s = card.config.delays.prefill_queue_s
        self.waves = WaveLoop(worker, limits, progress, thread, lambda: self.blocks.num_available, self, delay_s)
        self.grammars = Grammars(card.config.model.path, worker.config.vocab, worker.config.eos_ids)
        self._worker = worker
        self._tracing = tracing
        self._progress = progress
        self._legs: dict[Key, Leg] = {}

    @property
    def num_live(self) -> int:
        """Legs that hold something or owe somebody an answer."""
        return len(self._legs)

    def num_work_tokens(self) -> int:
        """Prompt tokens yet to be computed: what waves have left, and of prompts that wait what the prefix cache has not."""
        manager = self.blocks.manager
        waiting = self.waves.waiting.values()
        return self.waves.num_tokens_left + sum(
            len(leg.token_ids) - manager.num_known(leg.prefix_hashes) * manager.block_tokens for leg in waiting
        )

    # messages

    def start(self, gateway: Connection, request: StartPrefill) -> None:
        """A new leg. Raises WireError for one that is here already."""
        key = (request.request_id, request.attempt)
        if key in self._legs:
            raise WireError(f"request {request.request_id} attempt {request.attempt} was started before", code="duplicate_request")
        for earlier in self._attempts(request.request_id, request.attempt):
            self._end(earlier, "superseded")
        received_s = gateway.received_s
        token_ids = request.prompt_ids + request.emitted_ids
        leg = Leg(
            request=request,
            gateway=gateway,
            token_ids=token_ids,
            num_blocks=self.blocks.manager.num_blocks_for(len(token_ids)),
            received_s=received_s,
            deadline_s=received_s + request.remaining_s,
            queue_span=self._tracing.start_span("prefill.queue", request.traceparent, start_s=received_s),
        )
        self._legs[key] = leg
        self.counters["prefills_started"] += 1
        refusal = self._refusal(request)
        if refusal is not None:
            self.fail(leg, refusal)
            return
        leg.deadline_timer = asyncio.get_running_loop().call_later(max(leg.deadline_s - time.monotonic(), 0.0), self._deadline_passed, leg)
        self.peers.want(request.decode)
        if request.sampling.constraint is None:
            self._queue(leg)
        else:
            self.grammars.ask(request.sampling.constraint, partial(self._compiled, leg), partial(self.fail, leg))

    def cancel(self, message: Cancel) -> None:
        """From the gateway or from D: this attempt and all earlier ones, or one choice of them. Answered by nothing."""
        for leg in self._attempts(message.request_id, message.attempt):
            if message.choice is not None:
                leg.cancelled_choices.add(message.choice)
            if message.choice is None or leg.cancelled_choices.issuperset(leg.request.choices):
                self._end(leg, "cancelled")

    def cancel_all_of(self, gateway: Connection) -> None:
        """A gateway is gone, and with it everybody who wanted its answers."""
        for leg in [leg for leg in self._legs.values() if leg.gateway is gateway]:
            self._end(leg, "gateway_gone")

    def granted(self, message: HandleOffered) -> None:
        """D's grant. One that comes too late is fenced at once, so that D has its slots back."""
        handle = message.handle
        leg = self._legs.get((message.request_id, message.attempt))
        if leg is None or leg.is_over or leg.stage is not Stage.ANNOUNCED:
            self.handoffs.refuse(message)
            return
        is_ours = handle.producer_boot_id == self.card.boot_id and handle.model_fingerprint == self.card.model_fingerprint
        is_for_leg = (handle.num_tokens, handle.num_blocks) == (len(leg.token_ids), leg.num_blocks)
        if not is_ours or not is_for_leg or not self.handoffs.accept(leg, handle):
            self.handoffs.refuse(message)
            self.fail(leg, TransferError("the handle offered is for another process, model, ring or prompt", code="stale_handle"))
            return
        leg.stage = Stage.GRANTED
        leg.look(is_reachable=True)
        self.waves.wake()

    def pull(self, message: PullKv) -> None:
        """D wants a message again."""
        self.counters["kv_pulls"] += 1
        if self.handoffs.pull(message):
            return
        leg = self._legs.get((message.request_id, message.attempt))
        if leg is not None:
            self.fail(leg, TransferError(f"message {message.message_idx} was pulled, but is not leased any more", code="kv_not_leased"))

    def failed_by_decode(self, message: RequestFailed) -> None:
        """D gave the leg up. The gateway hears it from whoever is first; the second report is void there."""
        leg = self._legs.get((message.request_id, message.attempt))
        if leg is not None:
            leg.announced_s = None  # D needs no Cancel
            self.fail(leg, DuomoError(message.detail, code=message.code, phase=message.phase, retryable=message.retryable))

    # WaveEvents

    def allocate(self, leg: Leg, wave_id: int) -> bool:
        """See WaveEvents."""
        assert leg.handoff is not None
        try:
            handle_id, salt = leg.handoff.handle.handle_id, leg.request.cache_salt
            table = self.blocks.allocate(handle_id, leg.token_ids, salt, reads_cache=not leg.is_scored)
        except TransferError as error:
            self.fail(leg, error)
            return False
        if table is None:
            return False
        leg.blocks, leg.cached_tokens = table.blocks, table.cached_tokens
        self.counters["prefill_tokens_cached"] += table.cached_tokens
        self.counters["prefill_tokens_computed"] += len(leg.token_ids) - table.cached_tokens
        leg.start_computing(wave_id, time.monotonic(), self._tracing)
        return True

    def announce(self, leg: Leg) -> None:
        """See WaveEvents."""
        now_s = time.monotonic()
        leg.stage, leg.announced_s = Stage.ANNOUNCED, now_s
        leg.look(is_reachable=True)
        announcement = announcement_of(leg, self.waves.num_waves_formed + 1, self._worker.group_bounds, now_s)
        self.peers.post(leg.request.decode.boot_id, announcement)

    @property
    def hears_groups(self) -> bool:
        """See WaveEvents."""
        return self.handoffs.sends

    def groups_launched(self, legs: Sequence[Leg], groups: Sequence[tuple[int, Pending[float]]]) -> None:
        """See WaveEvents."""
        self.handoffs.groups_launched(legs, groups)

    def group_computed(self, legs: Sequence[Leg], group: int) -> None:
        """See WaveEvents."""
        for leg in legs:
            self.handoffs.group_computed(leg, group)

    def scored(self, leg: Leg, scores: PromptScores) -> None:
        """See WaveEvents."""
        if scores.has_nan:
            detail = "the logits of a prompt token hold a NaN"
            self.fail(leg, EngineError(detail, code="bad_logits", phase="prefill.compute", retryable=False))
            return
        self.counters["prompt_tokens_scored"] += scores.num_tokens
        _post(leg.gateway, scored_of(leg, scores, time.monotonic()))

    def wave_computed(self, legs: Sequence[Leg], outputs: Sequence[WaveOutput]) -> None:
        """First tokens go out before anything else, in one frame for each gateway; but of a prompt alone decode is told before the gateway:
        its step waits for that, and the client's token for one message."""
        frames: dict[Connection, list[EmittedToken]] = {}
        decided = []
        for leg, output in zip(legs, outputs, strict=True):
            leg.computed_s, leg.sampled_s, leg.stage = output.computed_s, output.sampled_s, Stage.HANDING_OFF
            chosen = tuple(first_tokens.ChosenToken(token_id=one.token_id, logprob=one.logprob, top=one.top) for one in output.sampled)
            timings = leg.timings(time.monotonic())
            first = first_tokens.decide(leg.request, chosen, leg.cancelled_choices, self._worker.config.eos_ids, timings)
            frames.setdefault(leg.gateway, []).extend(first.emitted)
            decided.append(first)
        if len(legs) == 1:
            self._tell_decode(legs, outputs, decided)
        for gateway, tokens in frames.items():
            if tokens:
                _post(gateway, TokensEmitted(tokens=tuple(tokens)))
                gateway.flush()
        if len(legs) > 1:
            self._tell_decode(legs, outputs, decided)
        for output in outputs:
            self.experts.add(output.expert_counts)
        for leg in legs:  # last: a span that ends may be written to a disk
            if leg.compute_span is not None:
                leg.compute_span.end(at_s=leg.sampled_s)

    def wave_left(self, leg: Leg) -> None:
        """See WaveEvents."""
        if leg.stage is Stage.HANDING_OFF and leg.blocks:
            self.blocks.commit(leg.blocks)
        self._moved(leg)

    def fail(self, leg: Leg, error: DuomoError) -> None:
        """End the leg with a typed failure to the gateway; D is told that nothing more comes. Nothing happens when it is over."""
        if leg.is_over:
            return
        self.counters[f"failed_{error.code}"] += 1
        if error.code == "bad_logits":  # it may be what the leg found that is wrong: whoever begins the same is not to fail by it too
            self.blocks.manager.forget(leg.blocks)
        now_s = time.monotonic()
        leg.queue_span.fail(error)
        if leg.compute_span is not None:
            leg.compute_span.fail(error)
        _post(leg.gateway, failed_of(leg, error, now_s))
        if leg.is_announced:
            self.peers.post(leg.request.decode.boot_id, cancel_of(leg, error.code, now_s))
        self._end(leg, "failed")

    # inside

    def _compiled(self, leg: Leg, grammar: Grammar) -> None:
        leg.grammar = grammar
        if not leg.is_over:
            self._queue(leg)

    def _queue(self, leg: Leg) -> None:
        manager = self.blocks.manager
        if manager.has_prefix_cache and not leg.is_scored:
            usable = leg.token_ids[: (len(leg.token_ids) - 1) // manager.block_tokens * manager.block_tokens]
            leg.prefix_hashes = tuple(prefix_hashes(usable, manager.block_tokens, leg.request.cache_salt))
        self.waves.waiting[leg.key] = leg
        leg.look(is_reachable=self.peers.is_reachable(leg.request.decode.boot_id))
        self.waves.wake()

    def _attempts(self, request_id: str, up_to: int) -> list[Leg]:
        return [leg for leg in self._legs.values() if leg.request.request_id == request_id and leg.request.attempt <= up_to]

    def _refusal(self, request: StartPrefill) -> DuomoError | None:
        token_ids = request.prompt_ids + request.emitted_ids
        if self.is_draining:
            return CapacityError("this prefill replica is draining", code="draining", phase="prefill.queue")
        if not self.handoffs.reaches(request.decode.boot_id):
            detail = f"{request.decode.replica_id} lives in another process, and this replica hands over within its own alone"
            return PeerError(detail, code="not_colocated", phase="kv.handoff")
        if not token_ids or not request.choices or len(request.emitted_ids) >= request.sampling.max_tokens:
            return RequestError("a prefill needs a token, a choice and a token left to generate", code="bad_request")
        if len(token_ids) > self._max_tokens:
            return RequestError(f"{len(token_ids)} tokens are over the context limit of {self._max_tokens}", code="prompt_too_long")
        vocab = self._worker.config.vocab
        if not 0 <= min(token_ids) <= max(token_ids) < vocab:
            return RequestError(f"token ids must lie in 0..{vocab - 1}", code="bad_token_id")
        try:
            self._worker.check(request.sampling)
        except RequestError as error:
            return error
        return None

    def _tell_decode(self, legs: Sequence[Leg], outputs: Sequence[WaveOutput], decided: Sequence[first_tokens.FirstTokens]) -> None:
        for leg, output, first in zip(legs, outputs, decided, strict=True):
            leg.has_only_ended_choices = len(first.ended_choices) == len(leg.request.choices)
            self.peers.post(leg.request.decode.boot_id, done_of(leg, output, first, time.monotonic()))
        for boot_id in {leg.request.decode.boot_id for leg in legs}:
            self.peers.flush(boot_id)

    def _peer_changed(self, boot_id: str) -> None:
        for leg in self.waves.waiting.values():
            if leg.request.decode.boot_id == boot_id:
                leg.look(is_reachable=True)
        self.waves.wake()

    def _peer_lost(self, boot_id: str, error: PeerError) -> None:
        for leg in [leg for leg in self._legs.values() if leg.request.decode.boot_id == boot_id]:
            self.fail(leg, error)

    def _deadline_passed(self, leg: Leg) -> None:
        phase = "kv.handoff" if leg.stage is Stage.HANDING_OFF else "prefill.compute" if leg.is_in_wave else "prefill.queue"
        self.fail(leg, DeadlineError("the request's deadline passed on the prefill replica", phase=phase))

    def _lease_ended(self, leg: Leg) -> None:
        if leg.has_only_ended_choices:
            self._finish(leg)
            return
        self.fail(leg, TransferError(f"not all KV was released within {LEASE_S:g} s of its last write", code="transfer_timeout"))

    def _moved(self, leg: Leg) -> None:
        """The leg's handoff or wave changed: finish it, or give back what it held, if that can be done now."""
        handoff = leg.handoff
        if not leg.is_over and leg.stage is Stage.HANDING_OFF and not leg.is_in_wave and handoff is not None and handoff.num_in_flight == 0:
            if not handoff.unlanded:
                self._finish(leg)
                return
            if leg.lease_timer is None:
                lease_s = ENDED_LEASE_S if leg.has_only_ended_choices else LEASE_S
                leg.lease_timer = asyncio.get_running_loop().call_later(lease_s, self._lease_ended, leg)
        self._release(leg)

    def _finish(self, leg: Leg) -> None:
        leg.is_finished = True
        self._end(leg, "finished")

    def _end(self, leg: Leg, how: str) -> None:
        """The leg is over: out of the queue, its handoff closed, then released."""
        if leg.is_over:
            return
        leg.is_over = True
        self.counters[f"prefills_{how}"] += 1
        for timer in (leg.lease_timer, leg.deadline_timer):
            if timer is not None:
                timer.cancel()
        self.waves.waiting.pop(leg.key, None)
        leg.end_spans(time.monotonic())
        self.handoffs.close(leg)
        self._release(leg)

    def _release(self, leg: Leg) -> None:
        handoff = leg.handoff
        is_read = handoff is not None and not (handoff.is_terminal and handoff.num_in_flight == 0)
        if not leg.is_over or leg.is_in_wave or is_read or self._legs.get(leg.key) is not leg:
            return
        self.blocks.free(leg.blocks)
        leg.blocks = ()
        del self._legs[leg.key]
        if leg.is_finished:
            _post(leg.gateway, finished_of(leg, time.monotonic()))
        if not self._legs:
            self.blocks.manager.check_at_rest()
        self.waves.wake()


def _post(gateway: Connection, message: Message) -> None:
    with contextlib.suppress(PeerError):  # its reading task sees the same and ends its legs
        gateway.post(message)
