"""PURE: owns what a load asks and when: lengths of requests, mixes, arrivals, traces stretched in time. Knows no server and no clock.

A load has as many requests as its rate says. Lengths and times are drawn from the seed alone: every rate sees the same lengths in the same
order and the same pattern of arrivals, and so does every server that is asked. What prompts say differs from point to point, and by the
salt from run to run, so that none is in a cache yet.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

TRACE_BLOCK_TOKENS = 512  # that one of a trace's hash ids stands for, in Mooncake's traces
_SHAPE = re.compile(r"(?P<prompt>\d+):(?P<output>\d+)(?:@(?P<weight>\d*\.?\d+))?")

ArrivalKind = Literal["poisson", "gamma", "constant"]


@dataclass(frozen=True, slots=True)
class Shape:
    """Tokens of a prompt and of its answer, and how often it comes among others."""

    prompt_tokens: int
    output_tokens: int
    weight: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.prompt_tokens}:{self.output_tokens}"


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request of a trace. hash_ids: of the prompt's blocks of TRACE_BLOCK_TOKENS; equal ids are equal tokens."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of a prompt. Pieces of one key begin with the same tokens."""

    key: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Request:
    """due_s: when it is to be sent, since the load began. pieces: of its prompt, in order; their tokens add up to it."""

    index: int
    due_s: float
    output_tokens: int
    pieces: tuple[Piece, ...]

    @property
    def prompt_tokens(self) -> int:
        return sum(piece.num_tokens for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Arrivals:
    """burstiness: the shape of gamma-distributed gaps, whose variance is mean squared over it; 1 is Poisson, less comes in bursts."""

    kind: ArrivalKind
    burstiness: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is asked at any rate. spread: lengths lie within this share of their shape's, evenly.

    prefix_share: of each prompt that it has in common with others of its group, of which there are prefix_groups. trace: rows by time;
    where there are any, they are the requests, and mix, spread, arrivals and prefixes say nothing. salt: of the tokens of prompts, not of
    their lengths or times; two runs of one salt and seed send the same prompts.
    """

    mix: tuple[Shape, ...]
    arrivals: Arrivals
    spread: float = 0.0
    prefix_share: float = 0.0
    prefix_groups: int = 1
    seed: int = 0
    salt: str = ""
    trace: tuple[TraceRow, ...] = ()

    @property
    def prompts_key(self) -> str:
        """With what the key of every piece begins."""
        return f"{self.salt} {self.seed}"


def parse_mix(text: str) -> tuple[Shape, ...]:
    """PROMPT:OUTPUT[@WEIGHT],... in tokens. Raises ValueError."""
    shapes = []
    for part in text.split(","):
        found = _SHAPE.fullmatch(part.strip())
        if not found:
            raise ValueError(
                f"{part.strip()!r}: write PROMPT:OUTPUT tokens, with @WEIGHT where there are several, such as 2048:128@0.7,1024:256@0.3"
            )
        shape = Shape(int(found["prompt"]), int(found["output"]), float(found["weight"] or 1.0))
        if shape.prompt_tokens < 1 or shape.output_tokens < 1 or shape.weight <= 0.0:
            raise ValueError(f"{part.strip()!r}: prompt, output and weight are above 0")
        shapes.append(shape)
    return tuple(shapes)


def parse_arrivals(text: str) -> Arrivals:
    """poisson, constant or gamma:BURSTINESS. Raises ValueError."""
    kind, colon, value = text.partition(":")
    if kind == "poisson" and not colon:
        return Arrivals("poisson")
    if kind == "constant" and not colon:
        return Arrivals("constant")
    if kind == "gamma" and re.fullmatch(r"\d*\.?\d+", value) and float(value) > 0.0:
        return Arrivals("gamma", float(value))
    raise ValueError(f"{text!r}: poisson, constant or gamma:BURSTINESS, such as gamma:0.25; below 1 comes in bursts")


def requests_of(load: Workload, rate: float | None, duration_s: float, point: int) -> tuple[Request, ...]:
    """What is due within duration_s, in order; at least one. rate: requests/s; None: the trace's own, without a trace one a second.

    point: which of a run's loads this is; prompts are drawn from it.
    """
    drawn = _of_trace(load, rate, duration_s, point) if load.trace else _of_mix(load, rate or 1.0, duration_s, point)
    return tuple(Request(index, at_s, output, pieces) for index, (at_s, output, pieces) in enumerate(drawn))


def due_times(arrivals: Arrivals, count: int, duration_s: float, draw: random.Random) -> list[float]:
    """`count` times within duration_s, so that no load is lighter than another by chance.

    The gaps, and one more to the end, are drawn and then stretched to fill it: of Poisson arrivals these are those that came to `count`.
    """
    if arrivals.kind == "constant":
        return [number * duration_s / count for number in range(count)]
    gaps = [draw.gammavariate(arrivals.burstiness, 1.0) for _ in range(count + 1)]
    stretch = duration_s / (sum(gaps) or 1.0)
    return [min(duration_s, stretch * at) for at in itertools.accumulate(gaps[:count])]


_Drawn = Iterator[tuple[float, int, tuple[Piece, ...]]]  # time, tokens of the answer, the prompt


def _of_mix(load: Workload, rate: float, duration_s: float, point: int) -> _Drawn:
    count = max(1, round(rate * duration_s))
    times = due_times(load.arrivals, count, duration_s, random.Random(f"arrivals {load.seed}"))
    draw = random.Random(f"lengths {load.seed}")
    weights = [shape.weight for shape in load.mix]
    for index, at_s in enumerate(times):
        shape = draw.choices(load.mix, weights)[0]
        prompt, output = (
            max(1, round(length * draw.uniform(1 - load.spread, 1 + load.spread))) for length in (shape.prompt_tokens, shape.output_tokens)
        )
        shared = min(round(load.prefix_share * prompt), prompt - 1)
        group = draw.randrange(load.prefix_groups)
        prefix = [Piece(f"{load.prompts_key} {point} prefix {group}", shared)] if shared else []
        yield at_s, output, (*prefix, Piece(f"{load.prompts_key} {point} own {index}", prompt - shared))


def _of_trace(load: Workload, rate: float | None, duration_s: float, point: int) -> _Drawn:
    """What is due before duration_s, and the first in any case. A trace that is one instant has no rate, and is not stretched."""
    begin_s = load.trace[0].arrival_s
    span_s = load.trace[-1].arrival_s - begin_s
    stretch = 1.0 if rate is None or span_s == 0.0 else (len(load.trace) - 1) / span_s / rate
    for index, row in enumerate(load.trace):
        at_s = stretch * (row.arrival_s - begin_s)
        if at_s < duration_s:
            yield at_s, row.output_tokens, tuple(_blocks(row, f"{load.prompts_key} {point}", index))


def _blocks(row: TraceRow, key: str, index: int) -> Iterator[Piece]:
    left = row.prompt_tokens
    for hash_id in row.hash_ids:
        if left:
            yield Piece(f"{key} block {hash_id}", min(TRACE_BLOCK_TOKENS, left))
            left -= min(TRACE_BLOCK_TOKENS, left)
    if left:
        yield Piece(f"{key} own {index}", left)


def lengths_asked(requests: Sequence[Request]) -> dict[str, float]:
    """Means of a load, for a report."""
    count = len(requests)
    return {
        "prompt_tokens": sum(request.prompt_tokens for request in requests) / count,
        "output_tokens": sum(request.output_tokens for request in requests) / count,
    }
