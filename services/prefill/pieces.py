"""PURE: owns what the step thread runs of a wave without a break. Knows no tensor and no prompt."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Layer groups [lo, hi) of row chunks [lo, hi) of a wave; one chunk after the other, each through all layers of the piece."""

    groups: tuple[int, int]
    chunks: tuple[int, int]
