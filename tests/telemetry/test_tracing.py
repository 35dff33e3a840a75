"""Spans: what is recorded, below whom, when, and that nothing is paid or exported unasked."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from opentelemetry import trace as global_trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from duomo.config import TracingSection
from duomo.errors import CapacityError
from duomo.telemetry.span_file import SpanRecord, read_spans
from duomo.telemetry.tracing import Tracing, configure
from duomo.wire.trace import parse_traceparent

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-03"


def to_file(folder: Path, replica_id: str = "router-0") -> Tracing:
    return configure(TracingSection(directory=folder), "duomo-gateway", "gateway", replica_id)


def by_name(folder: Path) -> dict[str, SpanRecord]:
    return {span.name: span for span in read_spans(folder)}


def test_spans_hang_below_the_traceparent_that_came_and_hand_on_their_own(tmp_path: Path) -> None:
    tracing = to_file(tmp_path)
    with tracing.start_span("gateway.request", PARENT, {"num_tokens": 63}) as root:
        tracing.start_span("gateway.route", root.traceparent).end()
    spans = by_name(tmp_path)
    request, route = spans["gateway.request"], spans["gateway.route"]
    assert (request.trace_id, request.parent_id) == ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331")
    assert (route.trace_id, route.parent_id) == (request.trace_id, request.span_id)
    assert request.attributes == {"num_tokens": 63}
    assert (request.role, request.instance) == ("gateway", "router-0")
    own = parse_traceparent(root.traceparent)
    assert own is not None and own.is_sampled and f"{own.span_id:016x}" == request.span_id


@pytest.mark.parametrize("parent", [None, "", "garbage", "00-" + "0" * 32 + "-b7ad6b7169203331-01"])
def test_without_a_proper_parent_a_new_trace_starts(parent: str | None, tmp_path: Path) -> None:
    tracing = to_file(tmp_path)
    first, second = tracing.start_span("gateway.request", parent), tracing.start_span("gateway.request", parent)
    assert first.traceparent[3:35] != second.traceparent[3:35]
    first.end()
    assert by_name(tmp_path)["gateway.request"].parent_id == ""


def test_an_unsampled_parent_is_handed_on_and_nothing_is_recorded(tmp_path: Path) -> None:
    tracing = to_file(tmp_path)
    unsampled = PARENT[:-2] + "02"
    with tracing.start_span("gateway.request", unsampled) as span:
        assert span.traceparent == unsampled and not span.is_recording
        assert tracing.num_open_spans() == 0
    assert read_spans(tmp_path) == []


def test_a_pause_between_two_clocks_moves_no_span(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two times this process stands still for a second before the wall clock is read, and for one after it."""
    offset_ns, now_ns, reads = 10**18, 5 * 10**9, 0

    def wall_ns() -> int:
        nonlocal now_ns, reads
        reads += 1
        pause_ns = 10**9 if reads <= 2 else 0
        now_ns += 2 * pause_ns
        return now_ns - pause_ns + offset_ns

    tracing = to_file(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("duomo.telemetry.tracing.time.time_ns", wall_ns)
        patched.setattr("duomo.telemetry.tracing.time.monotonic_ns", lambda: now_ns)
        tracing.record_span("prefill.queue", PARENT, 2.0, 2.5)
    (queue,) = read_spans(tmp_path)
    assert reads == 3 and (queue.start_ns, queue.end_ns) == (offset_ns + 2 * 10**9, offset_ns + 25 * 10**8)


def test_measured_times_become_spans_and_events(tmp_path: Path) -> None:
    tracing = to_file(tmp_path)
    now_s, wall_ns = time.monotonic(), time.time_ns()  # a machine that stands still between the two makes them differ
    tracing.record_span("prefill.queue", PARENT, now_s - 2.0, now_s - 1.5, {"wave": 1})
    span = tracing.start_span("prefill.compute", PARENT, start_s=now_s - 1.5)
    span.event("group_computed", {"group": 0}, at_s=now_s - 1.25)
    span.end(at_s=now_s - 1.0)
    span.end(at_s=now_s)  # a second end is nothing
    queue, compute = read_spans(tmp_path)
    assert queue.end_ns - queue.start_ns == pytest.approx(5e8, abs=1e3)
    assert compute.end_ns - compute.start_ns == pytest.approx(5e8, abs=1e3)
    assert compute.events[0].name == "group_computed" and compute.events[0].attributes == {"group": 0}
    assert compute.events[0].at_ns - compute.start_ns == pytest.approx(2.5e8, abs=1e3)
    assert queue.start_ns == pytest.approx(wall_ns - 2e9, abs=60e9)


def test_open_spans_are_counted_until_they_end(tmp_path: Path) -> None:
    tracing = to_file(tmp_path)
    spans = [tracing.start_span("decode.stream", PARENT) for _ in range(7)]
    assert tracing.num_open_spans() == 7
    for span in spans[:3]:
        span.end()
        span.end()
    assert tracing.num_open_spans() == 4
    for span in spans:
        span.end()
    assert tracing.num_open_spans() == 0


def test_a_span_that_fails_says_why(tmp_path: Path) -> None:
    tracing = to_file(tmp_path)
    with pytest.raises(CapacityError), tracing.start_span("gateway.route"):
        raise CapacityError("no decode replica has room", code="decode_full")
    with pytest.raises(ZeroDivisionError), tracing.start_span("gateway.tokenize"):
        raise ZeroDivisionError("the user's text")
    spans = by_name(tmp_path)
    assert spans["gateway.route"].error == "decode_full"
    assert spans["gateway.route"].attributes["duomo.phase"] == "route"
    assert spans["gateway.tokenize"].error == "ZeroDivisionError"
    assert "the user's text" not in "".join(file.read_text() for file in tmp_path.iterdir())


def test_off_means_nothing_but_the_parent_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def paid(*_: object) -> None:
        raise AssertionError("a request that nobody traces pays for it")

    tracing = configure(TracingSection(), "duomo-gateway")
    assert not tracing.is_on
    for name in ("parse_traceparent", "format_traceparent", "_below"):
        monkeypatch.setattr(f"duomo.telemetry.tracing.{name}", paid)
    with tracing.start_span("gateway.request", PARENT, {"a": 1}) as span:
        span.event("e")
        assert span.traceparent == PARENT and tracing.num_open_spans() == 0
        assert not span.is_recording
    tracing.record_span("prefill.queue", PARENT, 1.0, 2.0)
    tracing.shutdown()


def test_the_global_provider_stays_as_it_was(tmp_path: Path) -> None:
    before = global_trace.get_tracer_provider()
    tracing = to_file(tmp_path)
    with tracing.start_span("gateway.request"):
        assert global_trace.get_current_span().get_span_context().trace_id == 0
    tracing.shutdown()
    assert global_trace.get_tracer_provider() is before


KILLED = """
import os, signal, sys
from pathlib import Path
from duomo.config import TracingSection
from duomo.telemetry.tracing import configure
tracing = configure(TracingSection(directory=Path(sys.argv[1])), "duomo-decode", "decode", "decode-0")
for _ in range(257):
    tracing.start_span("decode.stream").end()
tracing.start_span("decode.admit")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_loses_only_its_open_spans(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], timeout=60, check=False)
    spans = read_spans(tmp_path)
    assert len(spans) == 257 and {span.name for span in spans} == {"decode.stream"}
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-5])  # what a full disk would leave
    assert len(read_spans(tmp_path)) == 256


class Collector(http.server.BaseHTTPRequestHandler):
    """Takes OTLP over HTTP, as a collector does."""

    received: list[ExportTraceServiceRequest] = []

    def do_POST(self) -> None:
        assert self.path == "/v1/traces"
        request = ExportTraceServiceRequest()
        request.ParseFromString(self.rfile.read(int(self.headers["Content-Length"])))
        self.received.append(request)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Quiet."""


def test_spans_reach_an_otlp_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    Collector.received.clear()
    for name in ("_EXPORT_TIMEOUT_S", "_SHUTDOWN_S"):  # this collector answers, if a busy machine lets it
        monkeypatch.setattr(f"duomo.telemetry.tracing.{name}", 60.0)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    tracing = configure(TracingSection(otlp_endpoint=f"http://127.0.0.1:{server.server_port}/"), "duomo-prefill", "prefill", "prefill-0")
    with tracing.start_span("prefill.compute", PARENT):
        pass
    tracing.shutdown()
    server.shutdown()
    server.server_close()
    (resource_spans,) = [spans for request in Collector.received for spans in request.resource_spans]
    attributes = {attribute.key: attribute.value.string_value for attribute in resource_spans.resource.attributes}
    assert attributes["service.name"] == "duomo-prefill" and attributes["service.instance.id"] == "prefill-0"
    (span,) = resource_spans.scope_spans[0].spans
    assert span.name == "prefill.compute" and span.trace_id.hex() == PARENT[3:35]


def test_shutdown_without_a_collector_waits_less_than_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float | None] = []
    join = threading.Thread.join

    def noted(thread: threading.Thread, timeout: float | None = None) -> None:
        if thread.name == "span-shutdown":
            waited.append(timeout)
        join(thread, timeout)

    monkeypatch.setattr(threading.Thread, "join", noted)
    mute = http.server.HTTPServer(("127.0.0.1", 0), Collector)  # accepts, never answers
    for endpoint in ("http://127.0.0.1:9", f"http://127.0.0.1:{mute.server_port}"):
        tracing = configure(TracingSection(otlp_endpoint=endpoint), "duomo-prefill")
        for _ in range(63):
            tracing.start_span("prefill.compute").end()
        tracing.shutdown()
    assert len(waited) == 2 and all(limit_s is not None and limit_s < 1.0 for limit_s in waited)
    mute.server_close()
