"""PURE: owns what a user may wait: limits in seconds or as multiples of an unloaded server's times, and who kept them. Knows no server.

A request keeps its limits where it ended whole, its first token came within the one and 95 in 100 of the gaps between its tokens lie
within the other. A multiple is of what the server took with nothing else to do, for a prompt of that length: between the lengths that
were measured the line through their neighbours counts, beyond them the nearest.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.serve.serve_figures import Seen

GAP_SHARE = 0.95
_LIMIT = re.compile(r"(?P<value>\d*\.?\d+)(?P<unit>x|ms|s)")


@dataclass(frozen=True, slots=True)
class Limit:
    """Seconds, or where is_multiple times the unloaded server's."""

    value: float
    is_multiple: bool

    def __str__(self) -> str:
        return f"{self.value:g}x" if self.is_multiple else f"{1e3 * self.value:g}ms"


@dataclass(frozen=True, slots=True)
class Unloaded:
    """Medians of a server with one request at a time, for prompts of this many tokens."""

    prompt_tokens: int
    ttft_s: float
    itl_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """unloaded: by ascending prompt tokens, at least one where a limit is a multiple."""

    ttft: Limit
    itl: Limit
    unloaded: tuple[Unloaded, ...]

    def ttft_s(self, prompt_tokens: int) -> float:
        return _seconds(self.ttft, prompt_tokens, [(each.prompt_tokens, each.ttft_s) for each in self.unloaded])

    def itl_s(self, prompt_tokens: int) -> float:
        return _seconds(self.itl, prompt_tokens, [(each.prompt_tokens, each.itl_s) for each in self.unloaded])

    def are_kept_by(self, seen: Seen) -> bool:
        if seen.error or not seen.event_s or seen.ttft_s > self.ttft_s(seen.prompt_tokens):
            return False
        gaps = seen.gaps_s
        return not len(gaps) or float(np.quantile(gaps, GAP_SHARE)) <= self.itl_s(seen.prompt_tokens)


def parse_limit(text: str) -> Limit:
    """4x, 250ms or 0.25s. Raises ValueError."""
    found = _LIMIT.fullmatch(text.strip())
    if not found or float(found["value"]) <= 0.0:
        raise ValueError(f"{text!r}: a multiple of the unloaded server's such as 4x, or a time such as 250ms or 0.25s")
    return Limit(float(found["value"]) * (1e-3 if found["unit"] == "ms" else 1.0), found["unit"] == "x")


def _seconds(limit: Limit, prompt_tokens: int, points: Sequence[tuple[int, float]]) -> float:
    if not limit.is_multiple:
        return limit.value
    lengths, seconds = zip(*points, strict=True)
    return limit.value * float(np.interp(prompt_tokens, lengths, seconds))
