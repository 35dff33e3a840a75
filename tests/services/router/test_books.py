"""What a gateway makes of a replica's reports and of what it sent since; that several gateways agree; older replicas."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from duomo.wire.messages import ReplicaReport
from services.router.books import BookLimits, ReplicaBook
from services.router.sent_since import IN_FLIGHT_S, Sent

LIMITS = BookLimits(wave_tokens=512, max_queued_tokens=4096, watermark_blocks=8, max_choices=16)


def report(role: str, **told: Any) -> ReplicaReport:
    plain = dict.fromkeys(
        ("num_running", "num_queued", "num_queued_tokens", "num_cached_blocks", "num_slots", "num_free_slots", "num_quarantined_slots")
        + ("num_open_handles", "num_open_spans", "num_steps"),
        0,
    )
    blocks = {"num_blocks": 100, "num_free_blocks": 100, "block_tokens": 16}
    who = {"replica_id": role, "boot_id": "b", "role": role, "is_draining": False}
    return ReplicaReport(**(who | plain | blocks | told))


def prefill_report(**told: Any) -> ReplicaReport:
    return report("prefill", **({"num_work_tokens": 0} | told))


def decode_report(**told: Any) -> ReplicaReport:
    return report("decode", **({"num_promised_blocks": 0} | told))


def prompt(at_s: float, num_tokens: int = 100, known: int = 0) -> Sent:
    return Sent(at_s=at_s, num_tokens=num_tokens, work_tokens=num_tokens - known, room_tokens=min(num_tokens, 512))


def queued(book: ReplicaBook, now_s: float) -> int:
    view = book.prefill_view(LIMITS, now_s, is_open=True)
    assert view is not None
    return view.queued_tokens


def test_before_a_report_there_is_no_view() -> None:
    book = ReplicaBook("p")
    assert book.prefill_view(LIMITS, 0.0, is_open=True) is None and book.decode_view(LIMITS, is_open=True) is None


def test_prefills_work_is_everybodys_and_what_was_sent_since() -> None:
    book = ReplicaBook("p")
    book.reported(prefill_report(num_work_tokens=700, num_queued=2, num_queued_tokens=900), 1.0)
    assert queued(book, 1.0) == 700
    first, second = prompt(1.02, known=60), prompt(1.05)
    book.enter(first)
    book.enter(second)
    assert queued(book, 1.06) == 840 and (book.queued_tokens, book.room_tokens) == (200, 200)
    view = book.prefill_view(LIMITS, 1.06, is_open=True)
    assert view is not None and view.room_tokens == 1100, "900 of anybody, and 200"
    book.reported(prefill_report(num_work_tokens=500), 1.052)
    assert queued(book, 1.06) == 600, "the second was sent too shortly before the report"
    book.reported(prefill_report(num_work_tokens=500), 1.15)
    assert queued(book, 1.15) == 500 and book.queued_tokens == 200, "the report tells of both"
    for sent in (first, second):
        book.answered(sent)
        book.left(sent)
    assert book.is_empty and queued(book, 1.15) == 500


def test_work_is_done_while_no_report_comes_and_what_is_answered_counts_no_more() -> None:
    book = ReplicaBook("p")
    book.reported(prefill_report(num_work_tokens=700, tokens_per_s=10_000.0, num_queued=1, num_queued_tokens=700), 1.0)
    assert (queued(book, 1.03), queued(book, 1.2)) == (400, 0)
    book.enter(sent := prompt(1.2))
    assert queued(book, 1.2) == 100
    book.answered(sent)
    assert queued(book, 1.2) == 0, "known sooner than any report tells it"


def test_decodes_room_is_what_nobody_was_promised() -> None:
    book = ReplicaBook("d")
    book.reported(decode_report(num_free_blocks=40, num_cached_blocks=20, num_promised_blocks=25, num_running=3, num_queued=1), 1.0)
    view = book.decode_view(LIMITS, is_open=True)
    assert view is not None and (view.free_blocks, view.num_choices) == (35, 4)
    book.enter(sent := Sent(at_s=1.05, num_blocks=10, num_choices=2))
    view = book.decode_view(LIMITS, is_open=True)
    assert view is not None and (view.free_blocks, view.num_choices) == (25, 6)
    book.reported(decode_report(num_free_blocks=30, num_cached_blocks=20, num_promised_blocks=25, num_running=6), 1.15)
    view = book.decode_view(LIMITS, is_open=True)
    assert view is not None and (view.free_blocks, view.num_choices) == (25, 6)
    book.answered(sent)
    book.left(sent)
    view = book.decode_view(LIMITS, is_open=True)
    assert view is not None and (view.free_blocks, view.num_choices) == (35, 4), "free again, though no report has said it"
    book.reported(decode_report(num_free_blocks=40, num_cached_blocks=20, num_promised_blocks=25, num_running=4), 1.25)
    view = book.decode_view(LIMITS, is_open=True)
    assert view is not None and (view.free_blocks, view.num_choices) == (35, 4) and book.is_empty


def test_an_older_replica_is_known_by_what_was_sent_there() -> None:
    book = ReplicaBook("x")
    book.reported(report("prefill", num_queued_tokens=50, num_queued=1), 1.0)
    book.enter(sent := prompt(0.5, 300, known=200))
    assert queued(book, 1.0) == 300
    book.answered(sent)
    book.left(sent)
    assert queued(book, 1.0) == 50
    decode = ReplicaBook("y")
    decode.reported(report("decode", num_free_blocks=70, num_running=2), 1.0)
    decode.enter(sent := Sent(at_s=0.5, num_blocks=60, num_choices=1))
    view = decode.decode_view(LIMITS, is_open=True)
    assert view is not None and (view.free_blocks, view.num_choices) == (10, 2)
    decode.answered(sent)
    view = decode.decode_view(LIMITS, is_open=True)
    assert view is not None and view.free_blocks == 40, "it landed: the report has it, but not what it was promised"


@given(
    sent=st.lists(st.tuples(st.integers(0, 300), st.integers(1, 500), st.integers(0, 1)), max_size=40),
    reported_ms=st.lists(st.integers(0, 300), min_size=1, max_size=5),
)
def test_gateways_agree_on_all_but_what_was_sent_since(sent: list[tuple[int, int, int]], reported_ms: list[int]) -> None:
    """Two gateways, one replica that computes nothing and reports to both a millisecond later. What may cross a report counts twice."""
    books = [ReplicaBook("p"), ReplicaBook("p")]
    there = told = last_ms = 0
    events = sorted([(ms, 1, tokens, who) for ms, tokens, who in sent] + [(ms, 0, 0, 0) for ms in (0, *reported_ms)])
    for ms, is_sent, tokens, who in events:
        if is_sent:
            books[who].enter(prompt(ms / 1000, tokens))
            there += tokens
            continue
        told, last_ms = there, ms
        for book in books:
            book.reported(prefill_report(num_work_tokens=there), ms / 1000 + 0.001)
    for number, book in enumerate(books):
        own = [(ms, tokens) for ms, tokens, who in sent if who == number]
        since = sum(tokens for ms, tokens in own if ms >= last_ms)
        crossing = sum(tokens for ms, tokens in own if last_ms - 1000 * IN_FLIGHT_S <= ms < last_ms)
        assert told + since <= queued(book, 1.0) <= told + since + crossing


def test_a_batch_is_bounded_by_what_decode_says_and_by_the_configuration() -> None:
    def max_choices(told: int | None) -> int:
        book = ReplicaBook("d")
        book.reported(decode_report(max_choices=told), 1.0)
        view = book.decode_view(LIMITS, is_open=True)
        assert view is not None
        return view.max_choices

    assert [max_choices(told) for told in (None, 1, 3, 99)] == [16, 1, 3, 16]
