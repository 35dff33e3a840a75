"""Owns the words of a prefill leg: its announcement, its end and its failure as messages. Knows no socket; leg_book.py posts them."""

from __future__ import annotations

from duomo.errors import DuomoError
from duomo.wire.histogram import packed
from duomo.wire.messages import Cancel, PrefillDone, PromptScored, RequestFailed, RequestFinished, WaveAnnounced
from duomo.wire.prompt_logprobs import PromptScores
from duomo.wire.prompt_logprobs import packed as packed_scores
from services.prefill.first_tokens import FirstTokens
from services.prefill.leg import Leg
from services.prefill.worker import WaveOutput


def announcement_of(leg: Leg, wave_id: int, group_bounds: tuple[int, ...], now_s: float) -> WaveAnnounced:
    """To D: the prompt is about to be computed. wave_id: the next wave's, which may not be the leg's in the end."""
    return WaveAnnounced(
        request_id=leg.request.request_id,
        attempt=leg.request.attempt,
        traceparent=leg.request.traceparent,
        remaining_s=leg.remaining_s(now_s),
        wave_id=wave_id,
        num_tokens=len(leg.token_ids),
        group_bounds=group_bounds,
    )


def done_of(leg: Leg, output: WaveOutput, first: FirstTokens, now_s: float) -> PrefillDone:
    """To D: everything is computed, and pushed or being pushed."""
    assert leg.handoff is not None
    return PrefillDone(
        request_id=leg.request.request_id,
        attempt=leg.request.attempt,
        traceparent=leg.request.traceparent,
        remaining_s=leg.remaining_s(now_s),
        handle_id=leg.handoff.handle.handle_id,
        num_messages=len(leg.handoff.spans),
        first_token_ids=first.first_token_ids,
        ended_choices=first.ended_choices,
        cached_tokens=leg.cached_tokens,
        expert_histogram=packed(output.expert_counts),
    )


def scored_of(leg: Leg, scores: PromptScores, now_s: float) -> PromptScored:
    """To the gateway: the next of the prompt's own log-probabilities."""
    return PromptScored(
        request_id=leg.request.request_id,
        attempt=leg.request.attempt,
        traceparent=leg.request.traceparent,
        remaining_s=leg.remaining_s(now_s),
        scores=packed_scores(scores),
    )


def failed_of(leg: Leg, error: DuomoError, now_s: float) -> RequestFailed:
    """To the gateway."""
    return RequestFailed(
        request_id=leg.request.request_id,
        attempt=leg.request.attempt,
        traceparent=leg.request.traceparent,
        remaining_s=leg.remaining_s(now_s),
        code=error.code,
        phase=error.phase,
        retryable=error.retryable,
        detail=error.detail,
    )


def cancel_of(leg: Leg, reason: str, now_s: float) -> Cancel:
    """To D, which was told of the leg: nothing more comes."""
    return Cancel(
        request_id=leg.request.request_id,
        attempt=leg.request.attempt,
        traceparent=leg.request.traceparent,
        remaining_s=leg.remaining_s(now_s),
        reason=reason,
    )


def finished_of(leg: Leg, now_s: float) -> RequestFinished:
    """To the gateway: the leg is over and all that it held is free."""
    return RequestFinished(
        request_id=leg.request.request_id,
        attempt=leg.request.attempt,
        traceparent=leg.request.traceparent,
        remaining_s=leg.remaining_s(now_s),
        cached_tokens=leg.cached_tokens,
        timings=leg.timings(now_s),
    )
