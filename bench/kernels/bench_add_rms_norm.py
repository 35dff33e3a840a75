"""Residual addition and RMS norm in one pass, against torch's addition and norm one after the other. Floor: every byte once."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bench.gpu_stopwatch import Options, Row, checked, gpu_bench, interleaved_us, num_sets
from duomo_kernels.add_rms_norm import add_rms_norm, add_rms_norm_reference

EPS = 1e-6
CASES = [(tokens, width) for width in (2048, 4096) for tokens in (1, 64, 256, 4096, 16_384)]


def peer(x_TD: Tensor, weight_D: Tensor, residual_TD: Tensor) -> Tensor:
    """Two kernels of torch; the norm reads the rounded sum."""
    return torch.nn.functional.rms_norm(residual_TD.add_(x_TD), x_TD.shape[-1:], weight_D, EPS)


def measure(options: Options) -> list[Row]:
    rows = []
    for tokens, width in CASES:
        case = f"{tokens} tokens x {width}"
        if options.only not in case:
            continue
        num_bytes = 8 * tokens * width + 2 * width  # x and residual read, residual and y written, bf16
        sets = [_inputs(tokens, width) for _ in range(num_sets(num_bytes))]
        x_TD, weight_D, residual_TD, _ = sets[0]
        expected_TD, _ = add_rms_norm_reference(x_TD, weight_D, EPS, residual_TD)
        error = checked("add_rms_norm", add_rms_norm(x_TD, weight_D, EPS, residual_TD.clone()), expected_TD)
        del expected_TD
        for one in sets:
            one[0].mul_(1e-6)  # added at every replay, for ever: too small to move the residual
        calls = {
            "ours": [partial(add_rms_norm, x, w, EPS, r, out_TD=o) for x, w, r, o in sets],
            "torch": [partial(peer, x, w, r) for x, w, r, _ in sets],
        }
        rows.append(Row(case=case, times=interleaved_us(calls, repeats=options.repeats), num_bytes=num_bytes, error=error))
    return rows


def _inputs(tokens: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x_TD, residual_TD, out_TD = (torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    return x_TD, torch.randn(width, device="cuda", dtype=torch.bfloat16), residual_TD, out_TD


if __name__ == "__main__":
    gpu_bench("add_rms_norm", measure)
