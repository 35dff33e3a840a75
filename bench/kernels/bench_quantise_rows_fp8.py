"""Activations to fp8 with a scale for 128 columns, against torch's plain conversion of the same elements. Floor: every byte once."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bench.gpu_stopwatch import Call, Options, Row, gpu_bench, interleaved_us, num_sets
from bench.stopwatch import refuse_unless
from duomo_kernels._bounds import bound, error
from duomo_kernels.quantise_rows_fp8 import dequantise_rows, num_groups, quantise_rows_fp8

FP8 = torch.float8_e4m3fn
CASES = [(tokens, width) for width in (2048, 7168) for tokens in (16, 64, 1024, 16_384)]


def peer(x_TD: Tensor) -> Tensor:
    """No scales, so less work."""
    return x_TD.to(FP8)


def measure(options: Options) -> list[Row]:
    rows = []
    for tokens, width in CASES:
        case = f"{tokens} tokens x {width}"
        if options.only not in case:
            continue
        num_bytes = 3 * tokens * width + 4 * tokens * num_groups(width)
        sets = [torch.randn(tokens, width, device="cuda").bfloat16() for _ in range(num_sets(num_bytes))]
        wide_TD = dequantise_rows(*quantise_rows_fp8(sets[0]))
        wrong = error(wide_TD, sets[0].double())
        refuse_unless(wrong <= bound(FP8), f"quantise_rows_fp8 (error {wrong:.3g})")
        calls: dict[str, list[Call]] = {
            "ours": [partial(quantise_rows_fp8, x) for x in sets],
            "torch .to()": [partial(peer, x) for x in sets],
        }
        rows.append(Row(case=case, times=interleaved_us(calls, repeats=options.repeats), num_bytes=num_bytes, error=wrong))
    return rows


if __name__ == "__main__":
    gpu_bench("quantise_rows_fp8", measure)
