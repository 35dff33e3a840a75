"""Spans as JSON lines, one file for each process: written when a span ends, read back for `duomo trace`. Knows no service.

Each line is written whole by one write(2) in append mode, so that a killed process loses only its open spans.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import msgspec
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor

AttributeValue = str | bool | int | float | tuple[str | bool | int | float, ...]


class EventRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened within a span, at wall-clock nanoseconds."""

    name: str
    at_ns: int
    attributes: dict[str, AttributeValue] = {}


class SpanRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One line: one ended span. Ids are hex, parent_id "" at the root; times are wall-clock nanoseconds."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    start_ns: int
    end_ns: int
    role: str
    instance: str
    pid: int
    error: str = ""
    attributes: dict[str, AttributeValue] = {}
    events: tuple[EventRecord, ...] = ()


class SpanFile(SpanProcessor):
    """Writes every ended span to `directory`/spans-<instance>-<pid>.jsonl. Owns the open file."""

    def __init__(self, directory: Path, instance: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        safe = re.sub(r"[^A-Za-z0-9._-]", "_", instance)
        self.path = directory / f"spans-{safe}-{os.getpid()}.jsonl"
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._encoder = msgspec.json.Encoder()

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """Nothing: a span is written when it ends."""

    def on_end(self, span: ReadableSpan) -> None:
        if self._file >= 0:
            os.write(self._file, self._encoder.encode(_record(span)) + b"\n")

    def shutdown(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def force_flush(self, timeout_millis: int = 0) -> bool:
        return True


def read_spans(directory: Path) -> list[SpanRecord]:
    """All spans of all files in `directory`, oldest first; a last line cut short by a kill is left out."""
    decoder = msgspec.json.Decoder(SpanRecord)
    spans: list[SpanRecord] = []
    for file in sorted(directory.glob("spans-*.jsonl")):
        *lines, _cut = file.read_bytes().split(b"\n")
        spans += [decoder.decode(line) for line in lines if line]
    return sorted(spans, key=lambda span: (span.start_ns, -span.end_ns))


def _record(span: ReadableSpan) -> SpanRecord:
    context = span.context
    assert context is not None and span.start_time is not None and span.end_time is not None
    resource = span.resource.attributes
    return SpanRecord(
        trace_id=f"{context.trace_id:032x}",
        span_id=f"{context.span_id:016x}",
        parent_id=f"{span.parent.span_id:016x}" if span.parent is not None else "",
        name=span.name,
        start_ns=span.start_time,
        end_ns=span.end_time,
        role=str(resource.get("duomo.role", "")),
        instance=str(resource.get("service.instance.id", "")),
        pid=os.getpid(),
        error=str((span.attributes or {}).get("error.type", "")),
        attributes=_plain(span.attributes),
        events=tuple(EventRecord(name=event.name, at_ns=event.timestamp, attributes=_plain(event.attributes)) for event in span.events),
    )


def _plain(attributes: Mapping[str, object] | None) -> dict[str, AttributeValue]:
    """OpenTelemetry allows more kinds of values than we record; any other is written as text."""
    plain: dict[str, AttributeValue] = {}
    for name, value in (attributes or {}).items():
        if isinstance(value, tuple | list):
            plain[name] = tuple(item if isinstance(item, str | bool | int | float) else str(item) for item in value)
        else:
            plain[name] = value if isinstance(value, str | bool | int | float) else str(value)
    return plain
