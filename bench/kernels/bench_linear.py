"""Dense products of the models' layers, after the norm that comes before them in a step, against torch.mm after the same norm.

Ours asks for its weights while the norm still runs, so the two are timed together; `about` holds the norm alone. Floor: the weights once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.gpu_stopwatch import Options, Row, checked, gpu_bench, interleaved_us, num_sets
from duomo_kernels.add_rms_norm import add_rms_norm
from duomo_kernels.linear import linear, linear_reference

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 1024)
MOST_SETS = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """One weight; is_wide: float32 comes out."""

    name: str
    outputs: int
    inputs: int
    is_wide: bool = False
    is_fp8: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """One call's tensors."""

    x_TK: Tensor
    weight_NK: Tensor
    scale_nk: Tensor | None


PRODUCTS = [
    Product(name="OLMoE qkv", outputs=6144, inputs=2048),
    Product(name="OLMoE out", outputs=2048, inputs=2048),
    Product(name="OLMoE router", outputs=64, inputs=2048, is_wide=True),
    Product(name="OLMoE head", outputs=50304, inputs=2048, is_wide=True),
    Product(name="Qwen3-30B qkv", outputs=5120, inputs=2048),
    Product(name="Qwen3-30B out", outputs=2048, inputs=4096),
    Product(name="Qwen3-30B router", outputs=128, inputs=2048, is_wide=True),
    Product(name="Qwen3-30B head", outputs=151936, inputs=2048, is_wide=True),
    Product(name="Mixtral qkv", outputs=6144, inputs=4096),
    Product(name="Mixtral out", outputs=4096, inputs=4096),
    Product(name="OLMoE qkv fp8", outputs=6144, inputs=2048, is_fp8=True),
    Product(name="OLMoE out fp8", outputs=2048, inputs=2048, is_fp8=True),
    Product(name="Qwen3-30B qkv fp8", outputs=5120, inputs=2048, is_fp8=True),
    Product(name="Qwen3-30B out fp8", outputs=2048, inputs=4096, is_fp8=True),
]


def measure(options: Options) -> list[Row]:
    cases = [(f"{product.name} {tokens} tokens", product, tokens) for product in PRODUCTS for tokens in TOKENS]
    return [_row(case, product, tokens, options) for case, product, tokens in cases if options.only in case]


def _row(case: str, product: Product, tokens: int, options: Options) -> Row:
    out_dtype = torch.float32 if product.is_wide else BF16
    num_bytes = product.outputs * product.inputs * (1 if product.is_fp8 else 2)
    sets = [_inputs(product, tokens) for _ in range(min(MOST_SETS, num_sets(num_bytes)))]
    one, gain_K = sets[0], torch.ones(product.inputs, device="cuda", dtype=BF16)
    out_TN = linear(one.x_TK, one.weight_NK, one.scale_nk, out_dtype=out_dtype)
    wrong = checked("linear", out_TN, linear_reference(one.x_TK, one.weight_NK, one.scale_nk))
    normed_TK = torch.empty_like(one.x_TK)

    def norm(given: Inputs) -> None:
        add_rms_norm(given.x_TK, gain_K, 1e-6, out_TD=normed_TK)

    def ours(given: Inputs) -> None:
        norm(given)
        linear(normed_TK, given.weight_NK, given.scale_nk, out=out_TN)

    def peer(given: Inputs) -> None:
        norm(given)
        if product.is_wide:
            torch.mm(normed_TK, given.weight_NK.t(), out_dtype=out_dtype, out=out_TN)
        else:
            torch.mm(normed_TK, given.weight_NK.t(), out=out_TN)

    sides = {"ours": [partial(ours, each) for each in sets], "norm": [partial(norm, each) for each in sets]}
    if not product.is_fp8:
        sides["torch.mm"] = [partial(peer, each) for each in sets]
    times = interleaved_us(sides, repeats=options.repeats)
    norm_us = times.pop("norm").median_us
    num_bytes += 2 * tokens * product.inputs + out_TN.nbytes
    num_flop = 2.0 * tokens * product.outputs * product.inputs
    return Row(case=case, times=times, num_bytes=num_bytes, num_flop=num_flop, error=wrong, about={"norm_us": norm_us})


def _inputs(product: Product, tokens: int) -> Inputs:
    x_TK = torch.randn(tokens, product.inputs, device="cuda", dtype=BF16)
    weight_NK = torch.randn(product.outputs, product.inputs, device="cuda", dtype=BF16)
    if not product.is_fp8:
        return Inputs(x_TK=x_TK, weight_NK=weight_NK.mul_(0.02), scale_nk=None)
    scale_nk = torch.rand(-(-product.outputs // 128), -(-product.inputs // 128), device="cuda").mul_(1e-3).add_(1e-4)
    return Inputs(x_TK=x_TK, weight_NK=weight_NK.mul_(60).to(FP8), scale_nk=scale_nk)


if __name__ == "__main__":
    gpu_bench("linear", measure)
