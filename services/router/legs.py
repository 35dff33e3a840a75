"""Starting and ending one leg: its messages to both replicas, and its share of their load in the gateway's books. Knows no policy."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable

import msgspec

from duomo.config import DuomoConfig
from duomo.errors import PeerError
from duomo.wire.codec import asks_of_peers
from duomo.wire.messages import Cancel, Resume, StartDecode, StartPrefill
from duomo.wire.values import Sampling
from services.router.books import WAVES_AHEAD, BookLimits
from services.router.flight import Flight, Leg
from services.router.pending import PendingLeg
from services.router.policy import DecodeView, Need, PrefillView, Route
from services.router.pools import ReplicaLink
from services.router.prefix_index import block_digests
from services.router.sent_since import Sent


def need_of(pending: PendingLeg, config: DuomoConfig, block_tokens: int) -> Need:
    """block_tokens: of the replicas that report; 0 where none does."""
    flight, request = pending.flight, pending.flight.request
    num_emitted = len(pending.choices[0].emitted) if pending.is_resume else 0
    new_tokens = request.sampling.max_tokens - num_emitted
    # D protects a leg from this attempt on, and promises it everything it may ever need.
    is_protected = pending.is_resume and flight.next_attempt >= config.decode.max_preemptions
    if flight.digests is None and block_tokens and request.scored is None:  # a scored prompt reads no cache
        flight.digests = block_digests(request.prompt_ids, block_tokens, request.cache_salt)
    return Need(
        num_tokens=len(request.prompt_ids) + num_emitted,
        new_tokens=new_tokens,
        num_choices=len(pending.choices),
        ahead_tokens=new_tokens if is_protected else config.decode.admit_ahead_tokens,
        digests=flight.digests or (),
        session=request.session,
        wire_version=asks_of_peers(_sampling_of(flight)),
    )


def book_limits(config: DuomoConfig) -> BookLimits:
    wave_tokens = config.prefill.max_wave_tokens
    return BookLimits(
        wave_tokens=wave_tokens,
        max_queued_tokens=WAVES_AHEAD * wave_tokens,
        watermark_blocks=config.decode.watermark_blocks,
        max_choices=config.decode.max_batch,
    )


def prefill_views(links: Iterable[ReplicaLink], limits: BookLimits, now_s: float) -> list[PrefillView]:
    views = (link.book.prefill_view(limits, now_s, is_open=link.is_usable, wire_version=link.connection.version) for link in links)
    return [view for view in views if view is not None]


def decode_views(links: Iterable[ReplicaLink], limits: BookLimits) -> list[DecodeView]:
    views = (link.book.decode_view(limits, is_open=link.is_usable, wire_version=link.connection.version) for link in links)
    return [view for view in views if view is not None]


def begin_leg(pending: PendingLeg, route: Route, links: dict[str, ReplicaLink], now_s: float) -> Leg:
    """The leg, entered in the books of both replicas; `post_start` sends it, `end_leg` takes it out again.

    A leg of all choices goes by the request's id. One that serves fewer (beside others that live on) gets an id of its own, another for
    each attempt, so that voiding one never touches another.
    """
    flight = pending.flight
    num_tokens = len(flight.request.prompt_ids) + (len(pending.choices[0].emitted) if pending.is_resume else 0)
    is_whole = len(pending.choices) == len(flight.choices)
    work_tokens = num_tokens - route.known_tokens
    leg = Leg(
        flight=flight,
        wire_id=flight.request.request_id if is_whole else f"{flight.request.request_id}/{pending.choices[0].number}.{flight.next_attempt}",
        attempt=flight.next_attempt,
        choices=pending.choices,
        prefill=links[route.prefill],
        decode=links[route.decode],
        on_prefill=Sent(at_s=now_s, num_tokens=num_tokens, work_tokens=work_tokens, room_tokens=route.room_tokens),
        on_decode=Sent(at_s=now_s, num_blocks=route.num_blocks, num_choices=len(pending.choices)),
    )
    flight.next_attempt += 1
    flight.legs.add(leg)
    for choice in pending.choices:
        choice.leg = leg
    for link, sent in ((leg.prefill, leg.on_prefill), (leg.decode, leg.on_decode)):
        link.legs.add(leg)
        link.book.enter(sent)
        link.book.prefixes.sent(flight.digests or ())
    return leg


def post_start(leg: Leg, *, is_resume: bool) -> float:
    """Send both starts; the moment at which prefill's goes to its socket. Raises PeerError where a replica has just gone, and WireError
    where one cannot be told all that is asked: its need (need_of) keeps it from there.
    """
    flight = leg.flight
    request, sampling = flight.request, _sampling_of(flight)
    remaining_s, choices = _remaining_s(flight), tuple(choice.number for choice in leg.choices)
    emitted = tuple(leg.choices[0].emitted) if is_resume else ()
    start = StartPrefill(
        request_id=leg.wire_id,
        attempt=leg.attempt,
        traceparent=flight.span.traceparent,
        remaining_s=remaining_s,
        prompt_ids=request.prompt_ids,
        sampling=sampling,
        cache_salt=request.cache_salt,
        priority=request.priority,
        choices=choices,
        decode=leg.decode.address,
        emitted_ids=emitted,
    )
    expect: StartDecode | Resume
    if is_resume:
        expect = Resume(
            request_id=leg.wire_id,
            attempt=leg.attempt,
            traceparent=flight.span.traceparent,
            remaining_s=remaining_s,
            prompt_ids=request.prompt_ids,
            emitted_ids=emitted,
            sampling=sampling,
            cache_salt=request.cache_salt,
            priority=request.priority,
            choice=choices[0],
            prefill=leg.prefill.address,
        )
    else:
        expect = StartDecode(
            request_id=leg.wire_id,
            attempt=leg.attempt,
            traceparent=flight.span.traceparent,
            remaining_s=remaining_s,
            prompt_ids=request.prompt_ids,
            sampling=sampling,
            cache_salt=request.cache_salt,
            priority=request.priority,
            choices=choices,
            prefill=leg.prefill.address,
        )
    leg.decode.connection.post(expect)
    leg.prefill.connection.post(start)
    leg.decode.connection.flush()
    sent_s = time.monotonic()  # before the write: it wakes the peer, which may run in our place
    leg.prefill.connection.flush()
    return sent_s


def _sampling_of(flight: Flight) -> Sampling:
    """What this attempt is asked: log-probabilities of a prompt that were told whole are not asked again."""
    sampling, scored = flight.request.sampling, flight.request.scored
    if scored is None or not scored.is_whole:
        return sampling
    return msgspec.structs.replace(sampling, prompt_logprobs=None)


def mark_first_token(leg: Leg) -> None:
    """P answered: the prompt waits there no more, and D's reports show its blocks."""
    if not leg.has_first_token:
        leg.has_first_token = True
        leg.prefill.book.answered(leg.on_prefill)
        leg.decode.book.answered(leg.on_decode)


def end_leg(leg: Leg, cancel_reason: str | None) -> None:
    """Take the leg out of the books; where a reason is given, cancel it on every side that has not said it is over."""
    mark_first_token(leg)
    leg.flight.legs.discard(leg)
    leg.prefill.legs.discard(leg)
    leg.decode.legs.discard(leg)
    leg.prefill.book.left(leg.on_prefill)
    leg.decode.book.left(leg.on_decode)
    if cancel_reason is not None:
        if not leg.prefill_is_over:
            post_cancel(leg, leg.prefill, cancel_reason)
        if not leg.decode_is_over:
            post_cancel(leg, leg.decode, cancel_reason)


def post_cancel(leg: Leg, link: ReplicaLink, reason: str, choice: int | None = None) -> None:
    """A replica that is gone needs no Cancel."""
    with contextlib.suppress(PeerError):
        link.connection.post(
            Cancel(
                request_id=leg.wire_id,
                attempt=leg.attempt,
                traceparent=leg.flight.span.traceparent,
                remaining_s=_remaining_s(leg.flight),
                reason=reason,
                choice=choice,
            )
        )


def _remaining_s(flight: Flight) -> float:
    return max(flight.request.deadline_s - time.monotonic(), 0.0)
