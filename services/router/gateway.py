"""The gateway: the life of every request, from admission to its last token. Knows no HTTP; hears the replicas as their PoolListener.

Everything runs on one event loop and nothing waits here: a request is a Flight that messages move. A failed attempt is voided on both
legs and begun again: before its first token from the start, after it as Resume with what was emitted. So is one whose replica died. Legs
that find no room wait in one line and are woken by reports and by requests that end (placing.py).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter as Tally
from collections.abc import Sequence
from typing import Final

from duomo.config import DuomoConfig
from duomo.errors import CapacityError, DeadlineError, DuomoError, PeerError, RequestCancelled, RequestError, WireError
from duomo.telemetry.metrics import Metrics
from duomo.telemetry.parts import Rtts
from duomo.telemetry.tracing import Span, Tracing
from duomo.wire.connection import Identity, new_boot_id
from duomo.wire.messages import Preempted, PromptScored, RequestFailed, RequestFinished, TokensEmitted
from duomo.wire.values import EmittedToken
from services.router.accounting import Accounting
from services.router.admission import Refuse
from services.router.breakers import Breaking
from services.router.demand import DesiredReplicas
from services.router.flight import Choice, Flight, Leg
from services.router.generation import EventSink, GenerationRequest
from services.router.legs import (
    post_cancel,
)
from services.router.model_card import ModelCard
from services.router.pending import PendingLeg
from services.router.placing import Placing
from services.router.pools import MemberSource, Pools, ReplicaLink
from services.router.text import ModelText

log = logging.getLogger(__name__)

_DRAIN_POLL_S: Final = 0.02
_FOUND_NO_ROOM: Final = ("no_grant", "draining")
_LOST: Final = ("prefill_lost", "decode_lost")
# Between attempts that prefill ended with "unreachable", from the second on: it may know of decode's death before this loop hears of it.
_PAUSE_S: Final = 0.05
_MAX_PAUSE_S: Final = 1.0


class Gateway:
    """One gateway process' requests. start() and stop() frame its life; the loop that runs start() is the one that everything runs on.

    submit() begins a request, close() must be called for each, whatever happened: it cancels what still runs and settles the accounts.
    """

    def __init__(
        self,
        config: DuomoConfig,
        replica_id: str,
        card: ModelCard,
        text: ModelText,
        source: MemberSource,
        *,
        tracing: Tracing,
        metrics: Metrics,
    ) -> None:
        self.config = config
        self.card = card
        self.text = text
        self.replica_id = replica_id
        self.metrics = metrics
        self.tracing = tracing
        self.accounting = Accounting(tracing, metrics, card.name, time.monotonic)
        identity = Identity(
            replica_id=replica_id,
            boot_id=new_boot_id(),
            role="gateway",
            model_fingerprint=card.fingerprint,
            secret=config.wire.secret,
        )
        self.boot_id = identity.boot_id
        self.pools = Pools(source, identity, config.wire, self)
        self.dropped_tokens: Tally[str] = Tally()
        self.is_draining = False
        self._flights: set[Flight] = set()
        self._placing = Placing(config, self.pools, metrics)
        self._num_open_answers = 0

    @property
    def num_open_answers(self) -> int:  # submitted and not closed: their client still reads
        return self._num_open_answers

    @property
    def num_live_requests(self) -> int:
        return len(self._flights)

    @property
    def num_waiting(self) -> int:
        return self._placing.num_waiting

    def desired_replicas(self) -> DesiredReplicas:
        return self._placing.desired_replicas()

    @property
    def num_live_legs(self) -> int:
        return self._placing.num_live_legs

    async def start(self) -> None:
        await self.pools.start()

    async def drain(self, deadline_s: float) -> None:
        """Take no new request, and return when the live ones have ended or deadline_s is over."""
        self.is_draining = True
        until_s = time.monotonic() + deadline_s
        while self._flights and time.monotonic() < until_s:
            await asyncio.sleep(_DRAIN_POLL_S)

    async def stop(self) -> None:
        """End every request (a typed error to its client), tell the replicas, close their sockets."""
        self.is_draining = True
        for flight in list(self._flights):
            flight.fail(CapacityError("This gateway is shutting down.", code="shutting_down", phase="gateway"))
        await self.pools.stop()

    def why_not_ready(self) -> str | None:
        """None once a prefill and a decode replica are connected and take requests."""
        if self.is_draining:
            return "the gateway is shutting down"
        missing = [role for role, links in self._by_role() if not any(link.is_usable for link in links)]
        return f"no {' and no '.join(missing)} replica is connected" if missing else None

    def submit(self, request: GenerationRequest, sink: EventSink, span: Span) -> Flight:
        """Begin. Raises RequestError where it can never fit, CapacityError where it may not even wait; then nothing is held.

        The caller closes the flight that is returned; `span` ends with it.
        """
        choices = tuple(Choice(number, self.text.detokenizer(), request.stop) for number in range(request.num_choices))
        flight = Flight(request, sink, choices, span, self._flight_over)
        pending = PendingLeg(flight=flight, choices=choices, is_resume=False)
        if self.is_draining:
            raise CapacityError("This gateway is shutting down.", code="shutting_down", phase="gateway")
        decision = self._placing.admit(pending)
        if isinstance(decision, Refuse):
            if decision.status == 400:
                raise RequestError(decision.detail, param="max_tokens", code=decision.code)
            raise CapacityError(decision.detail, code=decision.code, retry_after_s=decision.retry_after_s)
        self._flights.add(flight)
        self._num_open_answers += 1
        self.metrics.live_requests.set(len(self._flights))
        remaining_s = max(request.deadline_s - time.monotonic(), 0.0)
        flight.timer = asyncio.get_running_loop().call_later(remaining_s, self._expire, flight)
        try:
            if decision is None:
                self._placing.wait(pending)
            else:
                self._placing.begin(pending, decision.route)
        except BaseException:  # a programmer's fault: nobody has the flight yet who would close it
            self._num_open_answers -= 1
            flight.fail(RequestCancelled("The request could not be started."))
            raise
        return flight

    def close(self, flight: Flight, error: DuomoError | None) -> None:
        """The client has its answer, or is gone: cancel what still runs, settle the accounts."""
        self._num_open_answers -= 1
        if not flight.is_over:
            flight.fail(error or RequestCancelled("The client is gone."))
        self.accounting.settle(flight, error or flight.error)

    def count_refused(self, code: str) -> None:
        """A call that was turned away before anything of it was read."""
        self.metrics.requests.labels("refused", code).inc()

    def cancel(self, flight: Flight, why: str) -> None:
        """Stop a request at once, on both pools."""
        flight.fail(RequestCancelled(why))

    # PoolListener

    def tokens_emitted(self, link: ReplicaLink, frame: TokensEmitted, received_s: float) -> None:
        running = self._placing.running
        for token in frame.tokens:
            leg = running(token.request_id)
            if leg is None or leg.attempt != token.attempt:
                self.dropped_tokens["void"] += 1
                continue
            choices = leg.flight.choices
            choice = choices[token.choice] if 0 <= token.choice < len(choices) else None
            if choice is None or choice.leg is not leg:
                self.dropped_tokens["void"] += 1
                continue
            if token.index <= 1 or token.timings is not None or not leg.has_landed:  # later ones tell nothing new
                self._note_arrival(link, leg, token, received_s)
            try:
                taken = leg.flight.take(choice, token)
            except Exception:  # of whoever makes bytes of this answer: it ends, and no other that came in the same frame
                log.exception("an answer cannot be written")
                self._break(leg.flight)
                continue
            if taken != "taken":
                self.dropped_tokens[taken] += 1
            elif choice.has_ended and not leg.flight.is_over:
                self._choice_ended(leg, choice)

    def _break(self, flight: Flight) -> None:
        try:
            flight.fail(DuomoError("The server made a mistake.", phase="gateway"))
        except Exception:
            log.exception("nor can its end be written")
            flight.sink.leave("the answer cannot be written")

    def prompt_scored(self, link: ReplicaLink, message: PromptScored) -> None:
        leg = self._placing.leg_of(message.request_id, message.attempt)
        if leg is None or link is not leg.prefill:
            return
        try:
            leg.flight.take_scores(message.attempt, message.scores)
        except WireError as error:
            self._leg_failed(leg, error, frozenset({link.key}))

    def request_finished(self, link: ReplicaLink, message: RequestFinished) -> None:
        leg = self._placing.leg_of(message.request_id, message.attempt)
        if leg is None:
            return
        flight = leg.flight
        if link is leg.prefill:
            leg.prefill_is_over = True
            num_prompt = len(flight.request.prompt_ids)
            # What ran before may have been computed there: a later attempt finds it, and it is no cache's.
            is_first = not flight.num_failed and not flight.lost and leg.on_prefill.num_tokens == num_prompt
            if flight.cached_tokens is None and is_first:
                flight.cached_tokens = min(message.cached_tokens, num_prompt)
        if link is leg.decode:
            leg.decode_is_over = True
        if leg.prefill_is_over and leg.decode_is_over and not all(choice.has_ended for choice in leg.choices):
            error = PeerError("Both legs ended without all tokens.", code="tokens_lost", phase="decode.stream")
            self._leg_failed(leg, error, frozenset({leg.decode.key}), (leg.decode.key,))

    def request_failed(self, link: ReplicaLink, message: RequestFailed) -> None:
        leg = self._placing.leg_of(message.request_id, message.attempt)
        if leg is None:
            return
        if link is leg.prefill:
            leg.prefill_is_over = True
        else:
            leg.decode_is_over = True
        link.has_refused_drain = link.has_refused_drain or message.code == "draining"
        error = DuomoError(message.detail, code=message.code, phase=message.phase, retryable=message.retryable)
        # Who is to blame for a handoff that fails, nobody knows: it is the pair's, and another of both is tried if there is one.
        culprits = (leg.prefill.key, leg.decode.key) if message.phase == "kv.handoff" else (link.key,)
        self._leg_failed(leg, error, frozenset(culprits), culprits)

    def preempted(self, link: ReplicaLink, message: Preempted) -> None:
        leg = self._placing.leg_of(message.request_id, message.attempt)
        given_up = [choice for choice in leg.choices if choice.number == message.choice] if leg is not None else []
        if leg is None or not given_up or given_up[0].has_ended:
            return
        leg.choices = tuple(choice for choice in leg.choices if choice is not given_up[0])
        if all(choice.has_ended for choice in leg.choices):
            leg.decode_is_over = True
            self._placing.end_leg(leg, "preempted")
        error = PeerError(f"Decode gave the choice up: {message.reason}.", code="preempted", phase="decode.stream")
        self._begin_again(leg.flight, given_up, error, frozenset())

    def reported(self, link: ReplicaLink) -> None:
        if link.report is not None:
            self.metrics.observe_report(link.report)
        self._placing.pools_changed()

    def link_lost(self, link: ReplicaLink, error: PeerError) -> None:
        for leg in list(link.legs):
            if leg.flight.is_over or leg not in link.legs:
                continue
            if link is leg.decode:
                leg.decode_is_over = True
                lost = PeerError(f"The decode replica is gone ({error.detail}).", code="decode_lost", phase="decode.stream")
            elif leg.prefill_is_over or (leg.has_landed and not any(choice.early for choice in leg.choices)):
                leg.prefill_is_over = True  # decode goes on without it, unless the first token was lost with it
                continue
            else:
                leg.prefill_is_over = True
                lost = PeerError(f"The prefill replica is gone ({error.detail}).", code="prefill_lost", phase="prefill.compute")
            self._leg_lost(leg, lost, link)
        self._placing.breakers.forget(link.key)
        if all(other.member.replica_id != link.member.replica_id for other in self.pools.links.values()):
            self.metrics.forget_replica(link.member.replica_id)
        self._placing.pools_changed()

    # Legs

    def _note_arrival(self, link: ReplicaLink, leg: Leg, token: EmittedToken, received_s: float) -> None:
        milestones = leg.flight.milestones
        if not leg.has_first_token:
            self._placing.first_token(leg)
            if not milestones.first_received_s:
                milestones.first_received_s = received_s
                milestones.rtts = Rtts(prefill_s=leg.prefill.connection.rtt_s or 0.0, decode_s=leg.decode.connection.rtt_s or 0.0)
        if link is leg.prefill:
            self._placing.breakers.succeeded((link.key,))
        elif not leg.has_landed:
            leg.has_landed = True
            self._placing.breakers.succeeded((leg.prefill.key, link.key))
        if token.index == 1 and link is leg.decode and not milestones.second_received_s:  # a resume's first comes from prefill
            milestones.second_received_s = received_s
        if token.timings is not None:
            if link is leg.prefill and milestones.prefill_timings is None:
                milestones.prefill_timings = token.timings
            elif link is leg.decode and milestones.decode_timings is None:
                milestones.decode_timings = token.timings

    def _choice_ended(self, leg: Leg, choice: Choice) -> None:
        """One of several choices is done, others of the request go on."""
        if all(other.has_ended for other in leg.choices):
            self._placing.end_leg(leg, "stop" if any(other.needs_cancel for other in leg.choices) else None)
        elif choice.needs_cancel:
            choice.needs_cancel = False
            post_cancel(leg, leg.decode, "stop", choice.number)

    def _leg_failed(self, leg: Leg, error: DuomoError, culprits: frozenset[str], breaking: Breaking | None = None) -> None:
        """breaking: whose breaker counts it, if it is a failure at all and not a lack of room."""
        choices = [choice for choice in leg.choices if not choice.has_ended]
        self._placing.end_leg(leg, error.code)
        if not error.retryable:
            leg.flight.fail(error)
            return
        if error.code == "no_grant" and self._placing.seems_roomy(leg):
            breaking = (leg.prefill.key, leg.decode.key)  # by its own word it had room for this leg
        elif error.code in _FOUND_NO_ROOM:
            breaking = None
        if breaking is not None and self._placing.breakers.failed(breaking, time.monotonic()):
            self.metrics.breakers_opened.labels("pair" if len(breaking) > 1 else "leg").inc()
            log.warning("breaker of %s opens: %s", " and ".join(map(self._name_of, breaking)), error)
        self._begin_again(leg.flight, choices, error, culprits)

    def _leg_lost(self, leg: Leg, lost: PeerError, link: ReplicaLink) -> None:
        """Its replica died. A request that replicas keep dying under may be why, and is not given to every one there is."""
        flight = leg.flight
        flight.lost.add(link.key)
        if len(flight.lost) > self.config.gateway.max_lost_replicas:
            detail = f"{len(flight.lost)} replicas died while they served this request, the last: {lost.detail}"
            flight.fail(PeerError(detail, code="replica_lost", phase=lost.phase))
        else:
            self._leg_failed(leg, lost, frozenset({link.key}))

    def _name_of(self, key: str) -> str:
        link = self.pools.links.get(key)
        return key if link is None else link.member.replica_id

    def _begin_again(self, flight: Flight, choices: Sequence[Choice], error: DuomoError, culprits: frozenset[str]) -> None:
        """Unanswered choices start anew together; each that has emitted tokens resumes on its own."""
        if flight.is_over:
            return
        unanswered = tuple(choice for choice in choices if not choice.emitted)
        groups = [(unanswered, False)] if unanswered else []
        groups += [((choice,), True) for choice in choices if choice.emitted]
        for group, is_resume in groups:
            if not self._may_begin_again(flight, group, is_resume, error):
                flight.fail(error)
                return
            for choice in group:
                choice.leg = None
                choice.early.clear()
            again = PendingLeg(flight=flight, choices=group, is_resume=is_resume, avoid=culprits, cause=error.detail)
            num_failed = group[0].num_resumes if is_resume else flight.num_failed
            is_paused = error.code == "unreachable" and num_failed > 1
            self._placing.begin_again(again, min(_PAUSE_S * 2.0 ** (num_failed - 2), _MAX_PAUSE_S) if is_paused else 0.0)

    def _may_begin_again(self, flight: Flight, group: Sequence[Choice], is_resume: bool, error: DuomoError) -> bool:
        """Each attempt that ran counts against its limit; one that found no room never began, and is bounded by the deadline alone.

        Replicas that died are counted by _leg_lost().
        """
        limits = self.config.gateway
        num = 0 if error.code in _FOUND_NO_ROOM + _LOST else 1
        if is_resume:
            group[0].num_resumes += num
            flight.milestones.num_resumes += 1
            self.metrics.resumes.labels(error.code).inc()
            return group[0].num_resumes <= limits.max_resumes
        flight.num_failed += num
        flight.milestones.num_retries += 1
        self.metrics.retries.labels(error.code).inc()
        return flight.num_failed <= limits.max_prefill_retries

    # Flights

    def _flight_over(self, flight: Flight, error: DuomoError | None) -> None:
        for leg in list(flight.legs):
            is_natural = error is None and not any(choice.needs_cancel for choice in leg.choices)
            self._placing.end_leg(leg, None if is_natural else (error.code if error is not None else "stop"))
        self._placing.forget(flight)
        self._flights.discard(flight)
        self.metrics.live_requests.set(len(self._flights))

    def _expire(self, flight: Flight) -> None:
        seconds = flight.request.deadline_s - flight.request.received_s
        flight.fail(DeadlineError(f"The request was not finished within {seconds:g} s."))

    def _by_role(self) -> tuple[tuple[str, list[ReplicaLink]], ...]:
        return (("prefill", self.pools.prefills()), ("decode", self.pools.decodes()))
