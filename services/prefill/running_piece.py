"""Owns what is known of a live wave and of the piece of it that is under way. Knows no policy and no thread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from services.prefill.leg import Leg
from services.prefill.pending import Over, Pending
from services.prefill.pieces import Piece
from services.prefill.snapshot import WaveView
from services.prefill.worker import Computation, WaveOutput


@dataclass(slots=True, kw_only=True, eq=False)
class Wave:
    """Prompts crossing the layers together. computation: the step thread's own state, None before the first piece."""

    view: WaveView
    legs: tuple[Leg, ...]
    computation: Computation | None = None

    @property
    def is_wanted(self) -> bool:
        """Whether anybody of it still is. From any thread."""
        return not all(leg.is_over for leg in self.legs)


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceOutput:
    """What is known of a piece that is over: how long it took, and after a wave's last one the outputs of its legs."""

    seconds: float
    outputs: tuple[WaveOutput, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchedPiece:
    """What the step thread says of a piece. seconds: of each of its parts. ends: the group whose end each tells, if any. outputs:
    after a wave's last one alone."""

    seconds: tuple[Pending[float], ...]
    ends: tuple[int | None, ...]
    outputs: Pending[tuple[WaveOutput, ...]]

    @property
    def is_over(self) -> bool:
        return all(isinstance(each, Over) for each in (*self.seconds, self.outputs))

    def wait(self, moved: Callable[[int | None], None]) -> PieceOutput:
        """Until it is; in any thread. moved: called behind each part, with the group whose end it tells."""
        seconds = 0.0
        for part, group in zip(self.seconds, self.ends, strict=True):
            seconds += part.wait()
            moved(group)
        return PieceOutput(seconds=seconds, outputs=self.outputs.wait())


@dataclass(slots=True, kw_only=True)
class RunningPiece:
    """A piece in the step thread, next in it, or launched by it. before: its wave as it stood. told: groups of it that are known to be
    computed."""

    wave: Wave
    before: WaveView
    piece: Piece
    done: asyncio.Future[PieceOutput | None]
    told: set[int] = field(default_factory=set)
    started_s: float = field(default_factory=time.monotonic)

    @property
    def attributes(self) -> dict[str, int]:
        """Of the piece's events in spans."""
        lo, hi = self.piece.groups
        chunk = {"duomo.chunk": self.piece.chunks[0]} if self.before.num_chunks > 1 else {}
        return {"duomo.group": lo, "duomo.groups": hi - lo} | chunk
