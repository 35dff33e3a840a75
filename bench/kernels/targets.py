"""Owns what a measured case is and the targets that a run is held against. Knows no kernel, no peer and no GPU.

The peer that counts is the faster of vLLM as shipped and vLLM re-tuned, in the same run. A target about many cases says which was worst.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.gpu_stopwatch import Timing

OURS = "ours"
VLLM = ("vllm", "vllm_tuned")
FLASH = tuple(f"flash_attention_3{kind}{pages}" for kind in ("", "_free") for pages in ("", "_pages_of_64"))
TARGET_SHAPES = ("olmoe", "qwen3")


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One row of a run. times: ours and each peer that ran; distinct: experts counted, mean over the sets; red: why there is no time."""

    section: str
    shape: str
    tokens: int
    detail: str = ""
    skew: str = "uniform"
    dtype: str = "bf16"
    distinct: float = 0.0
    floor_us: float = 0.0
    times: Mapping[str, Timing] = field(default_factory=dict)
    error: float = 0.0
    notes: tuple[str, ...] = ()
    red: str = ""

    @property
    def ours_us(self) -> float:
        return self.times[OURS].median_us

    @property
    def floor_share(self) -> float:
        return self.floor_us / self.ours_us

    def ratio(self, *peers: str) -> float | None:
        """How many times as fast as the fastest of the peers that ran; None where none did."""
        found = [self.times[name].median_us for name in peers if name in self.times]
        return min(found) / self.ours_us if found and OURS in self.times else None

    def name(self) -> str:
        words = (self.section, self.shape, f"T={self.tokens}", self.skew if self.skew != "uniform" else "", self.detail)
        return " ".join(word for word in words if word)

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | ({"floor_share": round(self.floor_share, 4)} if OURS in self.times else {})


def case_from_json(row: Mapping[str, Any]) -> Case:
    """The inverse of as_json."""
    kept = {name: value for name, value in row.items() if name != "floor_share"}
    times = {name: Timing(**timing) for name, timing in row["times"].items()}
    return Case(**(kept | {"times": times, "notes": tuple(row["notes"])}))


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """A target, what was reached, and in which case. is_met None: nothing to hold it against was measured."""

    target: str
    needed: float
    reached: float | None
    where: str

    @property
    def word(self) -> str:
        return "----" if self.reached is None else "PASS" if self.reached >= self.needed else "MISS"

    def line(self) -> str:
        reached = "not measured" if self.reached is None else f"{self.reached:.3f}"
        return f"{self.word}  {self.target:<66} needed {self.needed:.2f}  reached {reached:<12} {self.where}"


Rate = Callable[[Case], float | None]


def geometric_mean(values: Iterable[float]) -> float | None:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def worst(target: str, needed: float, cases: Sequence[Case], rate: Rate) -> Verdict:
    """Every case has to reach it."""
    found = [(reached, case.name()) for case in cases if (reached := rate(case)) is not None]
    if not found:
        return _unmeasured(target, needed, cases)
    reached, where = min(found)
    return Verdict(target=target, needed=needed, reached=reached, where=f"worst of {_count(found, cases)}: {where}")


def mean(target: str, needed: float, cases: Sequence[Case], rate: Rate) -> Verdict:
    """The geometric mean of the cases has to reach it."""
    found = [reached for case in cases if (reached := rate(case)) is not None]
    if not found:
        return _unmeasured(target, needed, cases)
    return Verdict(target=target, needed=needed, reached=geometric_mean(found), where=f"geometric mean of {_count(found, cases)}")


def _unmeasured(target: str, needed: float, cases: Sequence[Case]) -> Verdict:
    """No case has a time of both sides: some may have one of ours."""
    missing = sum(OURS not in case.times for case in cases)
    return Verdict(target=target, needed=needed, reached=None, where=f"({missing} left out)" if missing else "")


def _count(found: Sequence[object], cases: Sequence[Case]) -> str:
    """How many cases a verdict rests on, and how many it should have: no time, or no peer that ran."""
    missing = len(cases) - len(found)
    return f"{len(found)} ({missing} left out)" if missing else f"{len(found)}"


def _vllm(case: Case) -> float | None:
    return case.ratio(*VLLM)


def _floor(case: Case) -> float | None:
    return case.floor_share if OURS in case.times else None


def _between(cases: Sequence[Case], low: int, high: int) -> list[Case]:
    return [case for case in cases if low <= case.tokens <= high]


def verdicts(cases: Sequence[Case]) -> list[Verdict]:
    """The targets of the kernels, over whatever was measured. Cases that were asked for and have no time are counted as left out."""
    layers = [case for case in cases if case.section == "layer"]
    ours = [case for case in layers if case.shape in TARGET_SHAPES]
    others = [case for case in layers if case.shape not in TARGET_SHAPES]
    large = _between(ours, 1024, 16384)
    gates = _between([case for case in cases if case.section == "gate"], 1, 1024)
    attention = [case for case in cases if case.section == "attention"]
    fp8 = [case for case in cases if case.section == "fp8"]
    found = [
        worst("MoE layer, T = 1, against vLLM", 1.25, _between(ours, 1, 1), _vllm),
        worst("MoE layer, T = 2..8, against vLLM", 1.05, _between(ours, 2, 8), _vllm),
        worst("MoE layer, T = 16..256, never slower than vLLM", 1.0, _between(ours, 16, 256), _vllm),
        worst("MoE layer, T = 16..256, share of the floor", 0.92, _between(ours, 16, 256), _floor),
        mean("MoE layer, T = 1,024..16,384, against vLLM", 1.35, large, _vllm),
    ]
    found += [mean(f"  the same, {shape} alone", 1.35, [case for case in large if case.shape == shape], _vllm) for shape in TARGET_SHAPES]
    found += [
        mean("MoE layer, T = 1,024..16,384, against torch's grouped GEMM", 1.0, large, lambda case: case.ratio("torch")),
        mean("other shapes, T >= 1,024, against vLLM", 1.15, _between(others, 1024, 1 << 30), _vllm),
        worst("other shapes, T = 16..256, never slower than vLLM", 1.0, _between(others, 16, 256), _vllm),
        worst("gate and sort, T <= 1,024, against topk_softmax + moe_align", 2.0, gates, lambda case: case.ratio("vllm")),
        worst("decode attention, within FlashAttention 3's time", 1.0, attention, lambda case: case.ratio(*FLASH)),
        worst("fp8 layer, T = 16..64, against our bf16", 1.6, _between(fp8, 16, 64), lambda case: case.ratio("ours_bf16")),
        worst("fp8 layer, never slower than vLLM's fp8", 1.0, fp8, _vllm),
    ]
    return found


def table(cases: Sequence[Case]) -> list[str]:
    """Lines for people: times in microseconds, how many times as fast as each peer, share of the floor."""
    head = f"{'case':<52}{'floor':>10}{'ours':>10}{'floor/ours':>11}{'spread':>8}{'experts':>9}{'error':>10}"
    lines = [head + "  peers (us, ours is x times as fast)"]
    for case in cases:
        if case.red or OURS not in case.times:
            lines.append(f"{case.name():<52}RED: {case.red or 'no time'}")
            continue
        ratios = [f"{name} {t.median_us:.1f} ({t.median_us / case.ours_us:.2f}x)" for name, t in case.times.items() if name != OURS]
        distinct = f"{case.distinct:.1f}" if case.distinct else "-"
        lines.append(
            f"{case.name():<52}{case.floor_us:>10.1f}{case.ours_us:>10.1f}{case.floor_share:>11.0%}{case.times[OURS].spread:>8.0%}"
            f"{distinct:>9}{case.error:>10.1e}  {', '.join([*ratios, *case.notes])}"
        )
    return lines
