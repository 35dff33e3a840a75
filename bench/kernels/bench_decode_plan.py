"""The plan of a step's decode attention, once for all layers: one launch of a chain. Floor: the table read and the plan written."""

from __future__ import annotations

from functools import partial

import torch

from bench.gpu_stopwatch import Options, Row, cold_graph_us, gpu_bench
from bench.kernels.bench_decode_attention import cases, make_inputs, shape_of
from bench.stopwatch import refuse_unless
from duomo_kernels._decode_pieces import allocate_plan
from duomo_kernels.decode_plan import decode_plan, decode_plan_reference

BLOCK_TOKENS = 16
CHAIN = 50  # calls in one graph, each after the one before, as in a step whose other kernels are small too


def measure(options: Options) -> list[Row]:
    rows, device = [], torch.device("cuda")
    for case in cases():
        if options.only not in case.name:
            continue
        inputs, shape = make_inputs(case), shape_of(case, BLOCK_TOKENS)
        plan = allocate_plan(shape, device)
        lengths_S, table_SB = inputs.lengths_S, inputs.tables[BLOCK_TOKENS]
        decode_plan(lengths_S, table_SB, plan)
        right = decode_plan_reference(lengths_S, table_SB, shape, plan.config)
        tiles = sum(-(-length // plan.config.block_keys) for length in case.lengths)
        for part, of in ((plan.words_T, right.words_T), (plan.tiles_T, right.tiles_T), (plan.blocks_TB, right.blocks_TB)):
            refuse_unless(torch.equal(part[:tiles], of[:tiles]), f"{case.name}: tiles")
        refuse_unless(torch.equal(plan.runs_C8, right.runs_C8) and torch.equal(plan.merges_S2, right.merges_S2), f"{case.name}: runs")
        time = cold_graph_us([partial(decode_plan, lengths_S, table_SB, plan)] * CHAIN, repeats=options.repeats)
        rows.append(Row(case=case.name, times={"ours": time}, num_bytes=tiles * (12 + 8 * plan.blocks_TB.shape[1]), error=0.0))
        print(rows[-1].line(), flush=True)
    return rows


if __name__ == "__main__":
    gpu_bench("decode_plan", measure)
