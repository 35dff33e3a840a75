"""Owns the joining of parts into rows, a case of a model in a format with everybody's times, and their table. Knows no target and no GPU.

A ratio to vLLM counts only where both engines' layers chose the same number of experts within 2%: random weights can collapse the routing
of one of them, which would then be measured at less work.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bench.engine.engine_cases import TIMED_PEERS, CaseResult, Dtype, EngineCase, Part
from bench.engine.engine_floor import floor_us
from bench.gpu_stopwatch import SEEN_BYTES_PER_S, Timing
from bench.kernels.targets import OURS, Case
from duomo.models.config import ModelConfig

SAME_EXPERTS = 0.02
OURS_BF16 = "ours_bf16"
OURS_DETERMINISTIC = "ours_deterministic"


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRow:
    """One case of one model in one format. shown: everything measured; is_same_work: whether ratios to the peer count.

    floor_here_us: at the bandwidth that this run saw; bf16_floor_us: of the same case in bf16, where it was measured.
    """

    model: str
    dtype: Dtype
    case: EngineCase
    shown: Case
    is_same_work: bool = False
    distinct_peer: float | None = None
    context: float | None = None
    floor_here_us: float = 0.0
    bf16_floor_us: float | None = None

    @property
    def counted(self) -> Case:
        """Without the peer's times where it did other work."""
        if self.is_same_work:
            return self.shown
        return replace(self.shown, times={name: timing for name, timing in self.shown.times.items() if name not in TIMED_PEERS})

    def as_json(self) -> dict[str, Any]:
        more = {"batch": self.case.batch, "context_tokens": self.case.tokens, "is_same_work": self.is_same_work}
        measured = {"distinct_vllm": self.distinct_peer, "context": self.context, "floor_here_us": round(self.floor_here_us, 3)}
        return self.shown.as_json() | more | measured


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    """The parts of one model in one format, by mode."""

    model: str
    dtype: Dtype
    config: ModelConfig
    parts: Mapping[str, Part] = field(default_factory=dict)

    @property
    def bytes_per_s(self) -> float:
        """Of a read, as this run saw it."""
        seen = self.parts[OURS].facts.get("ceilings", {}).get("read_tb_per_s") if OURS in self.parts else None
        return SEEN_BYTES_PER_S if seen is None else 1e12 * float(seen)

    def result(self, mode: str, case: EngineCase) -> CaseResult | None:
        part = self.parts.get(mode)
        return None if part is None else next((one for one in part.results if one.case == case), None)


def join(parts: Sequence[Part], configs: Mapping[str, ModelConfig]) -> list[EngineRow]:
    """Rows in the order of the parts and their cases; of two parts of one job the later one counts."""
    groups: dict[tuple[str, Dtype], dict[str, Part]] = {}
    for part in parts:
        groups.setdefault((part.job.model, part.job.dtype), {})[part.job.mode] = part
    rows: list[EngineRow] = []
    for (model, dtype), found in groups.items():
        one = _Found(model=model, dtype=dtype, config=configs[model], parts=found)
        asked = dict.fromkeys(case for part in found.values() for case in part.job.cases)
        rows += [_row(one, case) for case in asked]
    return [_beside_bf16(row, rows) for row in rows]


def _row(found: _Found, case: EngineCase) -> EngineRow:
    ours, part = found.result(OURS, case), found.parts.get(OURS)
    times = {
        mode: one.timing
        for mode in (OURS, OURS_DETERMINISTIC, *TIMED_PEERS)
        if (one := found.result(mode, case)) is not None and one.timing is not None
    }
    shown = Case(
        section=case.phase,
        shape=found.model,
        tokens=case.step_tokens,
        detail=f"{case.batch} x {case.tokens:,}{' fp8' if found.dtype == 'fp8' else ''}",
        dtype=found.dtype,
        times=times,
        red="" if part is None else part.red,
    )
    if ours is None or ours.distinct is None or part is None or part.red:
        without = {name: timing for name, timing in times.items() if name != OURS}
        return EngineRow(model=found.model, dtype=found.dtype, case=case, shown=replace(shown, times=without))
    theirs = found.result("vllm_count", case)
    peer = None if theirs is None else theirs.distinct
    is_same, notes = _same_work(ours.distinct, peer, bool(set(times) & set(TIMED_PEERS)))
    floor = (found.config, found.dtype, case, ours.distinct, ours.context or 0.0)
    return EngineRow(
        model=found.model,
        dtype=found.dtype,
        case=case,
        shown=replace(shown, distinct=ours.distinct, floor_us=round(floor_us(*floor), 3), notes=notes),
        is_same_work=is_same,
        distinct_peer=peer,
        context=ours.context,
        floor_here_us=floor_us(*floor, bytes_per_s=found.bytes_per_s),
    )


def _same_work(ours: float, peer: float | None, has_peer: bool) -> tuple[bool, tuple[str, ...]]:
    if not has_peer:
        return False, ()
    if peer is None:
        return False, ("ratio does not count: vLLM's experts were not counted",)
    if abs(ours - peer) > SAME_EXPERTS * peer:
        return False, (f"ratio does not count: vLLM's layers chose {peer:.1f} experts",)
    return True, ()


def _beside_bf16(row: EngineRow, rows: Iterable[EngineRow]) -> EngineRow:
    """An fp8 row with our time in bf16 beside it."""
    if row.dtype != "fp8" or OURS not in row.shown.times:
        return row
    wide = next((other for other in rows if other.dtype == "bf16" and (other.model, other.case) == (row.model, row.case)), None)
    if wide is None or OURS not in wide.shown.times:
        return row
    times: dict[str, Timing] = dict(row.shown.times) | {OURS_BF16: wide.shown.times[OURS]}
    return replace(row, shown=replace(row.shown, times=times), bf16_floor_us=wide.shown.floor_us)


def table(rows: Sequence[EngineRow]) -> list[str]:
    """Lines for people: times in milliseconds, how many times as fast as each peer, share of the floor and of this card's own."""
    head = f"{'case':<40}{'floor':>9}{'ours':>9}{'floor/ours':>11}{'here':>7}{'spread':>8}{'experts':>9}{'vLLM':>8}"
    lines = [head + "  peers (ms, ours is x times as fast)"]
    for row in rows:
        case = row.shown
        name = f"{row.case.name} {row.model} {row.dtype}"
        peers = [f"{peer} {t.median_us / 1e3:.2f}" for peer, t in _peers(case)]
        if case.red or OURS not in case.times:
            lines.append(f"{name:<40}{f'RED: {case.red}' if case.red else 'ours has no time'}  {', '.join(peers)}")
            continue
        peers = [f"{text} ({t.median_us / case.ours_us:.2f}x)" for text, (_, t) in zip(peers, _peers(case), strict=True)]
        there = "-" if row.distinct_peer is None else f"{row.distinct_peer:.1f}"
        lines.append(
            f"{name:<40}{case.floor_us / 1e3:>9.2f}{case.ours_us / 1e3:>9.2f}{case.floor_share:>11.0%}"
            f"{row.floor_here_us / case.ours_us:>7.0%}{case.times[OURS].spread:>8.0%}{case.distinct:>9.1f}{there:>8}"
            f"  {', '.join([*peers, *case.notes])}"
        )
        if (fixed := case.times.get(OURS_DETERMINISTIC)) is not None:
            lines.append(
                f"{'  the same, deterministic':<49}{fixed.median_us / 1e3:>9.2f}  {fixed.median_us / case.ours_us - 1:+.0%} of its time"
            )
    return lines


def _peers(case: Case) -> list[tuple[str, Timing]]:
    return [(name, timing) for name, timing in case.times.items() if name not in (OURS, OURS_DETERMINISTIC)]
