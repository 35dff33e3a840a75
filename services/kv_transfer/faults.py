"""Owns what goes wrong on the loopback transport: a fault for each write, scripted or drawn from a seed. PURE; knows no memory."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What happens to one write. The default is a write that lands at once and is notified.

    delay_s: the bytes land this much later. drops_data: reported as done, but no byte lands. drops_notification: lands silently.
    announces_early: the notification overtakes the bytes. duplicate_after_s: bytes and notification come a second time.
    corrupt_byte: one byte of the message is flipped on the way. truncate_bytes: only so many bytes land, reported as done.
    kills_writer: the writing agent dies; the first truncate_bytes bytes (default none) have landed.
    """

    delay_s: float = 0.0
    drops_data: bool = False
    drops_notification: bool = False
    announces_early: bool = False
    duplicate_after_s: float | None = None
    corrupt_byte: int | None = None
    truncate_bytes: int | None = None
    kills_writer: bool = False


NO_FAULT = Fault()


class FaultPlan(Protocol):
    """Says what happens to the write_idx-th write of the hub (counted from 0), which has num_bytes bytes."""

    def fault(self, write_idx: int, num_bytes: int) -> Fault: ...


@dataclass(frozen=True, slots=True)
class ScriptedFaults:
    """The named writes fail as told, all others do not."""

    faults: Mapping[int, Fault] = field(default_factory=dict)

    def fault(self, write_idx: int, num_bytes: int) -> Fault:
        return self.faults.get(write_idx, NO_FAULT)


@dataclass(frozen=True, slots=True, kw_only=True)
class SeededFaults:
    """Each write draws its fault from (seed, write_idx): the same seed gives the same faults. Chances are between 0 and 1."""

    seed: int
    max_delay_s: float = 0.0
    chance_drop: float = 0.0
    chance_drop_notification: float = 0.0
    chance_announce_early: float = 0.0
    chance_duplicate: float = 0.0
    chance_corrupt: float = 0.0
    max_bytes_per_s: float = 0.0

    def fault(self, write_idx: int, num_bytes: int) -> Fault:
        draw = random.Random(self.seed * 1_000_003 + write_idx)
        throttled_s = num_bytes / self.max_bytes_per_s if self.max_bytes_per_s > 0 else 0.0
        return Fault(
            delay_s=draw.uniform(0.0, self.max_delay_s) + throttled_s,
            drops_data=draw.random() < self.chance_drop,
            drops_notification=draw.random() < self.chance_drop_notification,
            announces_early=draw.random() < self.chance_announce_early,
            duplicate_after_s=draw.uniform(0.0, 2 * self.max_delay_s) if draw.random() < self.chance_duplicate else None,
            corrupt_byte=draw.randrange(num_bytes) if draw.random() < self.chance_corrupt else None,
        )
