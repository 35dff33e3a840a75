"""Owns what `duomo bench prefill` says of the ways of prefill, and the targets of such a run. Knows no engine and no GPU.

The floor of the bytes of experts that a prompt needs: layers x D x the bytes of one expert, D being the distinct experts that a layer's
rows chose, counted over the whole prompt. Chunks read what they share again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.engine.arrivals_targets import arrival_verdicts
from bench.engine.engine_cases import SHIPPED_PEERS, CaseResult, Dtype, Part, Way
from bench.engine.engine_floor import expert_bytes
from bench.engine.engine_rows import EngineRow
from bench.engine.engine_targets import first_token_verdicts, prompt_verdicts
from bench.kernels.targets import OURS, Case, Verdict
from duomo.models.config import ModelConfig

BYTES_OF_FLOOR = 1.05
AGAINST_CHUNKS = 2.5


@dataclass(frozen=True, kw_only=True, slots=True)
class WaysRow:
    """One wave of one model in one format, computed by our engine in several ways. floor_bytes: of experts' weights, see above."""

    model: str
    dtype: Dtype
    name: str
    floor_bytes: float
    results: Mapping[Way, CaseResult]

    def ms(self, way: Way) -> float | None:
        """Median, to the first token."""
        found = self.results.get(way)
        return None if found is None or found.timing is None else found.timing.median_us / 1e3

    def times_floor(self, way: Way) -> float | None:
        """Expert bytes read, in floors."""
        found = self.results.get(way)
        return None if found is None or not found.expert_bytes or not self.floor_bytes else found.expert_bytes / self.floor_bytes

    def as_json(self) -> dict[str, Any]:
        ways = {
            way: {"ms": self.ms(way), "expert_bytes": found.expert_bytes, "times_floor": self.times_floor(way), "distinct": found.distinct}
            for way, found in self.results.items()
        }
        return {"model": self.model, "dtype": self.dtype, "case": self.name, "floor_bytes": self.floor_bytes, "ways": ways}


def ways_rows(parts: Sequence[Part], configs: Mapping[str, ModelConfig]) -> list[WaysRow]:
    """A row for each wave that was computed in more ways than one."""
    rows = []
    for part in parts:
        if part.job.mode != OURS or part.red:
            continue
        waves: dict[str, dict[Way, CaseResult]] = {}
        for one in part.results:
            waves.setdefault(one.case.wave_name, {})[one.case.way] = one
        for name, results in waves.items():
            if len(results) > 1:
                distinct = next((one.distinct for one in results.values() if one.distinct is not None), 0.0)
                config = configs[part.job.model]
                floor = config.num_layers * distinct * expert_bytes(config, part.job.dtype)
                rows.append(WaysRow(model=part.job.model, dtype=part.job.dtype, name=name, floor_bytes=floor, results=results))
    return rows


def prompts_table(rows: Sequence[EngineRow]) -> list[str]:
    """One prompt by length: ours, vLLM as shipped (the faster of its two processes) and with graphs to 4,096 tokens, always together."""
    single = [row for row in rows if row.case.batch == 1 and OURS in row.shown.times]
    if not single:
        return []
    lines = [f"{'one prompt, ms to its first token':<40}{'ours':>9}{'vLLM as shipped':>22}{'graphs to 4,096':>22}{'experts':>9}  counts"]
    for row in sorted(single, key=lambda row: (row.dtype, row.model, row.case.routing, row.case.tokens)):
        shown = row.shown
        peers = "".join(f"{_beside(shown, names):>22}" for names in (SHIPPED_PEERS, ("vllm_extended",)))
        counts = "yes" if row.is_same_work else "no: vLLM's experts are others, or were not counted"
        lines.append(f"{_prompt_name(row):<40}{shown.ours_us / 1e3:>9.2f}{peers}{shown.distinct:>9.1f}  {counts}")
    return lines


def _prompt_name(row: EngineRow) -> str:
    routing = "" if row.case.routing == "drawn" else f" {row.case.routing}"
    return f"{row.case.tokens:,} tokens{routing} {row.model} {row.dtype}"


def _beside(case: Case, peers: Sequence[str]) -> str:
    ratio = case.ratio(*peers)
    return "not measured" if ratio is None else f"{ratio * case.ours_us / 1e3:.2f} ({ratio:.2f}x)"


def ways_table(rows: Sequence[WaysRow]) -> list[str]:
    """Lines for people."""
    lines = [f"{'ways of one wave (ours)':<40}{'ms':>9}{'experts':>9}{'GB of experts':>15}{'of the floor':>14}{'against chunks':>16}"]
    for row in rows:
        chunked = row.ms("chunked")
        for way, found in row.results.items():
            ms, times = row.ms(way), row.times_floor(way)
            name = f"{row.name} {row.model} {row.dtype} {way}"
            read = "-" if found.expert_bytes is None else f"{found.expert_bytes / 1e9:.2f}"
            faster = "-" if not ms or not chunked else f"{chunked / ms:.2f}x"
            lines.append(
                f"{name:<40}{'-' if ms is None else f'{ms:.2f}':>9}{found.distinct or 0.0:>9.1f}{read:>15}"
                f"{'-' if times is None else f'{times:.3f}':>14}{faster:>16}"
            )
    return lines if rows else []


def prefill_verdicts(rows: Sequence[EngineRow], ways: Sequence[WaysRow], parts: Sequence[Part]) -> list[Verdict]:
    """Every target of performance.md 4 about prefill on one GPU, and those of layer-wise prefill, over whatever was measured.

    The targets stand for weights as drawn; those of spread routing stand beside them where they were measured.
    """
    found = prompt_verdicts([row for row in rows if row.case.routing == "drawn"])
    spread = prompt_verdicts([row for row in rows if row.case.routing == "spread"])
    found += [replace(verdict, target=f"{verdict.target}, spread") for verdict in spread if verdict.reached is not None]
    for row in ways:
        where = f"{row.name} {row.model} {row.dtype}"
        times, layered, chunked = row.times_floor("layered"), row.ms("layered"), row.ms("chunked")
        found += [
            Verdict(
                target=f"layered, {row.name}, {row.model} {row.dtype}: layers x D over bytes read",
                needed=round(1 / BYTES_OF_FLOOR, 3),
                reached=None if times is None else 1 / times,
                where=where,
            ),
            Verdict(
                target=f"layered, {row.name}, {row.model} {row.dtype}: against our chunks of 512",
                needed=AGAINST_CHUNKS,
                reached=None if not layered or not chunked else chunked / layered,
                where=where,
            ),
        ]
    return [*found, *arrival_verdicts(parts), *first_token_verdicts(parts)]
