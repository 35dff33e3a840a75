"""The legs of one gateway: those that run, by their wire id, and those that wait for room, in their line. Knows no message of a replica.

A new request is admitted, put in line or refused (admission.py); whoever leads the line is placed (policy.py) as soon as a report or an
ending says that there may be room. Everything runs on the gateway's loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from duomo.config import DuomoConfig
from duomo.errors import CapacityError, PeerError
from duomo.telemetry.metrics import Metrics
from services.router.admission import Admit, Refuse, decide, never_fits
from services.router.breakers import BreakerLimits, Breakers
from services.router.demand import DesiredReplicas, desired_replicas
from services.router.flight import Flight, Leg
from services.router.legs import begin_leg, decode_views, end_leg, need_of, post_start, prefill_views
from services.router.policy import DecodeView, PrefillView, Route, pick_route
from services.router.pools import Pools
from services.router.waiting import PendingLeg, WaitingLine


class Placing:
    """Begins legs and ends them: whatever enters the books of two replicas leaves them by end_leg()."""

    def __init__(self, config: DuomoConfig, pools: Pools, metrics: Metrics) -> None:
        self._config = config
        self._pools = pools
        self._metrics = metrics
        self._legs: dict[str, Leg] = {}
        self._line = WaitingLine()
        self._is_pump_due = False
        self._shut_since_s: float | None = None  # since when a pool has had no open replica while somebody waits
        limits = config.gateway
        self.breakers = Breakers(
            BreakerLimits(num_failures=limits.breaker_failures, open_s=limits.breaker_open_s, max_open_s=limits.max_breaker_open_s)
        )

    @property
    def num_waiting(self) -> int:
        return len(self._line)

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
        needs = [need_of(pending, self._config) for pending in self._line]
        return desired_replicas(*self._views(), needs, self._config.prefill.max_wave_tokens)

    def admit(self, pending: PendingLeg) -> Admit | Refuse | None:
        """What is to be done with a new request: begin() it, refuse it, or (None) let it wait()."""
        decision = decide(
            need_of(pending, self._config),
            *self._views(),
            barred=self.breakers.open_keys(time.monotonic()),
            num_waiting=len(self._line),
            max_waiting=self._config.gateway.max_queued_requests,
        )
        return decision if isinstance(decision, Admit | Refuse) else None

    def begin(self, pending: PendingLeg, route: Route) -> None:
        leg = begin_leg(pending, route, self._pools.links)
        for key in ((route.prefill,), (route.decode,), (route.prefill, route.decode)):
            self.breakers.tried(key, time.monotonic())
        self._legs[leg.wire_id] = leg
        milestones = pending.flight.milestones
        milestones.reason = route.reason
        self._metrics.route_reasons.labels(route.reason).inc()
        try:
            sent_s = post_start(leg, is_resume=pending.is_resume)
            if not milestones.first_received_s:
                milestones.sent_s = sent_s
        except PeerError:
            # The socket just ended: its reading task is about to say so. This leg never began; it looks for another pair.
            self.end_leg(leg, "peer_gone")
            self._line.push_front(pending)

    def wait(self, pending: PendingLeg) -> None:
        """Behind all that wait already."""
        self._line.append(pending)
        self._metrics.queued_requests.set(len(self._line))

    def begin_again(self, pending: PendingLeg) -> None:
        """A leg that was running goes before those that never did."""
        self._line.push_front(pending)
        self.pump_soon()

    def end_leg(self, leg: Leg, cancel_reason: str | None) -> None:
        """Out of all books; where a reason is given, cancelled on every side that has not said it is over."""
        if self._legs.get(leg.wire_id) is leg:
            del self._legs[leg.wire_id]
        end_leg(leg, cancel_reason)
        self.pump_soon()

    def forget(self, flight: Flight) -> None:
        """The flight is over: none of its legs waits any more."""
        self._line.forget(flight)
        self._metrics.queued_requests.set(len(self._line))

    def pump_soon(self) -> None:
        """There may be room: look at the line before the loop sleeps."""
        if not self._is_pump_due and len(self._line):
            self._is_pump_due = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        """Place the head of the line, and the next, while there is room."""
        self._is_pump_due = False
        while (head := self._line.head()) is not None:
            prefills, decodes = self._views()
            if self._is_shut(prefills, decodes):
                if self._waits_for_a_replica():
                    return
                head.flight.fail(head.without_replica("decode" if _has_open(prefills) else "prefill"))
                continue
            need = need_of(head, self._config)
            route = pick_route(prefills, decodes, need, head.avoid, self.breakers.open_keys(time.monotonic()))
            if route is None:
                limit = never_fits(need, prefills, decodes) if prefills else None
                if limit is None:
                    return
                head.flight.fail(CapacityError(limit, code="never_fits"))
                continue
            self._line.pop_head()
            self.begin(head, route)
        self._metrics.queued_requests.set(len(self._line))

    def _is_shut(self, prefills: Sequence[PrefillView], decodes: Sequence[DecodeView]) -> bool:
        if _has_open(prefills) and _has_open(decodes):
            self._shut_since_s = None
            return False
        self._shut_since_s = self._shut_since_s or time.monotonic()
        return True

    def _waits_for_a_replica(self) -> bool:
        """Whether those in line are kept for one more start of a replica; then it is looked again when that time is over."""
        assert self._shut_since_s is not None
        left_s = self._shut_since_s + self._config.gateway.failover_wait_s - time.monotonic()
        if left_s > 0:
            asyncio.get_running_loop().call_later(left_s, self.pump_soon)
        return left_s > 0

    def _views(self) -> tuple[list[PrefillView], list[DecodeView]]:
        return prefill_views(self._pools.prefills(), self._config), decode_views(self._pools.decodes(), self._config)


def _has_open(views: Sequence[PrefillView] | Sequence[DecodeView]) -> bool:
    return any(view.is_open for view in views)
