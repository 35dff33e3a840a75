"""Owns legs from their announcement until their KV is here: blocks, then a handle, then messages. Knows no batch, tensor or ring.

An announcement may come before its StartDecode (another socket brought it): it waits in `early`. Grants follow the order of
announcement; a leg that has blocks and finds its ring full waits for slots without holding up the legs of other rings.
A message is verified and scattered by the step thread; what it saw comes back here through `landed`.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from duomo.errors import CapacityError, DuomoError, PeerError, TransferError, WireError
from duomo.wire.messages import GroupLanded, HandleOffered, Message, PrefillDone, PullKv, WaveAnnounced
from services.decode.arrivals import Arrivals, HandoffTerms, LandedMessage
from services.decode.handoff_figures import HandoffFigures
from services.decode.leg import Leg, LegKey, LegState
from services.decode.policy import plan_grants
from services.decode.pool import Pool
from services.decode.prompt_experts import prompt_counts

TOLD_WITHIN_S = 0.002  # PrefillDone, behind the last message
JOIN_WITHIN_S = 0.1  # from the first message of a leg that steps are not launched ahead for: several of a large model's steps
MAX_AWAITED_LEGS = 2
PULL_AFTER = 0.3  # of write_timeout_s without a message, once everything is computed: a write that was lost is asked for again
MAX_GRANTS_A_TURN = 32  # how far down the queue one planning looks; the queue is served in order, so nobody is passed over


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlyAnnouncement:
    """An announcement whose StartDecode has not come yet."""

    producer: str
    message: WaveAnnounced
    seen_s: float
    deadline_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class HandoffEnds:
    """Where legs go from here, and how peers are told: post(boot id, message) drops what a dead peer no longer needs.

    figures: hear of each handoff once, given up or arrived, whatever becomes of its leg then.
    """

    post: Callable[[str, Message], None]
    ready: Callable[[Leg], None]
    fail: Callable[[Leg, DuomoError], None]
    figures: HandoffFigures


class Handoffs:
    """Every leg between WAITING and RUNNING, and the handles of those that are landing."""

    def __init__(self, pool: Pool, arrivals: Arrivals, terms: HandoffTerms, ends: HandoffEnds) -> None:
        self._pool = pool
        self._arrivals = arrivals
        self._terms = terms
        self._ends = ends
        self._early: dict[LegKey, EarlyAnnouncement] = {}
        self._for_blocks: deque[Leg] = deque()
        self._for_slots: dict[str, deque[Leg]] = {}
        self._landing: dict[int, Leg] = {}
        self._untold: list[Leg] = []  # arrived
        self._orders = itertools.count(1)

    @property
    def num_waiting(self) -> int:
        return len(self._for_blocks)

    @property
    def num_landing(self) -> int:
        """Legs with an open handle."""
        return len(self._landing)

    def joins_soon(self, now_s: float) -> bool:
        """Whether some of a leg's KV is here or being written, and the rest is likely to follow within a step or two.

        Not of many legs at once, nor of one whose landing takes long: others would wait for each step's launch all the while.
        """
        firsts_s = [leg.times.first_landed_s for leg in self._landing.values() if leg.times.first_landed_s is not None]
        num_soon = sum(now_s - first_s < JOIN_WITHIN_S for first_s in firsts_s)
        return 0 < max(num_soon, self._arrivals.is_writing) <= MAX_AWAITED_LEGS

    def lands_still(self, now_s: float) -> Leg | None:
        """A leg of which some KV is here and some is not. One whose last message came just now waits for a word that is about to come."""
        begun = ((leg, leg.times.last_landed_s) for leg in self._landing.values())
        return next((leg for leg, at_s in begun if at_s is not None and not (leg.is_landed and now_s - at_s < TOLD_WITHIN_S)), None)

    def _unsent_bytes(self, leg: Leg) -> int:
        """KV that would have been sent, had decode not known the beginning of the leg's prompt. 0 where nothing is sent anyway."""
        return leg.num_cached_blocks * self._terms.block_bytes * self._terms.num_layers if self._arrivals.is_polled else 0

    def expect(self, leg: Leg, now_s: float) -> None:
        """A gateway wants this leg; its announcement may be here already."""
        early = self._early.pop(leg.key, None)
        if early is not None and early.producer == leg.prefill.boot_id:
            self._enqueue(leg, early.message, early.seen_s)
            self.pump(now_s)

    def announced(self, producer: str, message: WaveAnnounced, leg: Leg | None, now_s: float) -> None:
        """A producer is about to prefill. Raises WireError where the announcement fits no leg."""
        if message.group_bounds[:1] != (0,) or message.group_bounds[-1] != self._terms.num_layers:
            raise WireError(
                f"group_bounds {message.group_bounds} do not cover the model's {self._terms.num_layers} layers", code="bad_field"
            )
        if leg is None:
            key = (message.request_id, message.attempt)
            self._early[key] = EarlyAnnouncement(producer=producer, message=message, seen_s=now_s, deadline_s=now_s + message.remaining_s)
            return
        if leg.state is not LegState.EXPECTED:
            raise WireError(f"request {leg.request_id} attempt {leg.attempt} was announced before", code="announced_twice")
        if producer != leg.prefill.boot_id:
            raise WireError(f"request {leg.request_id} attempt {leg.attempt} belongs to another prefill replica", code="wrong_peer")
        self._enqueue(leg, message, now_s)
        self.pump(now_s)

    def _enqueue(self, leg: Leg, message: WaveAnnounced, seen_s: float) -> None:
        if message.num_tokens != leg.num_tokens:
            self._ends.fail(
                leg,
                TransferError(
                    f"prefill announced {message.num_tokens} tokens, the gateway asked for {leg.num_tokens}",
                    code="kv_mismatch",
                    retryable=False,
                ),
            )
            return
        leg.announced = message
        leg.state = LegState.WAITING
        leg.times.announced_s = seen_s
        self._for_blocks.append(leg)

    def pump(self, now_s: float) -> None:
        """Grant what can be granted. Called whenever a leg is announced and whenever blocks or slots come back."""
        if self._for_blocks:
            head = list(itertools.islice(self._for_blocks, MAX_GRANTS_A_TURN))
            plan = plan_grants(self._pool.limits, self._pool.view(), [leg.waiting() for leg in head])
            grants = {grant.leg_id: grant for grant in plan.grants}
            for leg in head:
                if leg.leg_id in plan.never_fit:
                    self._ends.fail(leg, self._never_fits(leg))
                elif leg.leg_id in grants:
                    self._for_blocks.remove(leg)
                    is_scored = leg.sampling.prompt_logprobs is not None
                    table = self._pool.take_prompt(leg.token_ids, leg.cache_salt, is_scored=is_scored)
                    leg.blocks, leg.cached_tokens = list(table.blocks), table.cached_tokens
                    leg.num_cached_blocks = table.cached_tokens // self._pool.limits.block_tokens
                    leg.prefix_hashes = table.hashes
                    leg.num_landing_blocks = len(leg.blocks)
                    leg.promise_blocks = grants[leg.leg_id].promised_blocks
                    leg.order = next(self._orders)
                    leg.state = LegState.GRANTED
                    leg.times.granted_s = now_s
                    self._pool.holders[leg.leg_id] = leg
                    self._for_slots.setdefault(leg.prefill.boot_id, deque()).append(leg)
        for producer in list(self._for_slots):
            self._offer(producer, self._for_slots[producer], now_s)

    def _never_fits(self, leg: Leg) -> CapacityError:
        limits = self._pool.limits
        error = CapacityError(
            f"{leg.num_tokens} tokens of KV and {leg.max_new_tokens} to come for {len(leg.choice_numbers)} choices need "
            f"{leg.num_promised(limits)} blocks of {limits.block_tokens} tokens; this replica has {limits.num_blocks} "
            "(on a CPU decode.num_blocks, on a GPU what gpu_memory_fraction leaves beside the weights; "
            "--max-model-tokens refuses such requests at the door)",
            phase="decode.admit",
        )
        error.retryable = False
        return error

    def _offer(self, producer: str, queue: deque[Leg], now_s: float) -> None:
        """Offer handles to one producer, in order, while KV of it can arrive."""
        while queue:
            leg = queue[0]
            handle = self._arrivals.offer(leg)
            if handle is None:
                return
            queue.popleft()
            leg.handle = handle
            leg.times.offered_s = now_s
            self._landing[handle.handle_id] = leg
            self._ends.post(
                producer,
                HandleOffered(
                    request_id=leg.request_id,
                    attempt=leg.attempt,
                    traceparent=leg.traceparent,
                    remaining_s=leg.deadline_s - now_s,
                    handle=handle,
                ),
            )
        if not queue:
            self._for_slots.pop(producer, None)

    def landed(self, message: LandedMessage, now_s: float) -> None:
        """The step thread verified and scattered a message, or found it wrong."""
        leg = self._landing.get(message.handle_id)
        if leg is None or leg.handle is None:
            return  # aborted meanwhile; the agent has quarantined or freed its slots
        producer = leg.prefill.boot_id
        if message.error is not None:
            self._repair(leg, message, message.error, now_s)
            return
        leg.silent_s = 0.0
        leg.landed.add(message.message_idx)
        leg.landed_bytes += message.num_bytes
        leg.times.last_landed_s = message.landed_s
        if leg.times.first_landed_s is None:
            leg.times.first_landed_s, leg.first_landed_bytes = message.landed_s, message.num_bytes
        self._ends.post(
            producer,
            GroupLanded(
                request_id=leg.request_id,
                attempt=leg.attempt,
                traceparent=leg.traceparent,
                remaining_s=leg.deadline_s - now_s,
                handle_id=message.handle_id,
                group=message.group,
                message_idx=message.message_idx,
            ),
        )
        if leg.is_landed and leg.done is None:
            self._pool.arrived(leg)  # now, and not between PrefillDone and the leg's first step
        self._finish_if_complete(leg)

    def _repair(self, leg: Leg, message: LandedMessage, error: TransferError, now_s: float) -> None:
        """Ask once for a message that landed wrong; a second time it is a typed, retryable failure."""
        leg.num_refused += 1
        if message.message_idx in leg.pulled:
            self._ends.fail(leg, TransferError(f"message {message.message_idx} landed wrong twice: {error.detail}", code="kv_corrupt"))
            return
        self._pull(leg, message.group, message.message_idx, now_s)

    def _pull(self, leg: Leg, group: int, message_idx: int, now_s: float) -> None:
        assert leg.handle is not None
        leg.pulled.add(message_idx)
        self._arrivals.pulled(leg.handle.handle_id, message_idx)
        self._ends.post(
            leg.prefill.boot_id,
            PullKv(
                request_id=leg.request_id,
                attempt=leg.attempt,
                traceparent=leg.traceparent,
                remaining_s=leg.deadline_s - now_s,
                handle_id=leg.handle.handle_id,
                group=group,
                message_idx=message_idx,
            ),
        )

    def prefill_done(self, producer: str, message: PrefillDone, leg: Leg | None, now_s: float) -> None:
        """The prompt is computed. Raises WireError where it fits no open handle: `stale` where the leg is over, which P is being told."""
        told = f"PrefillDone for request {message.request_id} attempt {message.attempt}"
        if leg is None:
            raise WireError(f"{told}, which is over or was never here", code="stale")
        handle = leg.handle
        if handle is None or leg.state is not LegState.GRANTED or leg.done is not None:
            raise WireError(f"{told}, which has no open handle", code="unexpected_message")
        if message.handle_id != handle.handle_id or producer != handle.producer_boot_id:
            raise WireError(f"{told} names handle {message.handle_id}, which is not the request's", code="unexpected_message")
        leg.done, leg.silent_s = message, 0.0
        leg.times.prefill_done_s = now_s
        counts = (message.num_messages, len(message.first_token_ids))
        if counts != (len(leg.spans), len(leg.choice_numbers)):
            self._ends.fail(
                leg,
                TransferError(
                    f"prefill sends {counts[0]} messages and {counts[1]} first tokens, "
                    f"expected {len(leg.spans)} and {len(leg.choice_numbers)}",
                    code="kv_mismatch",
                ),
            )
            return
        try:
            leg.prompt_counts_LE = prompt_counts(message, self._terms.num_layers, self._terms.num_experts)
        except TransferError as error:
            self._ends.fail(leg, error)
            return
        self._finish_if_complete(leg)

    def _finish_if_complete(self, leg: Leg) -> None:
        if leg.done is not None and leg.is_landed and leg.handle is not None:
            del self._landing[leg.handle.handle_id]
            self._arrivals.arrived(leg.handle.handle_id)
            self._untold.append(leg)
            self._ends.ready(leg)

    def tell_arrived(self) -> None:
        """Spans and counts take time that the leg's first step need not wait for: the step loop says when."""
        told, self._untold = self._untold, []
        for leg in told:
            self._ends.figures.arrived(leg, self._unsent_bytes(leg))

    def withdraw(self, leg: Leg) -> None:
        """Take a leg that ends early out of every queue; an open handle is aborted. Its blocks are the caller's to free."""
        if leg.state is LegState.WAITING:
            self._for_blocks.remove(leg)
        elif leg.state is LegState.GRANTED and leg.handle is None:
            queue = self._for_slots.get(leg.prefill.boot_id)
            if queue is not None and leg in queue:
                queue.remove(leg)
        if leg.handle is not None and self._landing.pop(leg.handle.handle_id, None) is not None:
            self._arrivals.withdraw(leg.handle.handle_id)
            self._ends.figures.given_up(leg, leg.failure)

    def retract(self, producer: str, key: LegKey) -> None:
        """A producer took back an announcement that no gateway has asked for yet."""
        early = self._early.get(key)
        if early is not None and early.producer == producer:
            del self._early[key]

    def producer_gone(self, producer: str) -> None:
        """Forget a dead producer's early announcements; its legs are failed by the service."""
        self._for_slots.pop(producer, None)
        self._early = {key: early for key, early in self._early.items() if early.producer != producer}

    def tick(self, now_s: float, looked_s: float) -> None:
        """Bound every wait: a producer that neither sends nor finishes fails its legs.

        looked_s: how much of the time since the last tick this process was looking; its own stall is not the producer's silence.
        """
        for key in [key for key, early in self._early.items() if now_s > early.deadline_s]:
            del self._early[key]
        if not self._arrivals.is_polled:
            return  # prefill is this process: its watchdog and each request's deadline bound the wait
        for leg in list(self._landing.values()):
            self._watch(leg, now_s, looked_s)

    def _watch(self, leg: Leg, now_s: float, looked_s: float) -> None:
        """Between P's first message and its last a silence is bounded; once P has computed everything, what still does not come is pulled
        once, then given up. Before the first the prompt waits in P's queue, where being busy is no fault, or crosses the model whole."""
        leg.silent_s += looked_s
        silent_s, is_computed = leg.silent_s, leg.done is not None
        if not is_computed and not leg.landed:
            return  # its deadline bounds it; P's watchdog a P that hangs, its socket one that is gone
        limit_s = self._terms.write_timeout_s if is_computed else self._terms.stall_timeout_s
        if silent_s > limit_s:
            detail = f"{len(leg.landed)} of {len(leg.spans)} messages landed, none for {limit_s:g} s"
            self._ends.fail(leg, TransferError(detail, code="transfer_timeout"))
        elif is_computed and silent_s > PULL_AFTER * limit_s:
            assert leg.handle is not None
            window = len(leg.handle.slots)
            for message_idx in self._arrivals.missing(leg.handle.handle_id):
                is_its_turn = message_idx < window or message_idx - window in leg.landed
                if is_its_turn and message_idx not in leg.pulled:
                    self._pull(leg, leg.spans[message_idx].group, message_idx, now_s)


def producer_lost(leg: Leg) -> PeerError:
    """Why a leg ends whose producer died before its KV was here."""
    return PeerError(f"prefill replica {leg.prefill.replica_id} is gone, {len(leg.landed)} of its messages landed", phase="kv.handoff")
