"""One trace for each request across three real processes, and parts that add up: delays planted in eight places are found where they are.

Everything is read from outside: span files, an OTLP collector, /metrics, and `duomo trace`.
"""

from __future__ import annotations

import asyncio
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from bench.serve.rest_client import completion_body, post
from duomo.telemetry.span_file import SpanRecord, read_spans

ROOT = Path(__file__).resolve().parents[2]
NUM_GROUPS = 4
NUM_REQUESTS = 9
NUM_TOKENS = 7
PROMPT_TOKENS = 37
CLOCK_READ_NS = 100_000  # each span reads wall and monotonic clock one after the other
SLACK_MS = 35.0  # what a busy machine may add to a part of the least disturbed request; any planted delay is longer
TRACE_ID, CALLER_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CHILDREN = {
    "gateway.tokenize": "gateway",
    "gateway.route": "gateway",
    "prefill.queue": "prefill",
    "prefill.compute": "prefill",
    "kv.handoff": "decode",
    "decode.admit": "decode",
    "decode.first_step": "decode",
    "decode.stream": "decode",
}
DELAYS_S = {
    "gateway_tokenize_s": 0.07,
    "gateway_route_s": 0.11,
    "gateway_emit_s": 0.05,
    "prefill_queue_s": 0.15,
    "prefill_group_s": 0.06,
    "kv_handoff_s": 0.04,  # shorter than a group, so that only the last group's message is exposed
    "decode_admit_s": 0.09,
    "decode_step_s": 0.13,
}
FOUND_S = {
    "ttft": {
        "gateway.tokenize": DELAYS_S["gateway_tokenize_s"],
        "gateway.route": DELAYS_S["gateway_route_s"],
        "prefill.queue": DELAYS_S["prefill_queue_s"],
        "prefill.compute": NUM_GROUPS * DELAYS_S["prefill_group_s"],
        "gateway.emit": DELAYS_S["gateway_emit_s"],
    },
    "second_token": {
        "kv.handoff": DELAYS_S["kv_handoff_s"],
        "decode.admit": DELAYS_S["decode_admit_s"],
        "decode.first_step": DELAYS_S["decode_step_s"],
    },
}


class Collector(http.server.BaseHTTPRequestHandler):
    """Takes OTLP over HTTP, as a collector does."""

    received: list[ExportTraceServiceRequest] = []

    def do_POST(self) -> None:
        request = ExportTraceServiceRequest()
        request.ParseFromString(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/traces":
            self.received.append(request)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def collector() -> Iterator[str]:
    Collector.received.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def prompt(number: int) -> list[int]:
    return [11 + (53 * number + 7 * place * (number + 1)) % 8000 for place in range(PROMPT_TOKENS)]


def ask(system: Any, num_requests: int, num_tokens: int = NUM_TOKENS) -> None:
    """Requests one after another."""

    async def run() -> None:
        for number in range(num_requests):
            result = await post(system.url, "/v1/completions", completion_body(prompt(number), num_tokens))
            assert result.is_done and result.error is None and result.num_tokens == num_tokens, result

    asyncio.run(run())


def ask_with_traceparent(system: Any) -> None:
    headers = f"-HContent-Type: application/json\n-Htraceparent: 00-{TRACE_ID}-{CALLER_ID}-01".split("\n")
    body = json.dumps(completion_body(prompt(77), NUM_TOKENS))
    command = ["curl", "-sS", "--noproxy", "*", "-m", "90", *headers, "-d", body, f"{system.url}/v1/completions"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.stdout.rstrip().endswith("data: [DONE]"), done


def traces_of(system: Any, num_traces: int) -> dict[str, list[SpanRecord]]:
    """Spans by trace, once every one of num_traces has its root and its stream."""
    end_s = time.monotonic() + 60
    while True:
        traces: dict[str, list[SpanRecord]] = {}
        for span in read_spans(system.trace_dir):
            traces.setdefault(span.trace_id, []).append(span)
        whole = [trace for trace in traces.values() if {"gateway.request", "decode.stream"} <= {span.name for span in trace}]
        if len(whole) >= num_traces or time.monotonic() > end_s:
            assert len(traces) == len(whole) == num_traces, (len(traces), len(whole))
            return traces
        time.sleep(0.05)


def number(value: object) -> float:
    """A span's attribute that must be one."""
    assert isinstance(value, int | float), value
    return value


def parts_ms(root: SpanRecord, interval: str) -> dict[str, float]:
    prefix = f"duomo.{interval}."
    return {
        name.removeprefix(prefix).removesuffix("_s"): 1000 * number(value)
        for name, value in root.attributes.items()
        if name.startswith(prefix)
    }


def check_tree(trace: list[SpanRecord], caller_id: str) -> None:
    """Every span once, below the root, each from the process that did the work, in an order that can be."""
    named: dict[str, list[SpanRecord]] = {}
    for span in trace:
        named.setdefault(span.name, []).append(span)
    assert set(named) == {"gateway.request", "kv.push", *CHILDREN}
    assert all(len(spans) == (NUM_GROUPS if name == "kv.push" else 1) for name, spans in named.items()), named
    root = named["gateway.request"][0]
    assert root.parent_id == caller_id and root.role == "gateway"
    pids = {span.role: span.pid for span in trace}
    assert len(set(pids.values())) == 3 and {(span.role, span.pid) for span in trace} == set(pids.items())
    for name, role in CHILDREN.items():
        span = named[name][0]
        assert (span.parent_id, span.role, span.error) == (root.span_id, role, ""), span
        assert root.start_ns - CLOCK_READ_NS <= span.start_ns <= span.end_ns, span
    compute = named["prefill.compute"][0]
    assert {push.parent_id for push in named["kv.push"]} == {compute.span_id}
    for event in ("group_started", "group_computed"):
        pieces = [(number(e.attributes["duomo.group"]), number(e.attributes["duomo.groups"])) for e in compute.events if e.name == event]
        assert [int(lo) + group for lo, groups in pieces for group in range(int(groups))] == list(range(NUM_GROUPS))
    handoff = named["kv.handoff"][0].attributes
    assert handoff["duomo.groups"] == NUM_GROUPS and number(handoff["duomo.messages"]) >= NUM_GROUPS
    assert handoff["duomo.bytes"] == sum(number(push.attributes["duomo.bytes"]) for push in named["kv.push"])
    assert number(handoff["duomo.bytes_per_s"]) > 0 and number(handoff["duomo.exposed_s"]) >= 0
    assert named["decode.stream"][0].attributes["duomo.tokens"] == NUM_TOKENS - 1


def check_sums(roots: list[SpanRecord]) -> None:
    """Parts and unaccounted give the total; the least disturbed of the requests leaves less than max(5 ms, 10%) unaccounted."""
    for interval in ("ttft", "second_token"):
        lost = []
        for root in roots:
            parts = parts_ms(root, interval)
            total_ms = parts.pop("total")
            assert sum(parts.values()) == pytest.approx(total_ms, abs=0.001)
            lost.append(abs(parts["unaccounted"]) / max(5.0, 0.1 * total_ms))
        assert min(lost) <= 1, (interval, lost)


def sample(text: str, name: str, labels: str) -> float:
    found = re.search(rf"^{re.escape(name)}{{{labels}}} ([0-9.e+-]+)$", text, re.MULTILINE)
    assert found, (name, labels)
    return float(found[1])


def check_metrics(text: str) -> None:
    """Each histogram counts each request once."""
    model = 'gen_ai_request_model="tiny-moe"'
    assert sample(text, "gen_ai_server_time_to_first_token_seconds_count", model) == NUM_REQUESTS + 1
    assert sample(text, "gen_ai_server_time_per_output_token_seconds_count", model) == NUM_REQUESTS + 1
    assert sample(text, "gen_ai_server_request_duration_seconds_count", f'error_type="",{model}') == NUM_REQUESTS + 1
    assert sample(text, "duomo_requests_total", 'code="",outcome="ok"') == NUM_REQUESTS + 1
    assert sample(text, "duomo_tokens_total", 'kind="completion"') == (NUM_REQUESTS + 1) * NUM_TOKENS
    assert sample(text, "duomo_tokens_total", 'kind="prompt"') == (NUM_REQUESTS + 1) * PROMPT_TOKENS
    for interval, found in FOUND_S.items():
        assert sample(text, "duomo_unaccounted_seconds_count", f'interval="{interval}"') == NUM_REQUESTS + 1
        for phase in found:
            num = 2 if phase == "gateway.emit" else 1  # it is a part of both intervals
            assert sample(text, "duomo_phase_seconds_count", f'phase="{phase}"') == num * (NUM_REQUESTS + 1)


def check_waterfall(directory: Path, trace: list[SpanRecord]) -> None:
    command = [sys.executable, "-m", "services.cli", "trace", str(directory), "--id", trace[0].trace_id]
    environment = os.environ
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for name in ("gateway.request", "kv.push", *CHILDREN):
        assert re.search(rf"^ *{re.escape(name)} .*\|.*=.*\|", done.stdout, re.MULTILINE), (name, done.stdout)
    assert f"trace {trace[0].trace_id}" in done.stdout and "3 processes" in done.stdout
    assert re.search(r"^time to first token: [0-9.]+ ms$", done.stdout, re.MULTILINE)
    assert re.search(r"^gap to second token: [0-9.]+ ms$", done.stdout, re.MULTILINE)
    assert len(re.findall(r"^  unaccounted +-?[0-9.]+ ms", done.stdout, re.MULTILINE)) == 2


def exported(trace: list[SpanRecord]) -> tuple[dict[str, str], set[str]]:
    """What the collector has of it until now: names by span id, and from which services."""
    names: dict[str, str] = {}
    services: set[str] = set()
    for resource_spans in [spans for request in list(Collector.received) for spans in request.resource_spans]:
        spans = [span for scope in resource_spans.scope_spans for span in scope.spans if span.trace_id.hex() == trace[0].trace_id]
        names |= {span.span_id.hex(): span.name for span in spans}
        if spans:
            services |= {a.value.string_value for a in resource_spans.resource.attributes if a.key == "service.name"}
    return names, services


def check_export(traces: dict[str, list[SpanRecord]]) -> None:
    """The collector has the same spans as the files, from three services: of every trace none but these, and all of one at the least.

    What it does not take in half a second is dropped, since nobody waits for a collector; here it is a thread of this process.
    """
    end_s = time.monotonic() + 60
    services = {"duomo-gateway", "duomo-prefill", "duomo-decode"}
    wanted = {trace_id: {span.span_id: span.name for span in trace} for trace_id, trace in traces.items()}
    while not any(exported(trace) == (wanted[trace_id], services) for trace_id, trace in traces.items()):
        assert time.monotonic() < end_s, [(wanted[trace_id], exported(trace)) for trace_id, trace in traces.items()]
        time.sleep(0.1)
    assert all(exported(trace)[0].items() <= wanted[trace_id].items() for trace_id, trace in traces.items())


def test_one_trace_a_request_whose_parts_add_up(replica_system: Any, collector: str) -> None:
    """Span files, a collector, the metrics and the waterfall of the same ten requests; the last of them has a traceparent."""
    system = replica_system(**{"tracing.otlp_endpoint": collector, "wire.heartbeat_s": 0.2})
    ask(system, NUM_REQUESTS)
    ask_with_traceparent(system)
    system.assert_quiet()
    traces = traces_of(system, NUM_REQUESTS + 1)
    for trace_id, trace in traces.items():
        check_tree(trace, CALLER_ID if trace_id == TRACE_ID else "")
    check_sums([span for trace in traces.values() for span in trace if span.name == "gateway.request"])
    check_metrics(system.get("/metrics")[1].decode())
    check_waterfall(system.trace_dir, traces[TRACE_ID])
    check_export(traces)


def test_a_delay_in_each_of_eight_places_is_found_there_and_nowhere_else(replica_system: Any) -> None:
    """All eight at once, of different lengths; each part grows by its own, the others by nothing.

    The least of a few requests: what a busy machine adds is never negative. `wire` and `unaccounted` may be: theirs is the one nearest 0.
    """
    delayed = replica_system(**{"wire.heartbeat_s": 0.2} | {f"delays.{place}": delay_s for place, delay_s in DELAYS_S.items()})
    ask(delayed, 5, num_tokens=3)
    roots = [span for trace in traces_of(delayed, 5).values() for span in trace if span.name == "gateway.request"]
    own_ms = {"prefill.compute": 60.0, "decode.first_step": 25.0}  # what the work itself may take beside that
    for interval, found_s in FOUND_S.items():
        parts = [parts_ms(root, interval) for root in roots]
        for part in set(parts[0]) - {"total"}:
            values = [one[part] for one in parts]
            delay_ms = 1000 * found_s.get(part, 0.0)
            if part in found_s:
                assert delay_ms - 2 <= min(values) <= delay_ms + SLACK_MS + own_ms.get(part, 0.0), (interval, part, values)
            else:
                assert min(map(abs, values)) < SLACK_MS, (interval, part, values)
    assert all(1000 * delay_s > SLACK_MS for delay_s in DELAYS_S.values()) and len(set(DELAYS_S.values())) == len(DELAYS_S) == 8
    check_sums(roots)
