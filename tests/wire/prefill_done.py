"""A PrefillDone for tests that look at its histogram alone."""

from __future__ import annotations

from duomo.wire.messages import PrefillDone
from duomo.wire.values import ExpertHistogram


def prefill_done(histogram: ExpertHistogram | None = None) -> PrefillDone:
    """With this histogram."""
    return PrefillDone(
        request_id="r",
        attempt=0,
        traceparent="",
        remaining_s=1.0,
        handle_id=1,
        num_messages=2,
        first_token_ids=(3,),
        ended_choices=(),
        cached_tokens=0,
        expert_histogram=histogram,
    )
