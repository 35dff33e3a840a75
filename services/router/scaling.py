"""How many replicas each pool should have. Pure: load figures in, a number out; whoever places replicas (Ray Serve) asks.

Prefill scales on waiting prompt tokens, decode on used blocks; a pool grows at once and shrinks one replica at a time, only where the
load would leave the smaller pool below its target (so that it does not flap).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillLoad:
    """One prefill replica's waiting prompt tokens."""

    queued_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeLoad:
    """One decode replica's blocks; queued_blocks are those that waiting requests need."""

    used_blocks: int
    num_blocks: int
    queued_blocks: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingLimits:
    """Bounds of one pool and its target load for each replica (prefill: tokens; decode: share of blocks in 0..1)."""

    min_replicas: int
    max_replicas: int
    target: float


def desired_prefill(loads: Sequence[PrefillLoad], limits: ScalingLimits) -> int:
    return _desired(sum(load.queued_tokens for load in loads) / limits.target, len(loads), limits)


def desired_decode(loads: Sequence[DecodeLoad], limits: ScalingLimits) -> int:
    used = sum((load.used_blocks + load.queued_blocks) / load.num_blocks for load in loads)
    return _desired(used / limits.target, len(loads), limits)


def _desired(wanted: float, num_now: int, limits: ScalingLimits) -> int:
    """wanted: replicas that would run exactly at target."""
    num = math.ceil(wanted)
    if num < num_now:
        num = num_now - 1 if wanted <= num_now - 1 else num_now
    return min(max(num, limits.min_replicas), limits.max_replicas)
