"""PURE: owns the loads that arrive while others are computed, and what is kept of each. Knows no engine, no socket and no clock.

Two experiments, each played to prefill and decode in one process, as a gateway plays them:

    overtake   short prompts of one token arrive (Poisson) while long ones run back to back: how long a short one waits
    beside     prompts arrive (Poisson) and their answers are decoded by the same GPU: what prefill does to the time between tokens

A mode (docs/decisions/0008-layered-prefill.md) has a size that trades one against the other: of layered prefill the target time of a
piece, in shares of what one chunk of CHUNK_ROWS takes alone on this machine; of chunked prefill the rows of a chunk; whole prefill has
none. All modes and sizes get the same prompts at the same times; nothing of a prompt is cached.
"""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Experiment = Literal["overtake", "beside"]
PrefillMode = Literal["layered", "chunked", "whole"]
Kind = Literal["arrival", "backlog", "alone"]

CHUNK_ROWS = 512  # the peer's chunks, and the measure of layered pieces
LISTED_WAVES = 24  # of each kind, in a result file


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """The sizes of both experiments for one model. backlog: long prompts under way or waiting at any time, so that one always waits."""

    short_tokens: int
    long_tokens: int
    overtake_per_s: float
    lengths: tuple[int, ...]
    new_tokens: tuple[int, int]
    rates_per_s: tuple[float, ...]
    load_s: float
    backlog: int = 3


# The highest rate is about what chunks of 512 rows beside decode can bear. Seconds are few, a GPU's are dear: modes share their prompts.
SCALES: Mapping[str, Scale] = {
    "olmoe": Scale(
        short_tokens=256, long_tokens=8192, overtake_per_s=20.0, lengths=(2048, 4096, 8192), new_tokens=(64, 128),
        rates_per_s=(3.0, 5.0, 7.0), load_s=4.0,
    ),
    "qwen3": Scale(
        short_tokens=256, long_tokens=8192, overtake_per_s=10.0, lengths=(2048, 4096, 8192), new_tokens=(64, 128),
        rates_per_s=(1.0, 2.0, 3.0), load_s=5.0,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """One point. size: see above. lengths and new_tokens: what arrives; long_tokens: what runs back to back (0: nothing)."""

    experiment: Experiment
    mode: PrefillMode
    size: float
    rate_per_s: float
    load_s: float
    lengths: tuple[int, ...]
    new_tokens: tuple[int, int]
    long_tokens: int = 0
    backlog: int = 0

    @property
    def trace_name(self) -> str:
        """The same for all modes and sizes: prompts and times are drawn from it."""
        return f"{self.experiment} {self.rate_per_s:g}/s"

    @property
    def name(self) -> str:
        return f"{self.trace_name} {self.mode_name}"

    @property
    def mode_name(self) -> str:
        sizes = {"layered": f" x{self.size:g}", "chunked": f" {self.size:g}", "whole": ""}
        return self.mode + sizes[self.mode]

    def options(self, chunk_s: float) -> dict[str, object]:
        """The configuration's, where a chunk of CHUNK_ROWS takes chunk_s seconds alone."""
        found: dict[str, object] = {"prefill.mode": self.mode, "prefill.prefix_cache_blocks": 0, "decode.prefix_cache_blocks": 0}
        if self.mode == "layered":
            found["prefill.piece_target_s"] = self.size * chunk_s
        if self.mode == "chunked":
            found["prefill.chunk_tokens"] = int(self.size)
        return found


@dataclass(frozen=True, slots=True)
class Arrival:
    """A prompt that arrives at_s seconds after the load began, and the tokens that it asks for."""

    at_s: float
    num_tokens: int
    new_tokens: int


def loads_of(scale: Scale) -> tuple[Load, ...]:
    """Every point, in order of worth: what runs out of time is the least."""
    overtake = {
        "experiment": "overtake", "rate_per_s": scale.overtake_per_s, "load_s": scale.load_s, "lengths": (scale.short_tokens,),
        "new_tokens": (1, 1), "long_tokens": scale.long_tokens, "backlog": scale.backlog,
    }  # fmt: skip
    beside = [
        {"experiment": "beside", "rate_per_s": rate, "load_s": scale.load_s, "lengths": scale.lengths, "new_tokens": scale.new_tokens}
        for rate in scale.rates_per_s
    ]
    order: list[tuple[PrefillMode, float, bool]] = [
        ("chunked", CHUNK_ROWS, False),
        ("layered", 0.9, False),
        ("layered", 0.45, False),
        ("whole", 0.0, False),
        ("chunked", CHUNK_ROWS, True),
        ("chunked", 2 * CHUNK_ROWS, False),
        ("layered", 1.8, False),
        ("whole", 0.0, True),
    ]
    made: list[dict[str, Any]] = [overtake | {"mode": "layered", "size": 0.45}]
    for mode, size, is_overtake in order:
        made += [each | {"mode": mode, "size": size} for each in ([overtake] if is_overtake else beside)]
    return tuple(Load(**each) for each in made)


def arrivals_of(load: Load) -> tuple[Arrival, ...]:
    """Poisson arrivals within load_s; every length as often as any other, in a drawn order. At least one."""
    draw = random.Random(load.trace_name)
    made: list[Arrival] = []
    at_s, lengths = 0.0, _endless(load.lengths, draw)
    while (at_s := at_s + draw.expovariate(load.rate_per_s)) < load.load_s or not made:
        made.append(Arrival(min(at_s, load.load_s), next(lengths), draw.randint(*load.new_tokens)))
    return tuple(made)


def _endless(lengths: Sequence[int], draw: random.Random) -> Any:
    while True:
        yield from draw.sample(lengths, len(lengths))


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One prompt as the client saw it; seconds since the load began. due_s: when it should have been sent; token_s: when tokens came."""

    kind: Kind
    num_tokens: int
    due_s: float
    sent_s: float
    token_s: tuple[float, ...]
    failure: str = ""

    @property
    def ttft_s(self) -> float:
        """From when it was due: a client that is late makes nobody faster."""
        return self.token_s[0] - self.due_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Seconds of `count` samples."""

    count: int
    mean_s: float
    p50_s: float
    p95_s: float
    p99_s: float
    max_s: float


def spread_of(samples_s: Sequence[float]) -> Spread | None:
    """None of none."""
    if not samples_s:
        return None
    ordered = sorted(samples_s)

    def at(share: float) -> float:
        """Nearest rank: a value that was measured."""
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 7)

    mean_s = round(statistics.fmean(ordered), 7)
    return Spread(count=len(ordered), mean_s=mean_s, p50_s=at(0.5), p95_s=at(0.95), p99_s=at(0.99), max_s=round(ordered[-1], 7))


@dataclass(frozen=True, kw_only=True, slots=True)
class WaveSeen:
    """One wave as its spans tell it. piece_s: how long each of its pieces took; started_s: of its first, since the first wave's.

    piece_groups: layer groups of each piece.
    """

    wave: int
    num_prompts: int
    num_tokens: int
    started_s: float
    ended_s: float
    piece_s: tuple[float, ...]
    piece_groups: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadResult:
    """What one point showed. itl: between tokens of one answer. alone: first tokens of arrivals' shortest length on an idle engine.

    chunk_s: what one chunk of CHUNK_ROWS took alone; piece_target_s: 0 where the mode has none. pieces, groups: of the long waves, where
    waves were recorded (a group's time is its share of its piece's); num_mixed_waves: long ones that took short prompts along. late_s: the
    client's worst lag.
    """

    load: Load
    chunk_s: float
    piece_target_s: float
    ttft: Spread | None
    itl: Spread | None
    alone: Spread | None
    pieces: Spread | None
    groups: Spread | None
    num_short_waves: int
    num_long_waves: int
    num_mixed_waves: int
    waves: tuple[WaveSeen, ...]
    prompt_tokens_per_s: float
    new_tokens_per_s: float
    late_s: float
    failures: tuple[str, ...]


def load_result(load: Load, chunk_s: float, answers: Sequence[Answer], waves: Sequence[WaveSeen]) -> LoadResult:
    """Everything that is kept of a point; a failed answer gives no time, and is named."""
    fine = [one for one in answers if not one.failure]
    arrived = [one for one in fine if one.kind == "arrival"]
    timed = [one for one in fine if one.kind != "alone"]
    gaps = [after - before for one in arrived for before, after in itertools.pairwise(one.token_s)]
    span_s = max((one.token_s[-1] for one in timed), default=0.0) or float("inf")
    long = [wave for wave in waves if load.long_tokens and wave.num_tokens >= load.long_tokens]
    short = [wave for wave in waves if wave not in long]
    return LoadResult(
        load=load,
        chunk_s=round(chunk_s, 7),
        piece_target_s=round(load.size * chunk_s, 7) if load.mode == "layered" else 0.0,
        ttft=spread_of([one.ttft_s for one in arrived]),
        itl=spread_of(gaps),
        alone=spread_of([one.ttft_s for one in fine if one.kind == "alone"]),
        pieces=spread_of([piece_s for wave in long for piece_s in wave.piece_s]),
        groups=spread_of([piece_s / num for wave in long for piece_s, num in zip(wave.piece_s, wave.piece_groups, strict=True)]),
        num_short_waves=len(short),
        num_long_waves=len(long),
        num_mixed_waves=sum(wave.num_tokens > load.long_tokens * (wave.num_tokens // load.long_tokens) for wave in long),
        waves=tuple(sorted([*short[:LISTED_WAVES], *long[:LISTED_WAVES]], key=lambda wave: wave.started_s)),
        prompt_tokens_per_s=round(sum(one.num_tokens for one in timed) / span_s, 1),
        new_tokens_per_s=round(sum(len(one.token_s) for one in timed) / span_s, 1),
        late_s=round(max((one.sent_s - one.due_s for one in arrived), default=0.0), 7),
        failures=tuple(one.failure for one in answers if one.failure),
    )


def load_result_from_json(row: Mapping[str, Any]) -> LoadResult:
    """The inverse of asdict."""
    load = dict(row["load"])
    load |= {"lengths": tuple(load["lengths"]), "new_tokens": tuple(load["new_tokens"])}
    spreads = {name: None if row[name] is None else Spread(**row[name]) for name in ("ttft", "itl", "alone", "pieces", "groups")}
    waves = tuple(
        WaveSeen(**(one | {"piece_s": tuple(one["piece_s"]), "piece_groups": tuple(one["piece_groups"])})) for one in row["waves"]
    )
    return LoadResult(**(dict(row) | spreads | {"load": Load(**load), "waves": waves, "failures": tuple(row["failures"])}))
