"""Circuit breakers of replicas (one leg) and of pairs: which have failed so often in a row that others are tried first. Knows no socket
and no clock: keys in, keys out, now_s passed in.

Closed until num_failures failures came with no success between; then open for open_s. After that one leg is its trial, and none other for
open_s: a success closes it, a failure opens it for twice as long as the last time, max_open_s at most.
"""

from __future__ import annotations

from dataclasses import dataclass

# A replica's key alone for its leg, two (P, D) for a pair.
Breaking = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerLimits:
    """See above; num_failures at least 1, seconds above 0."""

    num_failures: int
    open_s: float
    max_open_s: float


@dataclass(slots=True)
class _Breaker:
    next_open_s: float
    num_failures: int = 0
    open_until_s: float = 0.0
    is_on_trial: bool = False


class Breakers:
    """One gateway's. Whoever never failed, and whoever is gone, costs nothing."""

    def __init__(self, limits: BreakerLimits) -> None:
        self._limits = limits
        self._failing: dict[Breaking, _Breaker] = {}

    def failed(self, key: Breaking, now_s: float) -> bool:
        """One more failure; whether it opens the breaker. What was on its way when it opened changes nothing."""
        breaker = self._failing.setdefault(key, _Breaker(self._limits.open_s))
        breaker.num_failures += 1
        is_open = now_s < breaker.open_until_s and not breaker.is_on_trial
        if is_open or breaker.num_failures < self._limits.num_failures:
            return False
        breaker.open_until_s = now_s + breaker.next_open_s
        breaker.next_open_s = min(2 * breaker.next_open_s, self._limits.max_open_s)
        breaker.is_on_trial = False
        return True

    def succeeded(self, key: Breaking) -> None:
        """It works (again)."""
        self._failing.pop(key, None)

    def tried(self, key: Breaking, now_s: float) -> None:
        """A leg goes there now: where it was open until now, that is its trial."""
        breaker = self._failing.get(key)
        if breaker is not None and breaker.num_failures >= self._limits.num_failures and now_s >= breaker.open_until_s:
            breaker.open_until_s = now_s + self._limits.open_s
            breaker.is_on_trial = True

    def open_keys(self, now_s: float) -> frozenset[Breaking]:
        """Those that nothing more is sent to now."""
        return frozenset(key for key, breaker in self._failing.items() if now_s < breaker.open_until_s)

    def forget(self, replica: str) -> None:
        """That start of the replica is gone."""
        self._failing = {key: breaker for key, breaker in self._failing.items() if replica not in key}
