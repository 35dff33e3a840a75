"""Measures our engine beside vLLM's on one GPU: decode by batch and context, prefill by length (`duomo bench engine`).

Same random weights (drawn by name in both), same prompts, greedy; each engine in a child process, one at a time (engine_campaign.py says
what an interrupted run leaves, and the exit codes). A wrong result is not reported, and the file is called .red.json.

    duomo bench engine                                                # everything: about half an hour
    duomo bench engine --models olmoe --dtypes bf16 --side ours       # two children: their parts are kept in --parts
    duomo bench engine --models olmoe --dtypes bf16 --side vllm       # four children
    duomo bench engine --merge                                        # no GPU: table, verdicts and plots from the parts

vLLM is found on sys.path or where DUOMO_BENCH_VLLM points.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.engine.engine_campaign import Asked, asked_of, conduct, configs, parser_of, wanted_names, write_report
from bench.engine.engine_cases import CASES, DTYPES, VLLM_MODES, Dtype, EngineCase, Job, Mode, Part
from bench.engine.engine_rows import join, table
from bench.engine.engine_targets import first_token_lines, verdicts

OURS: tuple[Mode, ...] = ("ours", "ours_deterministic")
SIDES: Mapping[str, tuple[Mode, ...]] = {"both": (*OURS, *VLLM_MODES), "ours": OURS, "vllm": VLLM_MODES}


def parse(arguments: Sequence[str] | None = None) -> Asked:
    parser = parser_of("engine", "our engine beside vLLM's on one GPU", modes=SIDES["both"], dtypes=DTYPES)
    options = parser.parse_args(arguments)
    names = wanted_names(parser, options.cases, [case.name for case in CASES])
    cases = tuple(case for case in CASES if case.name in names)

    def job_of(mode: Mode, model: str, dtype: Dtype) -> Job | None:
        asked = tuple(case for case in cases if _is_of(mode, case))
        return Job(mode=mode, model=model, dtype=dtype, cases=asked, repeats=1, budget_s=1.0) if asked else None

    return asked_of("engine", parser, options, SIDES, job_of)


def _is_of(mode: Mode, case: EngineCase) -> bool:
    """More captured sizes change nothing for a decode step: graphs of up to 512 rows are there as shipped."""
    if mode == "vllm_extended":
        return case.phase == "prefill"
    return mode != "ours_deterministic" or case.phase == "decode"


def report(parts: Sequence[Part], out: Path | None) -> Path:
    """Write the result file."""
    rows = join(parts, configs())
    content = {
        "first_tokens": {name: list(found) for name, found in first_token_lines(parts)},
        "cases": [row.as_json() for row in rows],
        "table": table(rows),
        "verdicts": [verdict.line() for verdict in verdicts(rows, parts)],
    }
    return write_report("engine", parts, out, content)


def main() -> int:
    from bench.engine.engine_plot import draw

    return conduct(parse(), report, draw)


if __name__ == "__main__":
    sys.exit(main())
