"""Measures prefill on one GPU: prompts by length and waves beside vLLM, ways of prefill, arrivals (`duomo bench prefill`).

    prompts     time to the first token of one prompt by length, and of waves: ours and vLLM as shipped (in process, in a process of its
                own) and with graphs to 4,096 tokens, same random weights, same prompts; distinct experts counted on both sides
    ways        one prompt of 8,192 tokens layered, in chunks of 512 and whole: times, and bytes of experts that were read
                (both with weights as drawn, and with routing spread over all experts: engine_cases.py)
    arrivals    both services in one process under a client: short prompts among long ones, prompts beside decode (arrivals_cases.py)

Children run one at a time (engine_campaign.py says what an interrupted run leaves, and the exit codes).

    duomo bench prefill                                               # everything: about 25 minutes
    duomo bench prefill --models olmoe --modes ours                   # one child: prompts and ways, its part is kept in --parts
    duomo bench prefill --models olmoe --modes ours_arrivals          # one child: the loads
    duomo bench prefill --models olmoe --side vllm                    # four children
    duomo bench prefill --merge                                       # no GPU: table, verdicts and plots from the parts

vLLM is found on sys.path or where DUOMO_BENCH_VLLM points.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from bench.engine.arrivals_cases import SCALES, loads_of
from bench.engine.arrivals_targets import arrivals_table
from bench.engine.engine_campaign import Asked, asked_of, conduct, configs, parser_of, wanted_names, write_report
from bench.engine.engine_cases import VLLM_MODES, Dtype, Job, Mode, Part
from bench.engine.engine_rows import join, table
from bench.engine.engine_targets import first_token_lines
from bench.engine.prefill_cases import PREFILL_CASES
from bench.engine.prefill_targets import prefill_verdicts, prompts_table, ways_rows, ways_table

OURS: tuple[Mode, ...] = ("ours", "ours_arrivals")
SIDES: Mapping[str, tuple[Mode, ...]] = {"both": (*OURS, *VLLM_MODES), "ours": OURS, "vllm": VLLM_MODES}


def parse(arguments: Sequence[str] | None = None) -> Asked:
    parser = parser_of("prefill", "prefill on one GPU, beside vLLM and in our own ways", modes=SIDES["both"], dtypes=("bf16",))
    options = parser.parse_args(arguments)
    loads = {model: [load.name for load in loads_of(scale)] for model, scale in SCALES.items()}
    every = dict.fromkeys([*(case.name for case in PREFILL_CASES), *(name for names in loads.values() for name in names)])
    names = wanted_names(parser, options.cases, list(every))

    def job_of(mode: Mode, model: str, dtype: Dtype) -> Job | None:
        if mode == "ours_arrivals":
            asked = tuple(name for name in loads[model] if name in names)
            return Job(mode=mode, model=model, dtype=dtype, cases=(), loads=asked, repeats=1, budget_s=1.0) if asked else None
        cases = tuple(case for case in PREFILL_CASES if case.name in names and (mode == "ours" or case.way == "whole"))
        return Job(mode=mode, model=model, dtype=dtype, cases=cases, repeats=1, budget_s=1.0) if cases else None

    return asked_of("prefill", parser, options, SIDES, job_of)


def report(parts: Sequence[Part], out: Path | None) -> Path:
    """Write the result file."""
    models = configs()
    rows = [row for row in join(parts, models) if row.case.way == "whole"]
    ways = ways_rows(parts, models)
    tables = [lines for lines in (table(rows) if rows else [], prompts_table(rows), ways_table(ways), arrivals_table(parts)) if lines]
    content = {
        "first_tokens": {name: list(found) for name, found in first_token_lines(parts)},
        "cases": [row.as_json() for row in rows if row.case.routing == "drawn"],
        "cases_spread": [row.as_json() for row in rows if row.case.routing == "spread"],
        "ways": [row.as_json() for row in ways],
        "arrivals": [
            {"model": part.job.model, "dtype": part.job.dtype, "loads": [asdict(one) for one in part.loads]} for part in parts if part.loads
        ],
        "table": [line for lines in tables for line in [*lines, ""]],
        "verdicts": [verdict.line() for verdict in prefill_verdicts(rows, ways, parts)],
    }
    return write_report("prefill", parts, out, content)


def main() -> int:
    from bench.engine.prefill_plot import draw

    return conduct(parse(), report, draw)


if __name__ == "__main__":
    sys.exit(main())
