"""PURE: owns the search for the highest rate at which enough requests keep their limits. Knows no server.

From the lowest rate up by doubling until one fails, then between the two by halving their ratio.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """Rates in requests/s. share: of requests that must keep their limits. precision: the found rate is within this share of one that
    fails. max_points: loads at the most."""

    lowest: float
    highest: float
    share: float = 0.9
    precision: float = 0.05
    max_points: int = 12


def next_rate(search: Search, tried: Mapping[float, float]) -> float | None:
    """The rate to try next, of those tried and the shares that they showed; None where the search is over."""
    if not tried:
        return search.lowest
    found, failed = best_rate(search, tried), lowest_failed(search, tried)
    if found is None or len(tried) >= search.max_points:
        return None
    if not _is_open(search, found, failed):
        return None
    if failed is None:
        return min(2.0 * found, search.highest)
    return float(f"{(found * failed) ** 0.5:.4g}")


def best_rate(search: Search, tried: Mapping[float, float]) -> float | None:
    """The highest rate that passed below all that failed; None where none did."""
    failed = lowest_failed(search, tried)
    return max((rate for rate, share in tried.items() if share >= search.share and (failed is None or rate < failed)), default=None)


def lowest_failed(search: Search, tried: Mapping[float, float]) -> float | None:
    return min((rate for rate, share in tried.items() if share < search.share), default=None)


def finding(search: Search, tried: Mapping[float, float]) -> str:
    """What the search found, in words."""
    found, failed = best_rate(search, tried), lowest_failed(search, tried)
    if found is None:
        most = max(tried.values(), default=0.0)
        return f"no rate: at {search.lowest:g}/s {most:.0%} of requests are within limits, {search.share:.0%} are wanted"
    ran_out = ""
    if _is_open(search, found, failed):
        ran_out = f"; the search is out of loads ({len(tried)}) " if len(tried) >= search.max_points else "; the search did not end "
    if failed is None:
        return f"at least {found:g} requests/s, the highest that was asked" + (ran_out and f"{ran_out}below {search.highest:g}/s")
    wide = ran_out and f"{ran_out}where the two are {failed / found - 1.0:.1%} apart; within {search.precision:.1%} was asked"
    return (
        f"{found:g} requests/s; {failed:g}/s fails with {tried[failed]:.0%} of requests within limits, {search.share:.0%} are wanted{wide}"
    )


def _is_open(search: Search, found: float, failed: float | None) -> bool:
    """Whether a further load would tell more."""
    return found < search.highest if failed is None else failed > found * (1.0 + search.precision)
