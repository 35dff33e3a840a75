"""traceparent: W3C's rules, flags as a bit field."""

from __future__ import annotations

import pytest

from duomo.wire.trace import TraceContext, format_traceparent, parse_traceparent

IDS = "0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331"
CONTEXT = TraceContext(trace_id=0x0AF7651916CD43DD8448EB211C80319C, span_id=0xB7AD6B7169203331)


@pytest.mark.parametrize("flags", ["01", "03", "ff", "09"])
def test_the_sampled_bit_is_what_counts(flags: str) -> None:
    assert parse_traceparent(f"00-{IDS}-{flags}") == CONTEXT


@pytest.mark.parametrize("flags", ["00", "02", "fe"])
def test_an_unsampled_parent_is_known_as_such(flags: str) -> None:
    context = parse_traceparent(f"00-{IDS}-{flags}")
    assert context is not None and not context.is_sampled
    assert format_traceparent(context) == f"00-{IDS}-00"


def test_a_later_version_may_have_more_parts() -> None:
    assert parse_traceparent(f"01-{IDS}-01-what-comes-later") == CONTEXT
    assert parse_traceparent(f"00-{IDS}-01-not-in-version-0") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "00",
        f"00-{IDS}",
        f"00-{IDS}-1",
        f"ff-{IDS}-01",
        f"00-{IDS.upper()}-01",
        f"00-{'0' * 32}-b7ad6b7169203331-01",
        f"00-0af7651916cd43dd8448eb211c80319c-{'0' * 16}-01",
        f"00-{IDS}-01\n00-{IDS}-01",
    ],
)
def test_what_is_malformed_starts_a_new_trace(text: str) -> None:
    assert parse_traceparent(text) is None


def test_what_is_written_is_read_back() -> None:
    assert parse_traceparent(format_traceparent(CONTEXT)) == CONTEXT
    small = TraceContext(trace_id=1, span_id=2)
    assert format_traceparent(small) == "00-00000000000000000000000000000001-0000000000000002-01"
    assert parse_traceparent(format_traceparent(small)) == small
