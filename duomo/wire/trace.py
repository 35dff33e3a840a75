"""W3C trace context on the wire: the traceparent string, parsed and written. Knows no tracer and no span."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_SAMPLED_BIT: Final = 0x01
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceContext:
    """Where a span hangs. trace_id: 128 bits, span_id: 64 bits, neither zero."""

    trace_id: int
    span_id: int
    is_sampled: bool = True


def parse_traceparent(text: str) -> TraceContext | None:
    """The context in a traceparent header, or None where it is empty or malformed (then a new trace starts, as W3C asks).

    https://www.w3.org/TR/trace-context/: flags are a bit field ("03" is sampled too); versions after 00 may have more parts.
    """
    match = _TRACEPARENT.fullmatch(text.strip())
    if match is None:
        return None
    version, trace_id, span_id, flags, rest = match.groups()
    if version == "ff" or (version == "00" and rest is not None):
        return None
    if int(trace_id, 16) == 0 or int(span_id, 16) == 0:
        return None
    return TraceContext(trace_id=int(trace_id, 16), span_id=int(span_id, 16), is_sampled=bool(int(flags, 16) & _SAMPLED_BIT))


def format_traceparent(context: TraceContext) -> str:
    """The traceparent string (version 00) of a context."""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{_SAMPLED_BIT if context.is_sampled else 0:02x}"
