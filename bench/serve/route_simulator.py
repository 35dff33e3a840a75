"""PURE: the simulation of a whole system for routing and admission, in virtual time: gateways as they are, machines as formulas.

    found = simulate(trace, System(num_prefills=4, way="duomo"))
    found.hit_rate, found.answers, found.refusals, found.good(limit_s)

Reports reach gateways as in life: every REPORT_S, each replica at its own moment, WIRE_S late. Requests and first tokens take WIRE_S too.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from bench.serve.route_gateway import GatewayTerms, Outcome, Placed, Refused, SimGateway, Way
from bench.serve.route_machines import DecodeMachine, Machine, PrefillMachine, SimLeg
from bench.serve.route_traces import SimRequest
from services.router.books import WAVES_AHEAD, BookLimits

REPORT_S = 0.1
WIRE_S = 0.0005


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """What is simulated. seed: of draws, and of when reports come."""

    num_prefills: int = 1
    num_decodes: int = 1
    num_gateways: int = 1
    way: Way = "duomo"
    machine: Machine = Machine()
    max_waiting: int = 1024
    queue_ttl_s: float = 60.0
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A request that was served. cached_tokens: of prefill; decode_cached_tokens: of decode, which were not sent."""

    request: SimRequest
    first_s: float
    ended_s: float
    prefill: str
    cached_tokens: int
    decode_cached_tokens: int

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.request.at_s

    def is_good(self, limit_s: float) -> bool:
        """Whether its first token came in time, and all of it before its deadline."""
        return self.ttft_s <= limit_s and self.ended_s - self.request.at_s <= self.request.deadline_s


@dataclass(slots=True, kw_only=True)
class Found:
    """What came of a trace. longest_wait_s: in a line. reasons: of prefill replicas chosen. busy_s: of prefill replicas, summed."""

    answers: list[Answer] = field(default_factory=list)
    refusals: list[Refused] = field(default_factory=list)
    refused_s: dict[str, float] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)
    busy_s: float = 0.0
    ended_s: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Cached over all prompt tokens of what was served."""
        return sum(one.cached_tokens for one in self.answers) / max(sum(len(one.request.prompt_ids) for one in self.answers), 1)

    def good(self, limit_s: float) -> list[Answer]:
        return [one for one in self.answers if one.is_good(limit_s)]


def simulate(trace: Sequence[SimRequest], system: System) -> Found:
    """Until every request was answered or refused."""
    simulation = _Simulation(trace, system)
    simulation.run()
    return simulation.found


@dataclass(slots=True, kw_only=True)
class _Live:
    """A placed request: its leg, and its gateway's books of it."""

    gateway: SimGateway
    placed: Placed
    leg: SimLeg
    first_s: float = 0.0


class _Simulation:
    def __init__(self, trace: Sequence[SimRequest], system: System) -> None:
        machine = system.machine
        self.found = Found()
        self._num_requests = len(trace)
        self._prefills = {f"p{idx}": PrefillMachine(f"p{idx}", machine) for idx in range(system.num_prefills)}
        self._decodes = {f"d{idx}": DecodeMachine(f"d{idx}", machine) for idx in range(system.num_decodes)}
        limits = BookLimits(
            wave_tokens=machine.max_wave_tokens,
            max_queued_tokens=WAVES_AHEAD * machine.max_wave_tokens,
            watermark_blocks=machine.watermark_blocks,
            max_choices=machine.max_batch,
        )
        terms = GatewayTerms(limits=limits, way=system.way, max_waiting=system.max_waiting, queue_ttl_s=system.queue_ttl_s)
        seeds = range(system.seed, system.seed + system.num_gateways)
        self._gateways = [SimGateway(terms, list(self._prefills), list(self._decodes), seed) for seed in seeds]
        self._live: dict[SimLeg, _Live] = {}
        self._machine = machine
        self._now_s = 0.0
        self._places = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        draw = random.Random(system.seed)
        replicas: list[PrefillMachine | DecodeMachine] = [*self._prefills.values(), *self._decodes.values()]
        for replica in replicas:
            self._report(replica)  # all are known before the first request
            self._at(draw.random() * REPORT_S, partial(self._reports, replica))
        for request in trace:
            self._at(WIRE_S + request.at_s, partial(self._arrives, request))

    def run(self) -> None:
        while len(self.found.answers) + len(self.found.refusals) < self._num_requests:
            self._now_s, _, happens = heapq.heappop(self._events)
            happens()
        self.found.busy_s = sum(prefill.busy_s for prefill in self._prefills.values())
        self.found.ended_s = self._now_s

    def _at(self, when_s: float, happens: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when_s, next(self._places), happens))

    def _later(self, delay_s: float, happens: Callable[[], None]) -> None:
        self._at(self._now_s + delay_s, happens)

    # gateways

    def _arrives(self, request: SimRequest) -> None:
        gateway = self._gateways[request.gateway]
        self._apply(gateway, gateway.submit(request, self._now_s))

    def _pump(self, gateway: SimGateway) -> None:
        if len(gateway.line):
            self._apply(gateway, gateway.pump(self._now_s))

    def _apply(self, gateway: SimGateway, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            if isinstance(outcome, Refused):
                self.found.refusals.append(outcome)
                self.found.refused_s[outcome.request.name] = self._now_s
                continue
            self.found.reasons[outcome.route.reason] += 1
            leg = SimLeg(request=outcome.request, need=outcome.need, sent_s=self._now_s)
            self._live[leg] = _Live(gateway=gateway, placed=outcome, leg=leg)
            self._later(WIRE_S, partial(self._starts, leg))

    def _reports(self, replica: PrefillMachine | DecodeMachine) -> None:
        self._report(replica)
        self._later(REPORT_S, partial(self._reports, replica))

    def _report(self, replica: PrefillMachine | DecodeMachine) -> None:
        report = replica.report(self._now_s)

        def heard() -> None:
            for gateway in self._gateways:
                gateway.book(replica.key).reported(report, self._now_s)
                self._pump(gateway)

        if self._now_s == 0.0:
            heard()
        else:
            self._later(WIRE_S, heard)

    # replicas

    def _starts(self, leg: SimLeg) -> None:
        route = self._live[leg].placed.route
        self._prefills[route.prefill].queue.append(leg)
        self._decodes[route.decode].waiting.append(leg)
        self._grant(self._decodes[route.decode])

    def _grant(self, decode: DecodeMachine) -> None:
        for leg in decode.grant():
            self._begin_wave(self._prefills[self._live[leg].placed.route.prefill])

    def _begin_wave(self, prefill: PrefillMachine) -> None:
        ends_s = prefill.start_wave(self._now_s)
        if ends_s is not None:
            self._at(ends_s, partial(self._wave_ends, prefill))

    def _wave_ends(self, prefill: PrefillMachine) -> None:
        for leg in prefill.end_wave():
            self._later(WIRE_S, partial(self._first_token, leg))
            self._later(self._machine.handoff_s, partial(self._joins, leg))
        self._begin_wave(prefill)

    def _first_token(self, leg: SimLeg) -> None:
        live = self._live[leg]
        live.first_s = self._now_s
        live.gateway.book(live.placed.route.prefill).answered(live.placed.on_prefill)
        live.gateway.book(live.placed.route.decode).answered(live.placed.on_decode)
        self._pump(live.gateway)

    def _joins(self, leg: SimLeg) -> None:
        decode = self._decodes[self._live[leg].placed.route.decode]
        leg.num_emitted = 1
        decode.join(leg)
        self._begin_step(decode)

    def _begin_step(self, decode: DecodeMachine) -> None:
        if decode.running and not decode.is_stepping:
            decode.is_stepping = True
            self._later(decode.step_takes_s(), partial(self._step_ends, decode))

    def _step_ends(self, decode: DecodeMachine) -> None:
        decode.is_stepping = False
        for leg in decode.step():
            self._later(WIRE_S, partial(self._ended, leg))
        self._grant(decode)
        self._begin_step(decode)

    def _ended(self, leg: SimLeg) -> None:
        live = self._live.pop(leg)
        route, gateway = live.placed.route, live.gateway
        gateway.book(route.prefill).left(live.placed.on_prefill)
        gateway.book(route.decode).left(live.placed.on_decode)
        gateway.answers.ended(leg.num_emitted)
        answer = Answer(
            request=leg.request,
            first_s=live.first_s,
            ended_s=self._now_s,
            prefill=route.prefill,
            cached_tokens=leg.cached_tokens,
            decode_cached_tokens=leg.decode_cached_tokens,
        )
        self.found.answers.append(answer)
        self._pump(gateway)
