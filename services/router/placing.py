"""The legs of one gateway: those that run, by their wire id, and those that wait for room, in their line. Knows no message of a replica.

A new request is admitted, put in line or refused, and whoever leads the line is placed (admission.py, policy.py), as soon as a report, a
first token or an ending says that there may be room. Everything runs on the gateway's loop.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from typing import Final

from duomo.config import DuomoConfig
from duomo.errors import CapacityError, PeerError, WireError
from duomo.telemetry.metrics import Metrics
from services.router.admission import Admit, LineView, PoolsView, Refuse, Terms, decide, first_token_s, place, retry_s, told_full
from services.router.answer_lengths import AnswerLengths
from services.router.breakers import BreakerLimits, Breakers
from services.router.demand import DesiredReplicas, desired_replicas
from services.router.flight import Flight, Leg
from services.router.legs import begin_leg, book_limits, decode_views, end_leg, mark_first_token, need_of, post_start, prefill_views
from services.router.pending import PendingLeg
from services.router.policy import DecodeView, Need, PrefillView, Route, decode_blocks, known_tokens
from services.router.pools import Pools
from services.router.waiting import WaitingLine, Weight

_DRAW_BITS: Final = 32
_STRANDED_PAUSE_S: Final = 0.25


class Placing:
    """Begins legs and ends them: whatever enters the books of two replicas leaves them by end_leg()."""

    def __init__(self, config: DuomoConfig, pools: Pools, metrics: Metrics) -> None:
        self._config = config
        self._pools = pools
        self._metrics = metrics
        self._legs: dict[str, Leg] = {}
        self._line: WaitingLine[PendingLeg] = WaitingLine()
        self._stranded: set[PendingLeg] = set()  # of those that wait, who could be served by none that is there
        self._limits = book_limits(config)
        self._answers = AnswerLengths()
        self._random = random.Random()
        self._is_pump_due = False
        self._shut_since_s: float | None = None  # since when a pool has had no open replica
        self._shut_timer: asyncio.TimerHandle | None = None
        limits = config.gateway
        self.breakers = Breakers(
            BreakerLimits(num_failures=limits.breaker_failures, open_s=limits.breaker_open_s, max_open_s=limits.max_breaker_open_s)
        )

    @property
    def num_waiting(self) -> int:
        return len(self._line) + len(self._stranded)

    @property
    def num_live_legs(self) -> int:
        return len(self._legs)

    def running(self, wire_id: str) -> Leg | None:
        """The one leg of this id, whichever attempt it is."""
        return self._legs.get(wire_id)

    def leg_of(self, wire_id: str, attempt: int) -> Leg | None:
        """That very attempt, if it still runs."""
        leg = self._legs.get(wire_id)
        return leg if leg is not None and leg.attempt == attempt else None

    def desired_replicas(self) -> DesiredReplicas:
        pools = self._view()
        needs = [pending.need or self._need(pending, pools) for pending in (*self._line, *self._stranded)]
        return desired_replicas(pools.prefills, pools.decodes, needs, self._config.prefill.max_wave_tokens)

    def admit(self, pending: PendingLeg) -> Admit | Refuse | None:
        """What is to be done with a new request: begin() it, refuse it, or (None) let it wait()."""
        pools = self._view()
        need = pending.need = self._need(pending, pools)
        decision = decide(need, pools, self._line_view(pending), self._terms(pending), self._draw())
        return decision if isinstance(decision, Admit | Refuse) else None

    def begin(self, pending: PendingLeg, route: Route) -> None:
        leg = begin_leg(pending, route, self._pools.links, time.monotonic())
        for key in ((route.prefill,), (route.decode,), (route.prefill, route.decode)):
            self.breakers.tried(key, time.monotonic())
        self._legs[leg.wire_id] = leg
        milestones = pending.flight.milestones
        milestones.reason, milestones.decode_reason = route.reason, route.decode_reason
        milestones.known_tokens = route.known_tokens
        self._metrics.route_reasons.labels("prefill", route.reason).inc()
        self._metrics.route_reasons.labels("decode", route.decode_reason).inc()
        try:
            sent_s = post_start(leg, is_resume=pending.is_resume)
            if not milestones.first_received_s:
                milestones.sent_s = sent_s
        except WireError as error:
            self.end_leg(leg, error.code)
            pending.flight.fail(error)
        except PeerError:
            # The socket just ended: its reading task is about to say so. This leg never began; it looks for another pair.
            self.end_leg(leg, "peer_gone")
            if pending.was_running:
                self.begin_again(pending)
            else:
                self.wait(pending)

    def first_token(self, leg: Leg) -> None:
        """P has answered: there is more room there."""
        mark_first_token(leg)
        self.pump_soon()

    def wait(self, pending: PendingLeg) -> None:
        """For room, gateway.queue_ttl_s and gateway.max_ttft_s at most. Where the line is full the last of it has to go."""
        if len(self._line) >= self._config.gateway.max_queued_requests and (last := self._line.last()) is not None:
            detail = told_full(len(self._line), self._config.gateway.max_queued_requests) + " One of a higher priority came."
            last.flight.fail(CapacityError(detail, code="queue_full", retry_after_s=self._retry_s(last)))
        pools = self._view()
        self._join(pending, pools)
        left_s = min(self._config.gateway.queue_ttl_s, self._terms(pending).left_s)
        pending.timer = asyncio.get_running_loop().call_later(max(left_s, 0.0), self._waited_enough, pending)
        self.pump_soon()

    def begin_again(self, pending: PendingLeg, after_s: float = 0.0) -> None:
        """A leg that was running goes before those that never did, and waits until its request's deadline. It joins the line after_s."""
        if after_s:
            asyncio.get_running_loop().call_later(after_s, self.begin_again, pending)
            return
        if pending.flight.is_over:
            return
        pending.was_running = True
        self._join(pending, self._view())
        self.pump_soon()

    def end_leg(self, leg: Leg, cancel_reason: str | None) -> None:
        """Out of all books; where a reason is given, cancelled on every side that has not said it is over."""
        if self._legs.get(leg.wire_id) is leg:
            del self._legs[leg.wire_id]
        end_leg(leg, cancel_reason)
        if leg.has_landed and cancel_reason in (None, "stop"):
            self.breakers.succeeded((leg.decode.key,))
        self.pump_soon()

    def seems_roomy(self, leg: Leg) -> bool:
        """Whether decode has room for this leg, which is over, as far as its last report tells: blocks, places and landing slots. One that
        no longer reports had it when the leg was sent there.
        """
        report, views = leg.decode.report, decode_views([leg.decode], self._limits)
        if report is None or not views:
            return False
        (view,) = views
        has_blocks = view.free_blocks >= leg.on_decode.num_blocks + view.watermark_blocks
        has_places = view.num_choices + len(leg.choices) <= view.max_choices
        has_slots = report.num_free_slots > 0 or not report.num_slots  # none are needed where KV stays where it is
        return leg.decode.is_silent(time.monotonic()) or (has_blocks and has_places and has_slots)

    def forget(self, flight: Flight) -> None:
        """The flight is over: none of its legs waits any more."""
        for pending in self._line.forget(flight):
            _stop_timer(pending)
        self._stranded = {pending for pending in self._stranded if pending.flight is not flight}
        self._metrics.queued_requests.set(self.num_waiting)
        for choice in flight.choices:
            if choice.has_ended and choice.emitted:  # a prompt that is only scored is no short answer
                self._answers.ended(len(choice.emitted))

    def pools_changed(self) -> None:
        """A replica has reported, or is gone: since when a pool stands empty is known whether anybody waits or not."""
        pools = (self._pools.prefills(), self._pools.decodes())
        self._note_shut(not all(any(link.is_usable for link in links) for links in pools))
        self.pump_soon()

    def pump_soon(self) -> None:
        """There may be room: look at the line before the loop sleeps."""
        if not self._is_pump_due and len(self._line):
            self._is_pump_due = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._is_pump_due = False
        self._place_in_order()
        self._metrics.queued_requests.set(self.num_waiting)

    def _place_in_order(self) -> None:
        """The head of the line, and the next, while there is room."""
        while (head := self._line.head()) is not None:
            pools = self._view()
            if self._is_shut(pools.prefills, pools.decodes):
                if self._waits_for_a_replica():
                    return
                head.flight.fail(head.without_replica("decode" if _has_open(pools.prefills) else "prefill"))
                continue
            terms = None if head.was_running else self._terms(head)
            now_s = time.monotonic()
            head.leads_since_s = now_s if head.leads_since_s is None else head.leads_since_s
            need = head.need or self._need(head, pools)
            placed = place(need, pools, head.avoid, terms, self._draw(), now_s - head.leads_since_s)
            if isinstance(placed, Refuse):
                self._refused(head, placed)
                continue
            head.stranded_since_s = None
            if placed is None:
                return
            self._line.pop_head()
            _stop_timer(head)
            self.begin(head, placed)

    def _refused(self, head: PendingLeg, refusal: Refuse) -> None:
        """One that was running, and that none of those that are left could serve, waits for one that can, as for a pool's last: beside the
        line, where nobody waits behind it."""
        now_s = time.monotonic()
        if not head.was_running:
            head.flight.fail(CapacityError(refusal.detail, code=refusal.code, retry_after_s=refusal.retry_after_s))
            return
        if head.stranded_since_s is None:
            head.stranded_since_s = now_s
        if now_s - head.stranded_since_s > self._config.gateway.failover_wait_s:
            head.flight.fail(head.without_room(refusal.detail))
            return
        self._line.pop_head()
        self._stranded.add(head)
        asyncio.get_running_loop().call_later(_STRANDED_PAUSE_S, self._look_again, head)

    def _look_again(self, stranded: PendingLeg) -> None:
        if stranded in self._stranded:  # else its flight is over
            self._stranded.remove(stranded)
            self.begin_again(stranded)

    def _waited_enough(self, pending: PendingLeg) -> None:
        """It is told to come back, and when."""
        waited_s = time.monotonic() - pending.flight.request.received_s
        pools = self._view()
        if not (_has_open(pools.prefills) and _has_open(pools.decodes)):
            pending.flight.fail(pending.without_replica("decode" if _has_open(pools.prefills) else "prefill"))
            return
        detail = f"There was no room for {waited_s:.1f} s."
        pending.flight.fail(CapacityError(detail, code="queue_timeout", retry_after_s=self._retry_s(pending)))

    def _retry_s(self, pending: PendingLeg) -> float:
        pools = self._view()
        return retry_s(first_token_s(pending.need or self._need(pending, pools), pools, self._line_view(pending)))

    def _join(self, pending: PendingLeg, pools: PoolsView) -> None:
        need = pending.need = self._need(pending, pools)
        pending.leads_since_s = None
        known = max((known_tokens(view, need) for view in pools.prefills), default=0)
        blocks = min((decode_blocks(need, view.block_tokens) for view in pools.decodes), default=0)
        pending.weight = Weight(work_tokens=need.num_tokens - known, num_blocks=blocks, num_choices=need.num_choices)
        self._line.join(pending)
        self._metrics.queued_requests.set(self.num_waiting)

    def _need(self, pending: PendingLeg, pools: PoolsView) -> Need:
        return need_of(pending, self._config, next((view.block_tokens for view in pools.prefills), 0))

    def _terms(self, pending: PendingLeg) -> Terms:
        """Until when its first token is of use."""
        request, max_ttft_s, now_s = pending.flight.request, self._config.gateway.max_ttft_s, time.monotonic()
        if max_ttft_s is not None and request.received_s + max_ttft_s < request.deadline_s:
            return Terms(left_s=request.received_s + max_ttft_s - now_s, limit="the limit of this server (gateway.max_ttft_s)")
        return Terms(left_s=request.deadline_s - now_s)

    def _line_view(self, pending: PendingLeg) -> LineView:
        line, max_waiting = self._line, self._config.gateway.max_queued_requests
        last = line.last() if line and len(line) >= max_waiting else None
        before = line.ahead_of(pending.rank)  # who waits behind it is no reason to turn it away
        return LineView(
            num_waiting=len(line),
            max_waiting=max_waiting,
            work_tokens=before.work_tokens,
            num_blocks=before.num_blocks,
            num_choices=before.num_choices,
            may_displace=last is not None and not last.was_running and pending.rank < last.rank,
        )

    def _draw(self) -> int:
        return self._random.getrandbits(_DRAW_BITS)

    def _is_shut(self, prefills: Sequence[PrefillView], decodes: Sequence[DecodeView]) -> bool:
        is_shut = not (_has_open(prefills) and _has_open(decodes))
        self._note_shut(is_shut)
        return is_shut

    def _note_shut(self, is_shut: bool) -> None:
        if is_shut:
            self._shut_since_s = self._shut_since_s or time.monotonic()
            return
        self._shut_since_s = None
        if self._shut_timer is not None:
            self._shut_timer.cancel()
            self._shut_timer = None

    def _waits_for_a_replica(self) -> bool:
        """Whether those in line are kept for one more start of a replica; then it is looked again when that time is over."""
        assert self._shut_since_s is not None
        left_s = self._shut_since_s + self._config.gateway.failover_wait_s - time.monotonic()
        if left_s > 0 and self._shut_timer is None:
            self._shut_timer = asyncio.get_running_loop().call_later(left_s, self._waited_for_a_replica)
        return left_s > 0

    def _waited_for_a_replica(self) -> None:
        self._shut_timer = None
        self.pump_soon()

    def _view(self) -> PoolsView:
        """Who has not reported for a while is barred with those whose breakers are open: it may be standing still."""
        now_s = time.monotonic()
        silent = frozenset((link.key,) for link in self._pools.links.values() if link.is_silent(now_s))
        return PoolsView(
            prefills=prefill_views(self._pools.prefills(), self._limits, now_s),
            decodes=decode_views(self._pools.decodes(), self._limits),
            barred=self.breakers.open_keys(now_s) | silent,
            answer_tokens=self._answers.mean_tokens,
        )


def _stop_timer(pending: PendingLeg) -> None:
    if pending.timer is not None:
        pending.timer.cancel()
        pending.timer = None


def _has_open(views: Sequence[PrefillView] | Sequence[DecodeView]) -> bool:
    return any(view.is_open for view in views)
