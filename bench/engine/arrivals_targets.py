"""Owns what is said of loads: their table, the modes held against each other, the targets. Knows no engine and no GPU.

overtake   the 95th percentile of a short prompt's time to its first token, against one group of the long waves (or the piece target, where
           that is more) and what a short prompt takes alone (the median)
beside     at each rate, the lowest mean time to the first token among the layered points whose time between tokens (95th percentile) is at
           most that of chunks of CHUNK_ROWS rows, or within SAME_ITL of it: at low rates both are a decode step's own. Both are printed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.engine.arrivals_cases import CHUNK_ROWS, LoadResult, Spread
from bench.engine.engine_cases import Part
from bench.kernels.targets import Verdict

SAME_ITL = 1.02


@dataclass(frozen=True, kw_only=True, slots=True)
class RateRow:
    """One rate of one model: chunks of CHUNK_ROWS rows, and the best layered point that is as smooth; None: there is none."""

    model: str
    rate_per_s: float
    chunked: LoadResult
    layered: LoadResult | None

    @property
    def times_faster(self) -> float:
        """Mean time to the first token, chunked over layered; 0 where no layered point is as smooth."""
        if self.layered is None or self.layered.ttft is None or self.chunked.ttft is None:
            return 0.0
        return self.chunked.ttft.mean_s / self.layered.ttft.mean_s

    def line(self) -> str:
        if self.layered is None:
            return f"{self.model}, {self.rate_per_s:g}/s: no layered point is as smooth as chunks of {CHUNK_ROWS}"
        return (
            f"{self.model}, {self.rate_per_s:g}/s: mean TTFT {_ms(self.layered.ttft, 'mean_s')} ms with {self.layered.load.mode_name}, "
            f"{_ms(self.chunked.ttft, 'mean_s')} ms with chunks of {CHUNK_ROWS}; ITL p95 {_ms(self.layered.itl, 'p95_s')} and "
            f"{_ms(self.chunked.itl, 'p95_s')} ms"
        )


def rate_rows(parts: Sequence[Part]) -> list[RateRow]:
    """A row for each rate at which both modes were measured; points with a failed request are none."""
    rows = []
    for part in parts:
        fine = [one for one in part.loads if one.load.experiment == "beside" and not one.failures and one.itl is not None]
        for chunked in fine:
            if (chunked.load.mode, chunked.load.size) != ("chunked", CHUNK_ROWS):
                continue
            same = [one for one in fine if one.load.mode == "layered" and one.load.rate_per_s == chunked.load.rate_per_s]
            smooth = [one for one in same if _p95(one) <= SAME_ITL * _p95(chunked)]
            best = min(smooth, key=_mean_ttft, default=None)
            if same:
                rows.append(RateRow(model=part.job.model, rate_per_s=chunked.load.rate_per_s, chunked=chunked, layered=best))
    return rows


def arrival_verdicts(parts: Sequence[Part]) -> list[Verdict]:
    """The targets about loads, of every model that was played."""
    found = []
    for part in parts:
        if part.job.mode != "ours_arrivals":
            continue
        found += [
            _overtaking(part.job.model, one) for one in part.loads if one.load.experiment == "overtake" and one.load.mode == "layered"
        ]
        if rows := rate_rows([part]):
            worst = min(rows, key=lambda row: row.times_faster)
            target = f"beside decode, {part.job.model}: mean TTFT against chunks, same ITL p95"
            found.append(Verdict(target=target, needed=1.0, reached=worst.times_faster, where=f"worst of {len(rows)}: {worst.line()}"))
    return found


def _overtaking(model: str, one: LoadResult) -> Verdict:
    target = f"short among long, {model}: a group + their own over p95 TTFT"
    if one.failures or one.ttft is None or one.groups is None or one.alone is None:
        return Verdict(target=target, needed=1.0, reached=None, where=one.failures[0] if one.failures else "no waves of both kinds")
    group_s = max(one.groups.p95_s, one.piece_target_s)
    where = (
        f"{1e3 * group_s:.2f} + {_ms(one.alone, 'p50_s')} over {_ms(one.ttft, 'p95_s')} ms, {one.ttft.count} prompts, "
        f"{one.num_short_waves} short and {one.num_long_waves} long waves, {one.num_mixed_waves} of these mixed; "
        f"pieces' p95 {_ms(one.pieces, 'p95_s')} ms"
    )
    return Verdict(target=target, needed=1.0, reached=(group_s + one.alone.p50_s) / one.ttft.p95_s, where=where)


def arrivals_table(parts: Sequence[Part]) -> list[str]:
    """Lines for people: times in milliseconds."""
    loads = [(part, one) for part in parts for one in part.loads]
    if not loads:
        return []
    head = f"{'load':<44}{'TTFT mean':>10}{'p50':>8}{'p95':>8}{'max':>8}{'ITL p50':>9}{'p95':>7}{'p99':>7}{'prompt/s':>10}{'new/s':>8}"
    lines = [head + "  waves; pieces of the long ones; a short one alone"]
    for part, one in loads:
        name = f"{one.load.name} {part.job.model} {part.job.dtype}"
        if one.failures:
            lines.append(f"{name:<44}{len(one.failures)} FAILED: {one.failures[0]}")
            continue
        times = f"{_ms(one.ttft, 'mean_s'):>10}{_ms(one.ttft, 'p50_s'):>8}{_ms(one.ttft, 'p95_s'):>8}{_ms(one.ttft, 'max_s'):>8}"
        gaps = f"{_ms(one.itl, 'p50_s'):>9}{_ms(one.itl, 'p95_s'):>7}{_ms(one.itl, 'p99_s'):>7}"
        kinds = f"{one.num_short_waves} short, {one.num_long_waves} long, {one.num_mixed_waves} of these mixed"
        pieces = f"p50 {_ms(one.pieces, 'p50_s')}, p95 {_ms(one.pieces, 'p95_s')}"
        waves = "" if one.pieces is None else f"  {kinds}; {pieces}; {_ms(one.alone, 'p50_s')}"
        lines.append(f"{name:<44}{times}{gaps}{one.prompt_tokens_per_s:>10,.0f}{one.new_tokens_per_s:>8,.0f}{waves}")
    return [*lines, "", *(row.line() for row in rate_rows(parts))]


def _ms(spread: Spread | None, name: str) -> str:
    return "-" if spread is None else f"{1e3 * float(getattr(spread, name)):.2f}"


def _p95(one: LoadResult) -> float:
    return float("inf") if one.itl is None else one.itl.p95_s


def _mean_ttft(one: LoadResult) -> float:
    return float("inf") if one.ttft is None else one.ttft.mean_s
