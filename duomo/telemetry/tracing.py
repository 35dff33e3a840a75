"""Spans: one trace for each request across all processes. Owns this process' OpenTelemetry provider; knows no service.

The provider is never made global (Ray has one). Times given are monotonic seconds of this process, as everywhere in Duomo: spans may
be recorded after the fact from timestamps already measured. Span names and the timestamps they mean stand in docs/metrics.md.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Final, Self

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased
from opentelemetry.trace import NonRecordingSpan, SpanContext, Status, StatusCode, TraceFlags, set_span_in_context
from opentelemetry.trace import Span as OtelSpan

from duomo.config import TracingSection
from duomo.errors import DuomoError
from duomo.telemetry.span_file import SpanFile
from duomo.wire.trace import TraceContext, format_traceparent, parse_traceparent

AttributeValue = str | bool | int | float | Sequence[str] | Sequence[int] | Sequence[float]
Attributes = Mapping[str, AttributeValue]

_EXPORT_TIMEOUT_S: Final = 0.5
_EXPORT_DELAY_MS: Final = 500
_EXPORT_QUEUE_SPANS: Final = 8192
_EXPORT_BATCH_SPANS: Final = 1024
_CLOCK_READS: Final = 8
_CLOCK_READ_NS: Final = 20_000  # reading three clocks takes a tenth of it where nothing comes between
_SHUTDOWN_S: Final = 0.8  # a collector that does not answer must not hold up the end of a process


class Span:
    """A span in progress, ended by who started it (`with`, or end() in a finally). Unrecorded spans cost next to nothing.

    traceparent: what to send along so that other processes' spans hang below this one; "" when there is no trace.
    """

    __slots__ = ("_open", "_otel", "_wall_minus_monotonic_ns", "traceparent")

    def __init__(self, otel: OtelSpan | None, traceparent: str, wall_minus_monotonic_ns: int, open_spans: set[OtelSpan]) -> None:
        self._otel = otel
        self.traceparent = traceparent
        self._wall_minus_monotonic_ns = wall_minus_monotonic_ns
        self._open = open_spans

    @property
    def is_recording(self) -> bool:
        return self._otel is not None

    def set(self, attributes: Attributes) -> None:
        """Add attributes. Never prompt or completion text."""
        if self._otel is not None:
            self._otel.set_attributes(attributes)

    def event(self, name: str, attributes: Attributes | None = None, *, at_s: float | None = None) -> None:
        """Something that happened within the span, now or at the monotonic time at_s."""
        if self._otel is not None:
            self._otel.add_event(name, attributes, self._wall_ns(at_s))

    def fail(self, error: DuomoError) -> None:
        """Mark the span as failed with an error's code and phase. Not its detail: a refusal's quotes what the client sent."""
        if self._otel is not None:
            self._otel.set_attributes({"error.type": error.code, "duomo.phase": error.phase, "duomo.retryable": error.retryable})
            self._otel.set_status(Status(StatusCode.ERROR, error.code))

    def end(self, *, at_s: float | None = None) -> None:
        """End now or at the monotonic time at_s; a second end does nothing."""
        if self._otel is not None and self._otel in self._open:
            self._open.discard(self._otel)
            self._otel.end(self._wall_ns(at_s))

    def _wall_ns(self, at_s: float | None) -> int:
        at_ns = time.monotonic_ns() if at_s is None else int(at_s * 1e9)
        return at_ns + self._wall_minus_monotonic_ns

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, DuomoError):
            self.fail(error)
        elif kind is not None and self._otel is not None:
            self._otel.set_attribute("error.type", kind.__name__)
            self._otel.set_status(Status(StatusCode.ERROR))
        self.end()


class Tracing:
    """This process' spans. Made by `configure`, shut down by who made it. Thread-safe."""

    def __init__(self, provider: TracerProvider | None) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("duomo") if provider is not None else None
        self._open: set[OtelSpan] = set()

    @property
    def is_on(self) -> bool:
        return self._tracer is not None

    def start_span(
        self, name: str, parent: str | None = None, attributes: Attributes | None = None, *, start_s: float | None = None
    ) -> Span:
        """Start a span below `parent` (a traceparent; None, empty or malformed: a new trace), now or at the monotonic time start_s.

        A parent that is not sampled gives a span that is not recorded and hands the parent on.
        """
        if self._tracer is None:
            return Span(None, parent or "", 0, self._open)
        above = parse_traceparent(parent) if parent else None
        if above is not None and not above.is_sampled:
            return Span(None, parent or "", 0, self._open)
        wall_minus_monotonic_ns = _wall_minus_monotonic_ns()
        start_ns = None if start_s is None else int(start_s * 1e9) + wall_minus_monotonic_ns
        otel = self._tracer.start_span(name, _below(above), attributes=attributes, start_time=start_ns)
        self._open.add(otel)
        own = otel.get_span_context()
        return Span(otel, format_traceparent(TraceContext(trace_id=own.trace_id, span_id=own.span_id)), wall_minus_monotonic_ns, self._open)

    def record_span(self, name: str, parent: str | None, start_s: float, end_s: float, attributes: Attributes | None = None) -> None:
        """A whole span after the fact, from monotonic times already measured."""
        if self._tracer is not None:
            self.start_span(name, parent, attributes, start_s=start_s).end(at_s=end_s)

    def num_open_spans(self) -> int:
        return len(self._open)

    def shutdown(self) -> None:
        """Export what is left, within a second whatever the collector does. Spans still open are lost."""
        if self._provider is None:
            return
        ending = threading.Thread(target=self._provider.shutdown, name="span-shutdown", daemon=True)
        ending.start()
        ending.join(_SHUTDOWN_S)
        self._tracer = None


def configure(section: TracingSection, service_name: str, role: str = "", replica_id: str = "") -> Tracing:
    """The spans of this process; nothing is recorded unless the section names an endpoint or a directory.

    service_name: OpenTelemetry's service.name ("duomo-prefill"). role, replica_id: on every span's resource and in the file's name.
    """
    processors: list[SpanProcessor] = []
    instance = replica_id or f"{service_name}-{os.getpid()}"
    resource: dict[str, str | int] = {
        "service.name": service_name,
        "service.namespace": section.service_namespace,
        "service.instance.id": instance,
        "duomo.role": role or service_name,
        "process.pid": os.getpid(),
    }
    if section.directory is not None:
        processors.append(SpanFile(section.directory, instance))
    if section.otlp_endpoint:
        processors.append(_otlp(section.otlp_endpoint))
    if not processors:
        return Tracing(None)
    provider = TracerProvider(sampler=ParentBased(ALWAYS_ON), resource=Resource(resource), shutdown_on_exit=False)
    for processor in processors:
        provider.add_span_processor(processor)
    return Tracing(provider)


def _otlp(endpoint: str) -> SpanProcessor:
    """Batches to `endpoint`/v1/traces. The exporter is imported here: it is slow to import, and off by default."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    exporter = OTLPSpanExporter(endpoint=endpoint.rstrip("/") + "/v1/traces", timeout=_EXPORT_TIMEOUT_S)
    return BatchSpanProcessor(
        exporter,
        max_queue_size=_EXPORT_QUEUE_SPANS,
        schedule_delay_millis=_EXPORT_DELAY_MS,
        max_export_batch_size=_EXPORT_BATCH_SPANS,
    )


def _wall_minus_monotonic_ns() -> int:
    """Of this moment. Read again where something came between the clocks: a span would stand as far from its place as that took."""
    least_ns, offset_ns = -1, 0
    for _ in range(_CLOCK_READS):
        before_ns = time.monotonic_ns()
        wall_ns = time.time_ns()
        took_ns = time.monotonic_ns() - before_ns
        if least_ns < 0 or took_ns < least_ns:
            least_ns, offset_ns = took_ns, wall_ns - before_ns - took_ns // 2
        if took_ns < _CLOCK_READ_NS:
            break
    return offset_ns


def _below(above: TraceContext | None) -> Context:
    """An explicit context: the caller's ambient one (Ray's, a client library's) is never looked at."""
    if above is None:
        return Context()
    span_context = SpanContext(above.trace_id, above.span_id, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))
    return set_span_in_context(NonRecordingSpan(span_context), Context())
