"""PURE: owns what a load asks and when: lengths of requests, mixes, arrivals, traces stretched in time. Knows no server and no clock.

A load is drawn once, at one request a second, and stretched to the rate that is asked: every rate sees the same requests in the same
pattern, and so does every server that is asked with the same seed. Prompts differ from point to point, so that none is in a cache yet.
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
    where there are any, they are the requests, and mix, spread, arrivals and prefixes say nothing.
    """

    mix: tuple[Shape, ...]
    arrivals: Arrivals
    spread: float = 0.0
    prefix_share: float = 0.0
    prefix_groups: int = 1
    seed: int = 0
    trace: tuple[TraceRow, ...] = ()


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
    stretch = stretch_of(load, rate)
    drawn = ((at * stretch, output, pieces) for at, output, pieces in (_of_trace if load.trace else _of_mix)(load, point))
    first = next(drawn)
    due = [first, *itertools.takewhile(lambda each: each[0] < duration_s, drawn)]
    return tuple(Request(index, min(at_s, duration_s), output, pieces) for index, (at_s, output, pieces) in enumerate(due))


def stretch_of(load: Workload, rate: float | None) -> float:
    """What times of the load as it is drawn are multiplied by. A trace that is one instant has no rate, and is not stretched."""
    if not load.trace:
        return 1.0 / (rate or 1.0)
    span_s = load.trace[-1].arrival_s - load.trace[0].arrival_s
    return 1.0 if rate is None or span_s == 0.0 else (len(load.trace) - 1) / span_s / rate


_Drawn = Iterator[tuple[float, int, tuple[Piece, ...]]]  # time, tokens of the answer, the prompt


def _of_mix(load: Workload, point: int) -> _Drawn:
    """One a second, without end."""
    draw = random.Random(f"lengths {load.seed}")
    weights = [shape.weight for shape in load.mix]
    for index, at in enumerate(_times(load.arrivals, random.Random(f"arrivals {load.seed}"))):
        shape = draw.choices(load.mix, weights)[0]
        prompt, output = (
            max(1, round(length * draw.uniform(1 - load.spread, 1 + load.spread))) for length in (shape.prompt_tokens, shape.output_tokens)
        )
        shared = min(round(load.prefix_share * prompt), prompt - 1)
        group = draw.randrange(load.prefix_groups)
        prefix = [Piece(f"{load.seed} {point} prefix {group}", shared)] if shared else []
        yield at, output, (*prefix, Piece(f"{load.seed} {point} own {index}", prompt - shared))


def _of_trace(load: Workload, point: int) -> _Drawn:
    for index, row in enumerate(load.trace):
        yield row.arrival_s - load.trace[0].arrival_s, row.output_tokens, tuple(_blocks(row, f"{load.seed} {point}", index))


def _blocks(row: TraceRow, salt: str, index: int) -> Iterator[Piece]:
    left = row.prompt_tokens
    for hash_id in row.hash_ids:
        if left:
            yield Piece(f"{salt} block {hash_id}", min(TRACE_BLOCK_TOKENS, left))
            left -= min(TRACE_BLOCK_TOKENS, left)
    if left:
        yield Piece(f"{salt} own {index}", left)


def _times(arrivals: Arrivals, draw: random.Random) -> Iterator[float]:
    """Without end, one a second on average; the first at a gap's end, but of constant ones at 0."""
    at = 0.0
    if arrivals.kind == "constant":
        yield from map(float, itertools.count())
    while True:
        at += draw.gammavariate(arrivals.burstiness, 1.0 / arrivals.burstiness)
        yield at


def lengths_asked(requests: Sequence[Request]) -> dict[str, float]:
    """Means of a load, for a report."""
    count = len(requests)
    return {
        "prompt_tokens": sum(request.prompt_tokens for request in requests) / count,
        "output_tokens": sum(request.output_tokens for request in requests) / count,
    }
