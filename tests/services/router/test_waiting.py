"""The line: order, front for those that ran before, places of those that left."""

from __future__ import annotations

import time
from dataclasses import dataclass

from services.router.waiting import PendingLeg, WaitingLine


@dataclass
class Waiter:
    """What the line asks of a flight."""

    is_over: bool = False
    num_pending: int = 0


def _pending(flight: Waiter) -> PendingLeg:
    return PendingLeg(flight=flight, choices=(), is_resume=False)


def test_order_front_and_leavers() -> None:
    line, flights = WaitingLine(), [Waiter() for _ in range(4)]
    entries = [_pending(flight) for flight in flights]
    for entry in entries[:3]:
        line.append(entry)
    line.push_front(entries[3])
    assert len(line) == 4 and line.head() is entries[3]
    line.pop_head()
    flights[0].is_over = flights[1].is_over = True
    line.forget(flights[0])
    line.forget(flights[1])
    assert len(line) == 1 and line.head() is entries[2]
    line.pop_head()
    assert len(line) == 0 and line.head() is None and all(flight.num_pending == 0 for flight in flights)


def test_thousands_leave_in_linear_time() -> None:
    line, flights = WaitingLine(), [Waiter() for _ in range(20_000)]
    started_s = time.monotonic()
    for flight in flights:
        line.append(_pending(flight))
    for flight in reversed(flights):
        flight.is_over = True
        line.forget(flight)
    assert len(line) == 0 and line.head() is None and time.monotonic() - started_s < 1.0


def test_where_no_replica_is_left_the_client_is_told_whether_one_had_served_it() -> None:
    """Whoever sees the end of D first, prefill or the gateway, the answer is the same."""
    assert [_pending(Waiter()).without_replica(pool).code for pool in ("prefill", "decode")] == ["no_prefill_replica", "no_decode_replica"]
    again = PendingLeg(flight=Waiter(), choices=(), is_resume=False, cause="decode replica d0 is gone")
    lost = again.without_replica("decode")
    assert lost.code == "replica_lost" and "decode replica d0 is gone" in lost.detail
