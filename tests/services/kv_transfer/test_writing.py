"""When a message may be written, and when a handle is fenced: the producer's rules one by one (with the consumer: test_lifetime)."""

from __future__ import annotations

import pytest

from services.kv_transfer import writing
from services.kv_transfer.writing import Verdict, Writer, may_write


@pytest.fixture
def writer() -> Writer:
    """Handle 1 on slots 4 and 7 of ring a, handle 2 on slot 4 of ring b."""
    return writing.open_handle(writing.open_handle(Writer(), 1, "a", (4, 7)), 2, "b", (4,))


def test_the_window_moves_with_credits(writer: Writer) -> None:
    assert [may_write(writer, 1, m) for m in range(4)] == [Verdict.GO, Verdict.GO, Verdict.WAIT, Verdict.WAIT]
    writer = writing.credit(writer, 1, 1)
    assert [may_write(writer, 1, m) for m in range(4)] == [Verdict.GO, Verdict.DROP, Verdict.WAIT, Verdict.GO]


def test_a_slot_has_one_write_in_flight(writer: Writer) -> None:
    writer = writing.credit(writing.start_write(writer, 1, 0), 1, 0)
    assert may_write(writer, 1, 2) is Verdict.WAIT, "credited, but message 0's write is not terminal here"
    assert may_write(writer, 2, 0) is Verdict.GO, "slot 4 of another ring is another slot"
    assert may_write(writing.end_write(writer, 1, 0), 1, 2) is Verdict.GO
    with pytest.raises(AssertionError):
        writing.start_write(writer, 1, 2)


def test_a_handle_is_fenced_when_cancelled_and_nothing_is_in_flight(writer: Writer) -> None:
    assert not writing.is_fenced(writer, 1)
    writer = writing.cancel(writing.start_write(writer, 1, 1), 1)
    assert not writing.is_fenced(writer, 1) and may_write(writer, 1, 0) is Verdict.DROP
    writer = writing.end_write(writer, 1, 1)
    assert writing.is_fenced(writer, 1)
    writer = writing.forget(writer, 1)
    assert writing.is_fenced(writer, 1) and may_write(writer, 1, 0) is Verdict.DROP


def test_a_gone_ring_stops_its_handles_alone_and_is_idle_after_its_last_write(writer: Writer) -> None:
    writer = writing.cancel_ring(writing.start_write(writer, 1, 0), "a")
    assert may_write(writer, 1, 1) is Verdict.DROP and may_write(writer, 2, 0) is Verdict.GO
    assert not writing.is_ring_idle(writer, "a") and writing.is_ring_idle(writer, "b")
    assert writing.is_ring_idle(writing.end_write(writer, 1, 0), "a")


def test_what_is_unknown_changes_nothing(writer: Writer) -> None:
    assert writing.credit(writer, 9, 0) == writer == writing.cancel(writer, 9) == writing.open_handle(writer, 1, "c", (0,))
    forgotten = writing.forget(writing.start_write(writer, 1, 0), 1)
    assert writing.end_write(forgotten, 1, 0).busy == {}, "a forgotten handle's write still gives its slot back"
