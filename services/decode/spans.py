"""Owns the spans of a leg on decode, recorded after the fact from its times. Knows no socket and no block."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from duomo.telemetry.tracing import Tracing
from services.decode.leg import Leg


def _record_first_step(tracing: Tracing, leg: Leg) -> None:
    times = leg.times
    if times.first_step_s is None or times.first_token_s is None:
        return
    tracing.record_span("decode.admit", leg.traceparent, times.ready_s(), times.first_step_s, {"duomo.blocks": leg.num_landing_blocks})
    tracing.record_span(
        "decode.first_step", leg.traceparent, times.first_step_s, times.first_token_s, {"duomo.batch": times.first_batch_size}
    )


def record_stream(tracing: Tracing, leg: Leg, ended_s: float, expert_counts_LE: NDArray[np.int64]) -> None:
    """decode.admit, decode.first_step and decode.stream, when the leg has ended: no token waits for a span to be written."""
    if not tracing.is_on or leg.times.first_token_s is None:
        return
    _record_first_step(tracing, leg)
    tokens_L = expert_counts_LE.sum(axis=1)
    mean_L = np.maximum(tokens_L / expert_counts_LE.shape[1], 1e-9)
    attributes = {
        "duomo.tokens": leg.num_decoded_tokens,
        "duomo.preempted": leg.num_preempted,
        "duomo.expert_imbalance": float((expert_counts_LE.max(axis=1) / mean_L).max()),
    }
    tracing.record_span("decode.stream", leg.traceparent, leg.times.first_token_s, ended_s, attributes)
