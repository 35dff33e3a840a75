"""PURE: a gateway of the simulator of routing: the real books, line, admission and policy, in virtual time. Knows no machine.

What it does with them is what services/router/placing.py does. Its `way` is the real policy, or a baseline: the same gateway that is not
told of prefixes (least_loaded), nor of load (random: any replica that has room).
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Literal

from bench.serve.route_traces import SimRequest
from services.router.admission import Admit, LineView, PoolsView, Refuse, Terms, decide, first_token_s, place, retry_s, told_full
from services.router.answer_lengths import AnswerLengths
from services.router.books import BookLimits, ReplicaBook
from services.router.policy import DecodeView, Need, PrefillView, Route, decode_blocks, known_tokens
from services.router.prefix_index import block_digests
from services.router.sent_since import Sent
from services.router.waiting import Rank, WaitingLine, Weight, rank

Way = Literal["duomo", "least_loaded", "random"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayTerms:
    """limits: of the books; the others: the gateway's section of the configuration."""

    limits: BookLimits
    way: Way = "duomo"
    max_waiting: int = 1024
    queue_ttl_s: float = 60.0
    ahead_tokens: int = 256


@dataclass(slots=True, eq=False, kw_only=True)
class SimPending:
    """A request without a pair."""

    request: SimRequest
    need: Need
    weight: Weight
    until_s: float
    leads_since_s: float | None = None

    @property
    def owner(self) -> object:
        return self

    @property
    def rank(self) -> Rank:
        return rank(received_s=self.request.at_s, priority=self.request.priority, was_running=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A leg that begins now; on_prefill, on_decode: as the books have it."""

    request: SimRequest
    need: Need
    route: Route
    on_prefill: Sent
    on_decode: Sent


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A request that is told to come back."""

    request: SimRequest
    status: int
    code: str
    retry_after_s: float


Outcome = Placed | Refused


class SimGateway:
    """One of several. prefills, decodes: the replicas' keys."""

    def __init__(self, terms: GatewayTerms, prefills: list[str], decodes: list[str], seed: int) -> None:
        self.line: WaitingLine[SimPending] = WaitingLine()
        self.answers = AnswerLengths()
        self._terms = terms
        self._prefills = {key: ReplicaBook(key) for key in prefills}
        self._decodes = {key: ReplicaBook(key) for key in decodes}
        self._random = random.Random(seed)

    def book(self, key: str) -> ReplicaBook:
        return self._prefills.get(key) or self._decodes[key]

    def submit(self, request: SimRequest, now_s: float) -> list[Outcome]:
        """A request comes: what becomes of it, and of whom it displaces. Nothing: it waits."""
        pools = self._view(now_s)
        need = self._need(request, pools)
        line = self._line_view(request)
        decision = decide(need, pools, line, self._until(request, now_s), self._random.getrandbits(32))
        if isinstance(decision, Admit):
            return [self._begin(request, need, decision.route, now_s)]
        if isinstance(decision, Refuse):
            return [Refused(request=request, status=decision.status, code=decision.code, retry_after_s=decision.retry_after_s)]
        outcomes: list[Outcome] = []
        if line.may_displace and (last := self.line.last()) is not None:
            assert told_full(line.num_waiting, line.max_waiting)
            outcomes.append(self._give_up(last, "queue_full", pools))
        known = max(known_tokens(view, need) for view in pools.prefills)
        blocks = min(decode_blocks(need, view.block_tokens) for view in pools.decodes)
        weight = Weight(work_tokens=need.num_tokens - known, num_blocks=blocks, num_choices=1)
        until_s = now_s + min(self._terms.queue_ttl_s, self._until(request, now_s).left_s)
        self.line.join(SimPending(request=request, need=need, weight=weight, until_s=until_s))
        return outcomes

    def pump(self, now_s: float) -> list[Outcome]:
        """Who waits and has a pair now, or waits no more."""
        outcomes: list[Outcome] = []
        pools = self._view(now_s)
        for pending in [one for one in self.line if now_s >= one.until_s]:
            outcomes.append(self._give_up(pending, "queue_timeout", pools))
        while (head := self.line.head()) is not None:
            pools = self._view(now_s)
            if head.leads_since_s is None:
                head.leads_since_s = now_s
            waited_s = now_s - head.leads_since_s
            placed = place(head.need, pools, frozenset(), self._until(head.request, now_s), self._random.getrandbits(32), waited_s)
            if placed is None:
                break
            self.line.pop_head()
            if isinstance(placed, Refuse):
                outcomes.append(Refused(request=head.request, status=placed.status, code=placed.code, retry_after_s=placed.retry_after_s))
            else:
                outcomes.append(self._begin(head.request, head.need, placed, now_s))
        return outcomes

    def _give_up(self, pending: SimPending, code: str, pools: PoolsView) -> Refused:
        wait_s = first_token_s(pending.need, pools, self._line_view(pending.request))
        self.line.forget(pending.owner)
        return Refused(request=pending.request, status=429, code=code, retry_after_s=retry_s(wait_s))

    def _begin(self, request: SimRequest, need: Need, route: Route, now_s: float) -> Placed:
        work = need.num_tokens - route.known_tokens
        on_prefill = Sent(at_s=now_s, num_tokens=need.num_tokens, work_tokens=work, room_tokens=route.room_tokens)
        on_decode = Sent(at_s=now_s, num_blocks=route.num_blocks, num_choices=1)
        for key, sent in ((route.prefill, on_prefill), (route.decode, on_decode)):
            self.book(key).enter(sent)
            self.book(key).prefixes.sent(need.digests)
        return Placed(request=request, need=need, route=route, on_prefill=on_prefill, on_decode=on_decode)

    def _need(self, request: SimRequest, pools: PoolsView) -> Need:
        is_told = self._terms.way == "duomo"
        return Need(
            num_tokens=len(request.prompt_ids),
            new_tokens=request.output_tokens,
            num_choices=1,
            ahead_tokens=self._terms.ahead_tokens,
            digests=block_digests(request.prompt_ids, pools.prefills[0].block_tokens, "") if is_told else (),
            session=request.session if is_told else "",
        )

    def _until(self, request: SimRequest, now_s: float) -> Terms:
        useful_s = request.deadline_s if request.limit_s is None else min(request.limit_s, request.deadline_s)
        return Terms(left_s=request.at_s + useful_s - now_s)

    def _line_view(self, request: SimRequest) -> LineView:
        line, terms = self.line, self._terms
        last = line.last() if line and len(line) >= terms.max_waiting else None
        own = rank(received_s=request.at_s, priority=request.priority, was_running=False)
        return LineView(
            num_waiting=len(line),
            max_waiting=terms.max_waiting,
            work_tokens=line.work_tokens,
            num_blocks=line.num_blocks,
            num_choices=line.num_choices,
            may_displace=last is not None and own < last.rank,
        )

    def _view(self, now_s: float) -> PoolsView:
        limits = self._terms.limits
        prefills = [one for book in self._prefills.values() if (one := book.prefill_view(limits, now_s, is_open=True)) is not None]
        decodes = [view for book in self._decodes.values() if (view := book.decode_view(limits, is_open=True)) is not None]
        if self._terms.way == "random":
            prefills, decodes = _blind(prefills, decodes)
        return PoolsView(prefills=prefills, decodes=decodes, answer_tokens=self.answers.mean_tokens)


def _blind(prefills: list[PrefillView], decodes: list[DecodeView]) -> tuple[list[PrefillView], list[DecodeView]]:
    """All alike but for their room: what is drawn decides."""
    return [replace(view, queued_tokens=0, tokens_per_s=0.0) for view in prefills], decodes
