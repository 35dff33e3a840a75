"""Decides how many slots to grant, when to replace a ring, when to look again, how fast to write. PURE; holds no state.

Whoever asks passes what it sees and `now_s`; the answer is acted on by landing.py and pushing.py.
"""

from __future__ import annotations

from dataclasses import dataclass

# A ring whose writer is stopped keeps its memory until the writer is known dead; more of them than this and the peer gets no grants.
MAX_RETIRED_RINGS = 4
# Rings of producers that were given up without proof of death: so many keep their memory, where a write that comes after all does no harm.
MAX_KEPT_RINGS = 4
# A fence follows an abort within milliseconds while the writer lives; only slots that wait longer than this make a ring stuck.
RING_PATIENCE_S = 2.0
# A message that was announced but does not verify is looked at again, at doubling intervals, for this long, before it counts as corrupt:
# a notification may overtake the bytes it speaks of.
CORRUPT_AFTER_S = 0.05
# The same for a message whose trailer is there but whose notification never came.
UNANNOUNCED_CORRUPT_AFTER_S = 0.5
_FIRST_LOOK_S = 0.001
_LAST_LOOK_S = 0.016


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """Attempts to verify one awaited message: how many failed, since when, and when to try next."""

    failures: int
    since_s: float
    next_s: float


def slots_to_grant(num_free: int, want_slots: int, num_slots: int) -> int:
    """How many slots a handle gets: what it wants, at most what is free, and at most half a ring.

    One slot is enough for progress; half a ring leaves room for a second handle, so that one long prompt does not shut out short ones.
    """
    assert want_slots > 0, want_slots
    return min(want_slots, num_free, max(1, num_slots // 2))


def is_crowded(num_quarantined: int, num_slots: int) -> bool:
    """Whether more than a quarter of the ring is in quarantine."""
    return num_quarantined * 4 > num_slots


def must_replace_ring(crowded_since_s: float | None, now_s: float) -> bool:
    """Whether a ring has been crowded with quarantined slots for so long that its writer does not answer."""
    return crowded_since_s is not None and now_s - crowded_since_s >= RING_PATIENCE_S


def may_open_ring(num_retired: int) -> bool:
    """Whether a peer that has num_retired rings in quarantine may have another."""
    return num_retired < MAX_RETIRED_RINGS


def look_again(look: Look | None, now_s: float) -> Look:
    """After a failed verification: the next look, 1 ms later, then 2, 4, ... 16 ms."""
    failures = 0 if look is None else look.failures
    delay_s = min(_LAST_LOOK_S, _FIRST_LOOK_S * 2.0**failures)
    return Look(failures=failures + 1, since_s=now_s if look is None else look.since_s, next_s=now_s + delay_s)


def is_corrupt(look: Look, announced_s: float | None, now_s: float) -> bool:
    """Whether an unverified message is given up: it was announced, or its trailer seen, too long ago for bytes still to be under way."""
    if look.failures < 2:
        return False
    if announced_s is None:
        return now_s - look.since_s >= UNANNOUNCED_CORRUPT_AFTER_S
    return now_s - max(announced_s, look.since_s) >= CORRUPT_AFTER_S


def paced_until_s(free_at_s: float, now_s: float, num_bytes: int, max_bytes_per_s: float) -> float:
    """When a write of num_bytes may be posted under a rate cap (0: at once); also the free_at_s of the next write."""
    if max_bytes_per_s <= 0:
        return now_s
    return max(free_at_s, now_s) + num_bytes / max_bytes_per_s


def poll_delay_s(waited_s: float, *, is_seen_there: bool = True) -> float:
    """How long a writer sleeps between looks at a write that has been in flight for waited_s: a tenth of it, 0.5 to 2 ms.

    Shorter looks gain nothing (the consumer sees the bytes by itself) and take the interpreter from the layers that compute meanwhile. In
    a device's memory nobody sees them: the consumer is told by the look that finds the write done, so those are 0.02 to 0.5 ms apart, an
    eighth of the wait.
    """
    if not is_seen_there:
        return min(0.0005, max(0.00002, waited_s / 8))
    return min(0.002, max(0.0005, waited_s / 10))
