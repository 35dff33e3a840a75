"""Rows of KV to fp8 and back on a CPU, against a copy of the same numbers, the floor."""

from __future__ import annotations

import torch

from bench.stopwatch import Measured, refuse_unless, report, side_by_side
from duomo_kernels.kv_rows_fp8 import kv_rows_fp8, kv_rows_fp8_reference, kv_rows_of_fp8, packed_bytes


def measure(repeats: int) -> list[Measured]:
    results = []
    for num_rows, head_dim in ((512, 64), (2048, 128), (16384, 128)):
        x_RD = torch.randn(num_rows, head_dim)
        packed_P = torch.empty(packed_bytes(num_rows, head_dim), dtype=torch.uint8)
        kv_rows_fp8(x_RD[:64], packed_P[: packed_bytes(64, head_dim)])
        refuse_unless(torch.equal(packed_P[: packed_bytes(64, head_dim)], kv_rows_fp8_reference(x_RD[:64])), "kv_rows_fp8")
        back_RD = torch.empty_like(x_RD)
        kv_rows_fp8(x_RD, packed_P)
        kv_rows_of_fp8(packed_P, back_RD)
        refuse_unless(bool(((back_RD - x_RD).abs() <= x_RD.abs() * 2**-4 + 2**-10 * x_RD.abs().amax() / 224).all()), "kv_rows_of_fp8")
        copy = lambda a=back_RD, b=x_RD: a.copy_(b)  # noqa: E731 - a case, not a function
        pack = lambda x=x_RD, p=packed_P: kv_rows_fp8(x, p)  # noqa: E731 - a case, not a function
        land = lambda x=back_RD, p=packed_P: kv_rows_of_fp8(p, x)  # noqa: E731 - a case, not a function
        results.append(side_by_side(f"pack {num_rows} rows of {head_dim}", pack, "copy_", copy, repeats=repeats))
        results.append(side_by_side(f"land {num_rows} rows of {head_dim}", land, "copy_", copy, repeats=repeats))
    return results


if __name__ == "__main__":
    report("kv_rows_fp8", measure)
