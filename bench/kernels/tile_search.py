"""Owns a bounded search among launch configurations by time. Knows no operation: a variant is a configuration and its calls.

All variants are compiled first, on all cores; a first round of few replays drops all but the best; those and the heuristic's run again,
side by side. The heuristic stays unless another one is faster by MARGIN: what noise can do is not written into tables.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor
from triton.errors import TritonError

from bench.compile_ahead import compile_ahead
from bench.gpu_stopwatch import interleaved_us
from duomo_kernels._bounds import bound, error

FIRST_REPEATS = 5
LAST_REPEATS = 30
KEPT = 3
MARGIN = 0.01
AT_ONCE = 6  # variants whose graphs are alive at a time
Plan = TypeVar("Plan")
Measure = Callable[[Mapping[str, Sequence[Callable[[], object]]], int], dict[str, float]]


@dataclass(frozen=True, slots=True)
class Variant(Generic[Plan]):
    """A plan and its calls, one for each set of inputs. Variants of one search give the same numbers up to rounding."""

    plan: Plan
    calls: Sequence[Callable[[], Tensor]]


@dataclass(frozen=True, slots=True)
class Found(Generic[Plan]):
    """The fastest plan, its microseconds and the heuristic's in the same round."""

    plan: Plan
    us: float
    heuristic_us: float
    num_tried: int


def median_us(sides: Mapping[str, Sequence[Callable[[], object]]], repeats: int) -> dict[str, float]:
    return {name: timing.median_us for name, timing in interleaved_us(sides, repeats=repeats).items()}


def search(heuristic: Variant[Plan], others: Sequence[Variant[Plan]], deadline_s: float, measure: Measure = median_us) -> Found[Plan]:
    """The fastest of them all. At the deadline (monotonic clock) the first round ends where it is."""
    variants = [heuristic, *(other for other in others if other.plan != heuristic.plan)]
    alive = [0, *(i for i in range(1, len(variants)) if _works(variants[i], heuristic))]
    rough: dict[int, float] = {}
    for at in range(0, len(alive), AT_ONCE):
        if rough and time.monotonic() > deadline_s:
            break
        part = {str(i): variants[i].calls for i in alive[at : at + AT_ONCE]}
        rough |= {int(name): us for name, us in measure(part, FIRST_REPEATS).items()}
    best = sorted(rough, key=lambda i: rough[i])[:KEPT]
    last = measure({str(i): variants[i].calls for i in {0, *best}}, LAST_REPEATS)
    winner = min(last, key=lambda name: last[name])
    if last[winner] > (1 - MARGIN) * last["0"]:
        winner = "0"
    return Found(variants[int(winner)].plan, round(last[winner], 3), round(last["0"], 3), len(rough))


def compile_all(variants: Sequence[Variant[Plan]]) -> int:
    """Compile every variant ahead; returns the number of kernels."""
    return compile_ahead([variant.calls[0] for variant in variants])


def _works(variant: Variant[Plan], heuristic: Variant[Plan]) -> bool:
    """Whether it launches and computes what the heuristic's does: each is within a bound of the truth, so two bounds apart at most."""
    try:
        out = variant.calls[0]()
    except (RuntimeError, AssertionError, ValueError, TritonError):
        return False  # too much shared memory, or registers, or refused by its launcher: not a candidate
    expected = heuristic.calls[0]()
    return error(out.float(), expected.double()) <= 2 * bound(out.dtype)
