"""Histograms of handoffs: counted in replicas, scraped at the gateway. Owns their names, buckets and way through a report; knows no leg.

A replica has no /metrics of its own: it counts a value as `<key>.le.<bound>` (not cumulative; `inf` behind the last bound) and adds it up
in `<key>.sum`, among the counters of its ReplicaReport. The gateway adds what those grew by, over all replicas and their restarts, to one
histogram for each transport.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from prometheus_client import Metric
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from duomo.telemetry.grown_counts import GrownCounts
from duomo.wire.messages import ReplicaReport

_SECONDS: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class HandoffHistogram:
    """One histogram. key: how its counters begin. units_per_value: counters are whole numbers, so seconds are summed in microseconds."""

    name: str
    text: str
    key: str
    bounds: tuple[float, ...]
    units_per_value: int = 1

    def count(self, value: float, into: Counter[str]) -> None:
        """One value, in a replica."""
        at = bisect.bisect_left(self.bounds, value)
        into[self._bucket(at)] += 1
        into[f"{self.key}.sum"] += round(value * self.units_per_value)

    def buckets(self, counts: Mapping[str, int]) -> list[tuple[str, float]]:
        """Prometheus' cumulative buckets."""
        total, buckets = 0, []
        for at in range(len(self.bounds) + 1):
            total += counts.get(self._bucket(at), 0)
            buckets.append((_text(self.bounds[at]) if at < len(self.bounds) else "+Inf", float(total)))
        return buckets

    def sum(self, counts: Mapping[str, int]) -> float:
        return counts.get(f"{self.key}.sum", 0) / self.units_per_value

    def _bucket(self, at: int) -> str:
        return f"{self.key}.le.{_text(self.bounds[at])}" if at < len(self.bounds) else f"{self.key}.le.inf"


def _text(bound: float) -> str:
    """A bound as it is written: no exponent."""
    return str(int(bound)) if bound >= 1 and bound == int(bound) else f"{bound:g}"


HANDOFF_BYTES: Final = HandoffHistogram(
    name="duomo_handoff_bytes",
    text="KV bytes that one handoff moved",
    key="handoff_bytes",
    bounds=tuple(float(1 << shift) for shift in range(16, 36, 2)),
)
HANDOFF_SECONDS: Final = HandoffHistogram(
    name="duomo_handoff_seconds",
    text="From a handle's offer to all of its KV verified and PrefillDone read",
    key="handoff_s",
    bounds=_SECONDS,
    units_per_value=1_000_000,
)
HANDOFF_EXPOSED_SECONDS: Final = HandoffHistogram(
    name="duomo_handoff_exposed_seconds",
    text="What of a handoff prefill's compute did not hide: from PrefillDone read to the last message verified",
    key="handoff_exposed_s",
    bounds=_SECONDS,
    units_per_value=1_000_000,
)
HANDOFF_RATE: Final = HandoffHistogram(
    name="duomo_handoff_bytes_per_second",
    text="Of a pushed layer group: its bytes over the time from the first message's packing to the last write's end",
    key="handoff_bytes_per_s",
    bounds=(1e7, 3e7, 1e8, 3e8, 1e9, 3e9, 1e10, 3e10, 1e11, 2e11, 4e11),
)
HANDOFF_HISTOGRAMS: Final = (HANDOFF_BYTES, HANDOFF_SECONDS, HANDOFF_EXPOSED_SECONDS, HANDOFF_RATE)
_PREFIXES: Final = tuple(f"{histogram.key}." for histogram in HANDOFF_HISTOGRAMS)


def is_part(counter: str) -> bool:
    """Whether a replica's counter is part of a histogram rather than a count of its own."""
    return counter.startswith(_PREFIXES)


class HandoffHistograms(Collector):
    """The gateway's: sums over replicas, by transport. They never shrink: a replica that is gone has handed over what it has."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[str]] = {}
        self._grown = GrownCounts()

    def observe(self, report: ReplicaReport) -> None:
        now = {name: count for name, count in report.counters.items() if is_part(name)}
        if now:
            grown = self._grown.grown(report.replica_id, report.boot_id, now)
            self._counts.setdefault(report.transport, Counter()).update(grown)

    def forget(self, replica_id: str) -> None:
        """The replica is gone; what it counted stays."""
        self._grown.forget(replica_id)

    def collect(self) -> Iterator[Metric]:
        for histogram in HANDOFF_HISTOGRAMS:
            family = HistogramMetricFamily(histogram.name, histogram.text, labels=("transport",))
            for transport, counts in self._counts.items():
                family.add_metric((transport,), buckets=histogram.buckets(counts), sum_value=histogram.sum(counts))
            yield family
