"""Growth over reports, starts and broken sockets, and that replicas which are gone for good are not kept for ever."""

from __future__ import annotations

from duomo.telemetry.grown_counts import KEPT_GONE, GrownCounts


def test_growth_is_since_the_last_report_of_the_same_start() -> None:
    counts = GrownCounts()
    assert counts.grown("p", "a", {"tokens": 5, "bytes": 7}) == {"tokens": 5, "bytes": 7}
    counts.forget("p")  # its socket broke
    assert counts.grown("p", "a", {"tokens": 6, "bytes": 7}) == {"tokens": 1, "bytes": 0}
    assert counts.grown("p", "b", {"tokens": 2}) == {"tokens": 2}, "a new start counts from nothing"
    assert counts.grown("p", "b", {"tokens": 1, "pulls": 3}) == {"tokens": 0, "pulls": 3}


def test_replicas_that_restart_under_new_ids_are_bounded() -> None:
    counts = GrownCounts()
    counts.grown("stays", "a", {"tokens": 1})
    counts.forget("never heard of")
    for number in range(10 * KEPT_GONE):
        replica_id = f"prefill-{number}"
        counts.grown(replica_id, "a", {"tokens": 3})
        counts.forget(replica_id)
        counts.forget(replica_id)
    assert len(counts) == KEPT_GONE + 1
    last = f"prefill-{10 * KEPT_GONE - 1}"
    assert counts.grown(last, "a", {"tokens": 4}) == {"tokens": 1}, "the last one to go is back"
    assert counts.grown("stays", "a", {"tokens": 1}) == {"tokens": 0}


def test_one_that_came_back_is_not_dropped_for_its_earlier_going() -> None:
    counts = GrownCounts()
    counts.grown("p", "a", {"tokens": 1})
    counts.forget("p")
    counts.grown("p", "a", {"tokens": 2})
    for number in range(KEPT_GONE + 1):
        counts.grown(f"other-{number}", "a", {"tokens": 1})
        counts.forget(f"other-{number}")
    assert counts.grown("p", "a", {"tokens": 2}) == {"tokens": 0}
