"""Owns what a replica's spans tell of its waves: which prompts crossed the layers together, and how long each piece took. Knows no service.

Every leg of a wave records the wave's pieces as events of its span prefill.compute (docs/metrics.md): one leg of each wave is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.engine.arrivals_cases import WaveSeen
from duomo.telemetry.span_file import EventRecord, SpanRecord, read_spans


def waves_in(directory: Path) -> list[WaveSeen]:
    """All waves that computed something, in order of their beginning."""
    legs: dict[int, list[SpanRecord]] = {}
    for span in read_spans(directory):
        if span.name == "prefill.compute":
            legs.setdefault(_number(span, "duomo.wave"), []).append(span)
    if not legs:
        return []
    began_ns = min(span.start_ns for spans in legs.values() for span in spans)
    waves = [_wave(number, spans, began_ns) for number, spans in legs.items()]
    return sorted((wave for wave in waves if wave.piece_s), key=lambda wave: wave.started_s)


def _wave(number: int, spans: Sequence[SpanRecord], began_ns: int) -> WaveSeen:
    whole = max(spans, key=lambda span: len(span.events))  # a leg that was cancelled has seen fewer pieces
    starts = [event.at_ns for event in whole.events if event.name == "group_started"]
    computed = [event for event in whole.events if event.name == "group_computed"]
    pieces = [round((end.at_ns - start) / 1e9, 7) for start, end in zip(starts, computed, strict=False)]
    tokens = sum(_number(span, "duomo.prompt_tokens") - _number(span, "duomo.cached_tokens") for span in spans)
    return WaveSeen(
        wave=number,
        num_prompts=len(spans),
        num_tokens=tokens,
        started_s=round((whole.start_ns - began_ns) / 1e9, 7),
        ended_s=round((whole.end_ns - began_ns) / 1e9, 7),
        piece_s=tuple(pieces),
        piece_groups=tuple(_number(event, "duomo.groups") for event in computed),
    )


def _number(record: SpanRecord | EventRecord, name: str) -> int:
    found = record.attributes[name]
    assert isinstance(found, int), (name, found)
    return found
