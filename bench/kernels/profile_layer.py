"""Runs one MoE layer a few times, for a profiler to look at: nothing is timed here.

    ncu --clock-control none --kernel-name regex:"_up_kernel|_down" --launch-skip 4 --launch-count 2 \\
        --section SpeedOfLight --section MemoryWorkloadAnalysis --section ComputeWorkloadAnalysis --section WarpStateStats \\
        python bench/kernels/profile_layer.py --shape olmoe --tokens 8192
"""

from __future__ import annotations

import argparse

import torch

from bench.gpu_stopwatch import require_gpu
from bench.kernels.shapes import SHAPES, make_logits, make_rows, make_weights, seeded
from duomo_kernels.moe_layer import moe_layer


def main() -> None:
    parser = argparse.ArgumentParser(description="a few calls of one MoE layer, for a profiler")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="olmoe")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--calls", type=int, default=4)
    options = parser.parse_args()
    require_gpu("profile_layer")
    shape, generator = SHAPES[options.shape], seeded(1, torch.device("cuda"))
    weights = make_weights(shape, generator)
    logits_TE, x_TD = make_logits(shape, options.tokens, "uniform", generator), make_rows(shape, options.tokens, generator)
    for _ in range(options.calls):
        moe_layer(logits_TE, x_TD, weights, shape.rule)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
