"""Owns what `duomo bench prefill` measures of an engine alone, in order of worth: prompts by length, waves, ways. Knows no engine."""

from __future__ import annotations

from bench.engine.engine_cases import EngineCase, Routing, Way

LONG_TOKENS = 8192  # of the prompt that all ways compute


def _prefill(tokens: int, batch: int = 1, way: Way = "whole", routing: Routing = "drawn") -> EngineCase:
    return EngineCase(phase="prefill", batch=batch, tokens=tokens, way=way, routing=routing)


ALL_WAYS: tuple[Way, ...] = ("layered", "chunked", "whole")
ROUTINGS: tuple[Routing, ...] = ("spread", "drawn")
WAYS = tuple(_prefill(LONG_TOKENS, way=way, routing=routing) for routing in ROUTINGS for way in ALL_WAYS)
PREFILL_CASES: tuple[EngineCase, ...] = (
    _prefill(1024),
    _prefill(2048),
    _prefill(640),
    *WAYS,
    _prefill(1024, batch=16),
    _prefill(1024, routing="spread"),
    _prefill(2048, routing="spread"),
    _prefill(640, routing="spread"),
    _prefill(1024, batch=16, routing="spread"),
    _prefill(128),
    _prefill(512),
    _prefill(1280),
    _prefill(1536),
    _prefill(32),
    _prefill(2048, batch=8),
    _prefill(256),
    _prefill(16),
    _prefill(64),
    _prefill(4096),
    _prefill(LONG_TOKENS, batch=2),
)
