"""Owns what is told of handoffs on decode: the span `kv.handoff`, its histograms and counts. Knows no socket, ring or block.

All from a leg's own times (docs/metrics.md). A handoff that ends before its KV is here is told too: its span says why, no histogram has it.
"""

from __future__ import annotations

import time
from collections import Counter

from duomo.errors import DuomoError
from duomo.telemetry.handoff_histograms import HANDOFF_BYTES, HANDOFF_EXPOSED_SECONDS, HANDOFF_SECONDS
from duomo.telemetry.tracing import AttributeValue, Tracing
from services.decode.leg import Leg


class HandoffFigures:
    """Of one replica. way: what moves the bytes, if any move. counters: the replica's, which its report carries."""

    def __init__(self, tracing: Tracing, way: str, counters: Counter[str]) -> None:
        self._tracing = tracing
        self._way = way
        self._counters = counters

    def arrived(self, leg: Leg, unsent_bytes: int) -> None:
        """All KV of the leg is here, verified, and PrefillDone read. unsent_bytes: what its prefix spared."""
        times = leg.times
        self._counters["handoffs"] += 1
        self._counters["landed_bytes"] += leg.landed_bytes
        self._counters["unsent_bytes"] += unsent_bytes
        if times.offered_s is None or times.prefill_done_s is None:
            return
        ended_s = times.ready_s()
        exposed_s = ended_s - times.prefill_done_s
        HANDOFF_BYTES.count(leg.landed_bytes, self._counters)
        HANDOFF_SECONDS.count(ended_s - times.offered_s, self._counters)
        HANDOFF_EXPOSED_SECONDS.count(exposed_s, self._counters)
        if self._tracing.is_on:
            told = self._attributes(leg) | {"duomo.exposed_s": exposed_s, "duomo.unsent_bytes": unsent_bytes}
            self._tracing.record_span("kv.handoff", leg.traceparent, times.offered_s, ended_s, told)

    def given_up(self, leg: Leg, error: DuomoError | None) -> None:
        """The leg's handle was open and is aborted now: by `error`, or since nobody waits for it any more."""
        self._counters["handoffs_given_up"] += 1
        if not self._tracing.is_on or leg.times.offered_s is None:
            return
        told = self._attributes(leg) | {"duomo.given_up": error.code if error is not None else "cancelled"}
        with self._tracing.start_span("kv.handoff", leg.traceparent, told, start_s=leg.times.offered_s) as span:
            if error is not None:
                span.fail(error)
            span.end(at_s=time.monotonic())

    def _attributes(self, leg: Leg) -> dict[str, AttributeValue]:
        times = leg.times
        assert times.offered_s is not None
        told: dict[str, AttributeValue] = {
            "duomo.way": self._way,
            "duomo.bytes": leg.landed_bytes,
            "duomo.groups": len({span.group for span in leg.spans}),
            "duomo.messages": len(leg.spans),
            "duomo.landed": len(leg.landed),
            "duomo.pulled": len(leg.pulled),
            "duomo.refused": leg.num_refused,
            "duomo.grant_wait_s": times.offered_s - (times.announced_s if times.announced_s is not None else times.offered_s),
        }
        landing_s = times.landing_s()
        if landing_s > 0:
            told["duomo.bytes_per_s"] = (leg.landed_bytes - leg.first_landed_bytes) / landing_s
        return told
