"""PURE: owns what is kept of a request and what a load's requests come to: percentiles, rates, whether the client kept up. Knows no server.

Times are seconds since the load began, TTFT and E2E from when a request was due: a client that is late makes no server faster. An event
is what brings tokens at once; a gap lies between two events of one answer, whatever the second brings (ITL), and TPOT is an answer's
time from its first event to its last, for each token after the first event's. Figures are of requests that were due in the window, the
time from the end of the ramp to the end of the arrivals; rates of tokens and of finished requests are of what came within it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_LATE_S = 0.0025  # of sends, at p99; a loop that sleeps wakes as much as 1 ms late by epoll's rounding
MAX_LATE_SHARE = 0.05  # of the median TTFT, where that is more
LISTED_ERRORS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One request as its client saw it. output_tokens: asked for; num_tokens: that came; error: "" where it ended whole."""

    index: int
    due_s: float
    sent_s: float
    prompt_tokens: int
    output_tokens: int
    event_s: tuple[float, ...] = ()
    event_tokens: tuple[int, ...] = ()
    num_tokens: int = 0
    finish_reason: str = ""
    error: str = ""

    @property
    def ttft_s(self) -> float:
        return self.event_s[0] - self.due_s

    @property
    def e2e_s(self) -> float:
        return self.event_s[-1] - self.due_s

    @property
    def gaps_s(self) -> NDArray[np.float64]:
        return np.diff(np.asarray(self.event_s, np.float64))

    @property
    def tpot_s(self) -> float | None:
        """None of an answer that came at once."""
        later = self.num_tokens - self.event_tokens[0] if self.event_tokens else 0
        return (self.event_s[-1] - self.event_s[0]) / later if later > 0 and len(self.event_s) > 1 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Seconds of `count` samples."""

    count: int
    mean_s: float
    p50_s: float
    p90_s: float
    p95_s: float
    p99_s: float
    max_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What one load showed. None where there is nothing to take a figure of, or no limits were asked for.

    offered_per_s: requests that were due in the window, over its length. kept_share: of them, within limits; goodput_per_s: those over
    the window's length. late: how long after they were due requests were sent. was_in_time: whether `late` is little enough for the
    other figures to be the server's.
    """

    window_s: float
    num_requests: int
    num_failed: int
    errors: dict[str, int]
    offered_per_s: float
    finished_per_s: float
    output_tokens_per_s: float
    prompt_tokens_per_s: float
    ttft: Spread | None
    itl: Spread | None
    tpot: Spread | None
    e2e: Spread | None
    late: Spread | None
    was_in_time: bool
    events_with_several_tokens: int
    kept_share: float | None
    goodput_per_s: float | None


def spread_of(samples_s: Sequence[float] | NDArray[np.float64]) -> Spread | None:
    """None of none."""
    samples = np.asarray(samples_s, np.float64)
    if not len(samples):
        return None
    p50, p90, p95, p99 = (round(float(each), 7) for each in np.quantile(samples, [0.5, 0.9, 0.95, 0.99]))
    mean, most = round(float(samples.mean()), 7), round(float(samples.max()), 7)
    return Spread(count=len(samples), mean_s=mean, p50_s=p50, p90_s=p90, p95_s=p95, p99_s=p99, max_s=most)


def figures_of(seen: Sequence[Seen], ramp_s: float, end_s: float, is_kept: Callable[[Seen], bool] | None) -> Figures:
    """The window is [ramp_s, end_s]; is_kept: whether one request kept its limits."""
    window_s = end_s - ramp_s
    due = [one for one in seen if one.due_s >= ramp_s]
    came = [one for one in due if one.event_s]
    whole = [one for one in due if not one.error]
    kept = None if is_kept is None else sum(map(is_kept, due))
    late, ttft = spread_of([one.sent_s - one.due_s for one in due]), spread_of([one.ttft_s for one in came])
    in_window = [one for one in seen if not one.error and ramp_s <= one.event_s[-1] < end_s]
    first_in_window = [one for one in seen if one.event_s and ramp_s <= one.event_s[0] < end_s]
    return Figures(
        window_s=window_s,
        num_requests=len(due),
        num_failed=len(due) - len(whole),
        errors=dict(Counter(one.error for one in due if one.error).most_common(LISTED_ERRORS)),
        offered_per_s=len(due) / window_s,
        finished_per_s=len(in_window) / window_s,
        output_tokens_per_s=sum(_tokens_between(one, ramp_s, end_s) for one in seen) / window_s,
        prompt_tokens_per_s=sum(one.prompt_tokens for one in first_in_window) / window_s,
        ttft=ttft,
        itl=spread_of(np.concatenate([one.gaps_s for one in came] or [np.empty(0)])),
        tpot=spread_of([tpot for one in whole if (tpot := one.tpot_s) is not None]),
        e2e=spread_of([one.e2e_s for one in whole]),
        late=late,
        was_in_time=late is None or late.p99_s <= max(MAX_LATE_S, MAX_LATE_SHARE * (ttft.p50_s if ttft else 0.0)),
        events_with_several_tokens=sum(tokens > 1 for one in came for tokens in one.event_tokens),
        kept_share=kept / len(due) if kept is not None and due else None,
        goodput_per_s=None if kept is None else kept / window_s,
    )


def _tokens_between(one: Seen, lo_s: float, hi_s: float) -> float:
    """Where a server names no token ids, events have a share of the tokens that it says the answer had."""
    counted = sum(one.event_tokens)
    inside = sum(tokens for at_s, tokens in zip(one.event_s, one.event_tokens, strict=True) if lo_s <= at_s < hi_s)
    return inside * one.num_tokens / counted if counted else 0.0
