"""A step's inputs in one launch against torch's operations one after the other. No floor: a few kilobytes, all of it latency."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bench.gpu_stopwatch import Call, Options, Row, gpu_bench, interleaved_us
from bench.stopwatch import refuse_unless
from duomo_kernels.decode_inputs import PLAN_COLUMNS, DecodeInputs, decode_inputs, decode_inputs_reference, empty_decode_inputs

BLOCK_TOKENS = 64
CALLS = 50  # as in a step: what it reads was written just before
CASES = [(rows, width) for width in (32, 512) for rows in (1, 32, 256)]


def peer(plan_RW: Tensor, last_token_R: Tensor, out: DecodeInputs) -> None:
    source_R, token_R, position_R, live_R = plan_RW[:, :PLAN_COLUMNS].unbind(1)
    is_live_R = live_R != 0
    sampled_R = last_token_R[source_R.clamp(min=0).long()]
    out.token_id_R.copy_(torch.where(is_live_R, torch.where(source_R >= 0, sampled_R, token_R), 0))
    out.position_R.copy_(torch.where(is_live_R, position_R, 0))
    out.length_R.copy_(torch.where(is_live_R, position_R + 1, 0))
    out.next_position_R.copy_(out.length_R)
    out.table_RW.copy_(plan_RW[:, PLAN_COLUMNS:])
    block_R = out.table_RW.gather(1, (position_R // BLOCK_TOKENS).long()[:, None])[:, 0].long()
    out.slot_R.copy_(torch.where(is_live_R, block_R * BLOCK_TOKENS + position_R % BLOCK_TOKENS, -1))
    out.num_valid.copy_(is_live_R.sum(0, keepdim=True))


def measure(options: Options) -> list[Row]:
    cases = [(f"{rows} rows, {width} blocks", rows, width) for rows, width in CASES]
    return [_row(case, rows, width, options) for case, rows, width in cases if options.only in case]


def _row(case: str, rows: int, width: int, options: Options) -> Row:
    plan_RW = torch.randint(0, 1 << 16, (rows, PLAN_COLUMNS + width), dtype=torch.int32)
    plan_RW[:, 0] = torch.randint(-1, rows, (rows,))
    plan_RW[:, 2] = torch.randint(0, width * BLOCK_TOKENS, (rows,))
    plan_RW[:, 3] = 1
    last_token_R = torch.randint(0, 1 << 16, (rows,), dtype=torch.int32)
    expected = decode_inputs_reference(plan_RW, last_token_R, BLOCK_TOKENS)
    given, out = (plan_RW.cuda(), last_token_R.cuda()), empty_decode_inputs(rows, width, torch.device("cuda"))
    calls: dict[str, Call] = {
        "ours": partial(decode_inputs, *given, BLOCK_TOKENS, out=out),
        "torch": partial(peer, *given, out),
    }
    for name, call in calls.items():
        call()
        is_same = all(torch.equal(getattr(out, field).cpu(), getattr(expected, field)) for field in DecodeInputs.__slots__)
        refuse_unless(is_same, f"decode_inputs, {name}")
    num_bytes = 2 * plan_RW.nbytes + rows * (4 + 8 + 8 + 3 * 4)
    return Row(
        case=case,
        times=interleaved_us({name: [call] * CALLS for name, call in calls.items()}, repeats=options.repeats),
        num_bytes=num_bytes,
    )


if __name__ == "__main__":
    gpu_bench("decode_inputs", measure)
