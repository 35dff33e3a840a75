"""A trace drawn as text: the spans of one request, of all processes, on one time line. Knows span files, no service.

Bars are to scale; events (a layer group pushed) are marks on a bar. Below stand the parts that the gateway recorded on its root span as
attributes `duomo.ttft.<part>_s` and `duomo.second_token.<part>_s`, `unaccounted` last.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Final

from duomo.errors import ConfigError
from duomo.telemetry.parts import Parts
from duomo.telemetry.span_file import SpanRecord, read_spans

ROOT_SPAN: Final = "gateway.request"
_INTERVALS: Final = (("ttft", "time to first token"), ("second_token", "gap to second token"))
_BAR_COLUMNS: Final = 60


def part_attributes(interval: str, parts: Parts) -> dict[str, float]:
    """The root span's attributes that carry a request's parts; interval is "ttft" or "second_token"."""
    named = {f"duomo.{interval}.{part}_s": part_s for part, part_s in parts.with_unaccounted().items()}
    return named | {f"duomo.{interval}.total_s": parts.total_s}


def render_waterfall(directory: Path, trace_id: str | None = None) -> str:
    """One trace of the span files in `directory`: trace_id may be a prefix; None takes the newest trace.

    Raises ConfigError where there is no such trace.
    """
    spans = _choose(read_spans(directory), directory, trace_id)
    start_ns, end_ns = min(span.start_ns for span in spans), max(span.end_ns for span in spans)
    depths = _depths(spans)
    names = [f"{'  ' * depths[span.span_id]}{span.name}" for span in spans]
    processes = [f"{span.instance}" for span in spans]
    name_width, process_width = max(map(len, names)), max(map(len, processes))
    lines = [
        f"trace {spans[0].trace_id}: {(end_ns - start_ns) / 1e6:.1f} ms, {len(spans)} spans, "
        f"{len({(span.instance, span.pid) for span in spans})} processes"
    ]
    for name, process, span in zip(names, processes, spans, strict=True):
        offset_ms, length_ms = (span.start_ns - start_ns) / 1e6, (span.end_ns - span.start_ns) / 1e6
        bar = _bar(span, start_ns, end_ns)
        error = f"  ! {span.error}" if span.error else ""
        lines.append(f"{name:<{name_width}}  {process:<{process_width}}  {offset_ms:>9.2f} +{length_ms:>9.2f} ms |{bar}|{error}")
    for interval, title in _INTERVALS:
        lines += _part_lines(spans, interval, title)
    return "\n".join(lines) + "\n"


def _choose(spans: list[SpanRecord], directory: Path, trace_id: str | None) -> list[SpanRecord]:
    if trace_id is None:
        roots = [span for span in spans if span.name == ROOT_SPAN] or spans
        if not roots:
            raise ConfigError(f"no spans in {directory}: set tracing.directory to it and send a request")
        trace_id = max(roots, key=lambda span: span.start_ns).trace_id
    found = Counter(span.trace_id for span in spans if span.trace_id.startswith(trace_id.lower()))
    if len(found) != 1:
        raise ConfigError(f"{len(found)} traces in {directory} begin with {trace_id!r}; one is needed")
    return _in_tree_order([span for span in spans if span.trace_id in found])


def _in_tree_order(spans: list[SpanRecord]) -> list[SpanRecord]:
    """Parents before their children, siblings by start; a span whose parent was never written counts as a root."""
    known = {span.span_id for span in spans}
    children: dict[str, list[SpanRecord]] = {}
    for span in spans:
        children.setdefault(span.parent_id if span.parent_id in known else "", []).append(span)
    ordered: list[SpanRecord] = []
    waiting = children.get("", [])[::-1]
    while waiting:
        ordered.append(waiting.pop())
        waiting += children.get(ordered[-1].span_id, [])[::-1]
    return ordered


def _depths(spans: list[SpanRecord]) -> dict[str, int]:
    depths: dict[str, int] = {}
    for span in spans:
        depths[span.span_id] = depths.get(span.parent_id, -1) + 1
    return depths


def _bar(span: SpanRecord, start_ns: int, end_ns: int) -> str:
    scale = _BAR_COLUMNS / max(end_ns - start_ns, 1)
    first = min(round((span.start_ns - start_ns) * scale), _BAR_COLUMNS - 1)
    last = min(max(round((span.end_ns - start_ns) * scale), first + 1), _BAR_COLUMNS)
    cells = [" "] * first + ["="] * (last - first) + [" "] * (_BAR_COLUMNS - last)
    for event in span.events:
        cells[min(max(round((event.at_ns - start_ns) * scale), 0), _BAR_COLUMNS - 1)] = "|"
    return "".join(cells)


def _part_lines(spans: list[SpanRecord], interval: str, title: str) -> list[str]:
    prefix = f"duomo.{interval}."
    for span in spans:
        total_s = span.attributes.get(f"{prefix}total_s")
        if isinstance(total_s, float):
            parts = {
                name.removeprefix(prefix).removesuffix("_s"): value for name, value in span.attributes.items() if name.startswith(prefix)
            }
            lines = [f"{title}: {total_s * 1e3:.2f} ms"]
            for name, value in parts.items():
                if name != "total" and isinstance(value, float):
                    lines.append(f"  {name:<18} {value * 1e3:>9.2f} ms  {100 * value / total_s if total_s else 0:>5.1f}%")
            return lines
    return []
