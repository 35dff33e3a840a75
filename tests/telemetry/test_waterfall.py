"""A trace of several processes, drawn."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from duomo.config import TracingSection
from duomo.errors import ConfigError
from duomo.telemetry.parts import Parts
from duomo.telemetry.tracing import configure
from duomo.telemetry.waterfall import part_attributes, render_waterfall

TTFT = Parts(total_s=0.050, parts_s=(("gateway.tokenize", 0.010), ("prefill.compute", 0.0395)))


def write_trace(folder: Path, start_s: float) -> str:
    """One request over three processes: 100 ms, of which P computes from 10 to 50 in two groups and D streams from 60 to 100."""
    gateway, prefill, decode = (
        configure(TracingSection(directory=folder), f"duomo-{role}", role, f"{role}-0") for role in ("gateway", "prefill", "decode")
    )
    root = gateway.start_span("gateway.request", start_s=start_s)
    gateway.record_span("gateway.tokenize", root.traceparent, start_s, start_s + 0.010)
    compute = prefill.start_span("prefill.compute", root.traceparent, start_s=start_s + 0.010)
    compute.event("group_computed", at_s=start_s + 0.030)
    compute.end(at_s=start_s + 0.050)
    decode.record_span("decode.stream", root.traceparent, start_s + 0.060, start_s + 0.100)
    root.set(part_attributes("ttft", TTFT))
    root.end(at_s=start_s + 0.100)
    for tracing in (gateway, prefill, decode):
        tracing.shutdown()
    return root.traceparent[3:35]


def test_spans_of_all_processes_stand_on_one_time_line(tmp_path: Path) -> None:
    trace_id = write_trace(tmp_path, time.monotonic() - 1)
    head, *lines = render_waterfall(tmp_path, trace_id).splitlines()
    assert trace_id in head and "100.0 ms, 4 spans, 3 processes" in head
    assert [line.split()[0] for line in lines[:4]] == ["gateway.request", "gateway.tokenize", "prefill.compute", "decode.stream"]
    assert [line.split()[1] for line in lines[:4]] == ["gateway-0", "gateway-0", "prefill-0", "decode-0"]
    assert lines[1].startswith("  gateway.tokenize")
    bars = [line.partition("|")[2] for line in lines[:4]]
    assert len({len(bar) for bar in bars}) == 1
    assert bars[0].startswith("=" * 60)
    assert bars[3].count("=") == pytest.approx(24, abs=1) and bars[3].startswith(" " * 35)
    assert bars[2].index("|") == pytest.approx(18, abs=1), "the group's event stands at 30 of 100 ms"


def test_parts_stand_below_with_what_is_unaccounted(tmp_path: Path) -> None:
    write_trace(tmp_path, time.monotonic() - 1)
    text = render_waterfall(tmp_path)
    tail = text[text.index("time to first token") :].splitlines()
    assert tail[0] == "time to first token: 50.00 ms"
    assert [line.split() for line in tail[1:]] == [
        ["gateway.tokenize", "10.00", "ms", "20.0%"],
        ["prefill.compute", "39.50", "ms", "79.0%"],
        ["unaccounted", "0.50", "ms", "1.0%"],
    ]


def test_without_an_id_the_newest_trace_is_drawn_and_a_prefix_is_enough(tmp_path: Path) -> None:
    now_s = time.monotonic()
    older, newer = write_trace(tmp_path, now_s - 5), write_trace(tmp_path, now_s - 1)
    assert newer in render_waterfall(tmp_path)
    assert older in render_waterfall(tmp_path, older[:12])


def test_a_span_whose_parent_was_lost_is_still_drawn(tmp_path: Path) -> None:
    decode = configure(TracingSection(directory=tmp_path), "duomo-decode", "decode", "decode-0")
    decode.record_span("decode.stream", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", 1.0, 1.0)
    assert "decode.stream" in render_waterfall(tmp_path)


def test_no_such_trace_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no spans in"):
        render_waterfall(tmp_path)
    write_trace(tmp_path, time.monotonic())
    with pytest.raises(ConfigError, match="'zz'"):
        render_waterfall(tmp_path, "zz")
    with pytest.raises(ConfigError, match="no spans in"):
        render_waterfall(tmp_path / "missing")
