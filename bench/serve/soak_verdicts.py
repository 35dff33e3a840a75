"""Owns what a soak concludes from what was seen: percentiles, in total and by minute, lines through memory, verdicts. Knows no server.

Memory is flat where both hold, for every series, after the first minute:
  - the least-squares line rises by less than MAX_RISE_BYTES in ten minutes, by more than its noise could feign: the lower end of the
    slope's interval (two standard errors, from the residuals, widened by their correlation from sample to sample) counts;
  - the median of the last minute is above that of the second by less than MAX_STEP_SHARE of it or MAX_RISE_BYTES.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99_9": 0.999}
MINUTE_S = 60.0
MAX_RISE_BYTES = 32 * 2**20
MAX_STEP_SHARE = 0.02
RISE_S = 600.0
MIN_MEMORY_S = 180.0  # a second and a last minute that are not the same, after the first
MAX_LAG_S = 0.0025  # of a client's loop, p99; epoll rounds a sleep up by as much as 1 ms of it
MAX_CLIENT_CPU = 0.8
COMPILATIONS = "kernel_compilations_after_ready"

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Of gaps between token events, seconds. tokens_per_s: over the whole time."""

    num_events: int
    tokens_per_s: float
    quantile_s: dict[str, float] = field(default_factory=dict)
    max_s: float = 0.0

    @property
    def ratio(self) -> float:
        """p99 over p50; infinite where nothing came."""
        return self.quantile_s["p99"] / self.quantile_s["p50"] if self.num_events else float("inf")


@dataclass(frozen=True, kw_only=True)
class Line:
    """A series of bytes after the first minute. error: two standard errors of the slope; step: last minute's median less the second's."""

    median_bytes: float
    slope_bytes_per_s: float
    error_bytes_per_s: float
    step_bytes: float

    @property
    def is_flat(self) -> bool:
        rise = (self.slope_bytes_per_s - self.error_bytes_per_s) * RISE_S
        return rise < MAX_RISE_BYTES and self.step_bytes < max(MAX_RISE_BYTES, MAX_STEP_SHARE * self.median_bytes)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """passed None: not judged, `figures` says why."""

    name: str
    passed: bool | None
    figures: str

    def line(self) -> str:
        return f"{'-   ' if self.passed is None else 'PASS' if self.passed else 'RED '}  {self.name}: {self.figures}"


def spread(gap_s: Floats, tokens: Floats, duration_s: float) -> Spread:
    if not len(gap_s):
        return Spread(num_events=0, tokens_per_s=0.0)
    quantiles = np.quantile(gap_s, list(QUANTILES.values())).tolist()
    return Spread(
        num_events=len(gap_s),
        tokens_per_s=float(tokens.sum()) / duration_s,
        quantile_s=dict(zip(QUANTILES, quantiles, strict=True)),
        max_s=float(gap_s.max()),
    )


def by_minute(gap_end_s: Floats, gap_s: Floats, tokens: Floats, start_s: float, end_s: float) -> list[Spread]:
    """One for each whole minute from start_s; a rest of half a minute or more counts as one."""
    minutes, lo = [], start_s
    while end_s - lo >= MINUTE_S / 2:
        hi = lo + MINUTE_S if end_s - lo >= MINUTE_S else end_s
        inside = (gap_end_s >= lo) & (gap_end_s < hi)
        minutes.append(spread(gap_s[inside], tokens[inside], hi - lo))
        lo = hi
    return minutes


def line_of(at_s: Sequence[float], values: Sequence[float], start_s: float, end_s: float) -> Line | None:
    """None where the soak was too short to tell a slope from a start, or where too little was read."""
    times, bytes_ = np.asarray(at_s, np.float64), np.asarray(values, np.float64)
    late = times >= start_s + MINUTE_S
    if end_s - start_s < MIN_MEMORY_S or late.sum() < 8:
        return None
    x, y = times[late] - times[late].mean(), bytes_[late]
    slope = float((x * y).sum() / (x * x).sum())
    rest = y - y.mean() - slope * x
    wide = float(rest @ rest)
    correlation = min(0.9, max(0.0, float(rest[1:] @ rest[:-1]) / wide)) if wide else 0.0
    error = (wide / (len(y) - 2) / float((x * x).sum()) * (1 + correlation) / (1 - correlation)) ** 0.5
    second = y[times[late] < start_s + 2 * MINUTE_S]
    last = y[times[late] >= end_s - MINUTE_S]
    step = float(np.median(last) - np.median(second))
    return Line(median_bytes=float(np.median(y)), slope_bytes_per_s=slope, error_bytes_per_s=2 * error, step_bytes=step)


def itl_verdict(total: Spread, max_ratio: float) -> Verdict:
    if not total.num_events:
        return Verdict(name="ITL", passed=False, figures="no token came")
    p50, p99 = total.quantile_s["p50"], total.quantile_s["p99"]
    figures = f"p99 {1e3 * p99:.2f} ms is {total.ratio:.3f} of p50 {1e3 * p50:.2f} ms, at most {max_ratio:g}"
    return Verdict(name="ITL", passed=total.ratio <= max_ratio, figures=figures)


def memory_verdict(name: str, line: Line | None) -> Verdict:
    if line is None:
        return Verdict(name=name, passed=None, figures=f"not judged: read too rarely, or for less than {MIN_MEMORY_S:.0f} s")
    rise, error, step = (value / 2**20 for value in (line.slope_bytes_per_s * RISE_S, line.error_bytes_per_s * RISE_S, line.step_bytes))
    figures = (
        f"{line.median_bytes / 2**20:,.0f} MiB, rising {rise:+.1f} +- {error:.1f} MiB in ten minutes (below {MAX_RISE_BYTES / 2**20:.0f}), "
        f"last minute {step:+.1f} MiB from the second"
    )
    return Verdict(name=name, passed=line.is_flat, figures=figures)


def client_verdict(lag_s: Mapping[str, Floats], cpu_share: Mapping[str, float]) -> Verdict:
    """Whether the clients were fast enough to be believed."""
    worst = max((float(np.quantile(lag, 0.99)) for lag in lag_s.values() if len(lag)), default=float("inf"))
    latest = max((float(lag.max()) for lag in lag_s.values() if len(lag)), default=float("inf"))
    busiest = max(cpu_share.values(), default=0.0)
    figures = (
        f"their loops wake {1e3 * worst:.2f} ms late at p99 (at most {1e3 * MAX_LAG_S:g}), {1e3 * latest:.1f} at the worst; "
        f"the busiest takes {busiest:.0%} of a core (at most {MAX_CLIENT_CPU:.0%})"
    )
    return Verdict(name="clients", passed=worst <= MAX_LAG_S and busiest <= MAX_CLIENT_CPU, figures=figures)


def counter_verdicts(first: Mapping[str, int] | None, last: Mapping[str, int] | None) -> list[Verdict]:
    """Counters that must not move; None: the server has none."""
    if first is None or last is None:
        return [Verdict(name="counters", passed=None, figures="not judged: /metrics has none of Duomo's")]
    moved = {name: value - first.get(name, 0) for name, value in last.items() if value != first.get(name, 0)}
    figures = ", ".join(f"{name} +{more}" for name, more in sorted(moved.items())) or "none"
    answer = [Verdict(name="failures and preemptions", passed=not moved, figures=figures)]
    if COMPILATIONS in last:
        answer.append(Verdict(name="kernels compiled after ready", passed=last[COMPILATIONS] == 0, figures=str(last[COMPILATIONS])))
    return answer
