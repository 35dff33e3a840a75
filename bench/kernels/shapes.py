"""Owns the layers that are measured: their sizes, their floors, and inputs made for them. Knows no kernel and no peer.

    distinct experts    D(T) = E (1 - (1 - K / E)^T) if the router is uniform; the benches count them instead
    bytes               D * 3 * hidden * dim * (bytes a weight) + 2 * T * dim * 2      each chosen expert once, the rows in and out
    operations          6 * T * K * hidden * dim
    floor               the larger of bytes at 3.0 TB/s and operations at 790 TFLOP/s (bench/gpu_stopwatch.py)

Routing is injected through the router's bias: logits = Gumbel noise + log(popularity), whose top K is a draw of K experts without
replacement by popularity: even, or Zipf with exponent 1.0 over a shuffled order of the experts.

Legend: T tokens, K experts a token, E experts, D model, F expert hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from bench.gpu_stopwatch import SEEN_BF16_FLOP_PER_S, SEEN_FP8_FLOP_PER_S, floor_us
from duomo_kernels._routing import GateRule
from duomo_kernels._weights import SCALE_BLOCK, ExpertWeights

Skew = Literal["uniform", "zipf"]
SKEWS: tuple[Skew, ...] = ("uniform", "zipf")
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
WEIGHT_STD = 0.02
FP8_SPREAD = 64.0  # standard deviation of the stored values: seven of them are 448, the largest e4m3


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerShape:
    """One MoE layer. Heads are those of the model's attention, 0 where it is of another kind. is_target: the tables were tuned for it."""

    name: str
    title: str
    dim: int
    hidden: int
    num_experts: int
    rule: GateRule
    num_q_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int = 128
    is_target: bool = False
    tokens: tuple[int, ...] = field(default=TOKENS)

    @property
    def top_k(self) -> int:
        return self.rule.top_k

    @property
    def weights_per_expert(self) -> int:
        return 3 * self.hidden * self.dim

    def expected_distinct(self, num_tokens: int) -> float:
        """Experts that a uniform router chooses for so many tokens."""
        return float(self.num_experts * (1 - (1 - self.top_k / self.num_experts) ** num_tokens))

    def num_bytes(self, num_tokens: int, distinct: float, is_fp8: bool = False) -> float:
        scales = 4 / SCALE_BLOCK**2 if is_fp8 else 0.0
        return distinct * self.weights_per_expert * ((1 if is_fp8 else 2) + scales) + 2 * num_tokens * self.dim * 2

    def num_flop(self, num_tokens: int) -> float:
        return 2.0 * num_tokens * self.top_k * self.weights_per_expert

    def floor_us(self, num_tokens: int, distinct: float, is_fp8: bool = False) -> float:
        rate = SEEN_FP8_FLOP_PER_S if is_fp8 else SEEN_BF16_FLOP_PER_S
        return floor_us(self.num_bytes(num_tokens, distinct, is_fp8), self.num_flop(num_tokens), rate)

    def layer_bytes(self, is_fp8: bool = False) -> int:
        """Bytes of one set of weights."""
        return self.num_experts * self.weights_per_expert * (1 if is_fp8 else 2)


_FEW = (1, 8, 64, 256, 1024, 4096, 16384)  # what shapes that nobody tuned are measured at
_SHAPES = (
    LayerShape(
        name="olmoe", title="OLMoE-1B-7B", dim=2048, hidden=1024, num_experts=64, rule=GateRule(top_k=8),
        num_q_heads=16, num_kv_heads=16, is_target=True,
    ),
    LayerShape(
        name="qwen3", title="Qwen3-30B-A3B", dim=2048, hidden=768, num_experts=128, rule=GateRule(top_k=8, normalise=True),
        num_q_heads=32, num_kv_heads=4, is_target=True,
    ),
    LayerShape(
        name="mixtral", title="Mixtral-8x7B", dim=4096, hidden=14336, num_experts=8, rule=GateRule(top_k=2, normalise=True),
        num_q_heads=32, num_kv_heads=8, tokens=_FEW,
    ),
    LayerShape(
        name="deepseek-v3", title="DeepSeek-V3 (routed)", dim=7168, hidden=2048, num_experts=256, tokens=(1, 8, 64, 256, 1024, 4096),
        rule=GateRule(top_k=8, scoring="sigmoid", normalise=True, num_groups=8, top_groups=4, routed_scale=2.5),
    ),
    LayerShape(
        name="phi-3.5", title="Phi-3.5-MoE", dim=4096, hidden=6400, num_experts=16, rule=GateRule(top_k=2, normalise=True),
        num_q_heads=32, num_kv_heads=8, tokens=_FEW,
    ),
    LayerShape(
        name="deepseek-v2-lite", title="DeepSeek-V2-Lite", dim=2048, hidden=1408, num_experts=64, rule=GateRule(top_k=6), tokens=_FEW,
    ),
    LayerShape(
        name="qwen1.5", title="Qwen1.5-MoE-A2.7B", dim=2048, hidden=1408, num_experts=60, rule=GateRule(top_k=4),
        num_q_heads=16, num_kv_heads=16, tokens=_FEW,
    ),
)  # fmt: skip
SHAPES: dict[str, LayerShape] = {shape.name: shape for shape in _SHAPES}


def seeded(seed: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(seed)


def make_logits(shape: LayerShape, num_tokens: int, skew: Skew, generator: torch.Generator) -> Tensor:
    """[T, E] float32: a draw of K experts a token without replacement, by even or by Zipf popularity."""
    device = generator.device
    uniform_TE = torch.rand(num_tokens, shape.num_experts, generator=generator, device=device).clamp_(1e-7, 1 - 1e-7)
    logits_TE = -torch.log(-torch.log(uniform_TE))
    if skew == "zipf":
        rank_E = torch.randperm(shape.num_experts, generator=generator, device=device)
        logits_TE -= torch.log(rank_E + 1.0)
    return logits_TE


def make_rows(shape: LayerShape, num_tokens: int, generator: torch.Generator) -> Tensor:
    """x [T, D] bf16, normal."""
    return torch.empty(num_tokens, shape.dim, dtype=torch.bfloat16, device=generator.device).normal_(generator=generator)


def make_weights(shape: LayerShape, generator: torch.Generator) -> ExpertWeights:
    """One set in bf16, normal with deviation 0.02."""

    def normal(*size: int) -> Tensor:
        return torch.empty(*size, dtype=torch.bfloat16, device=generator.device).normal_(std=WEIGHT_STD, generator=generator)

    return ExpertWeights(
        gate_up_EFD=normal(shape.num_experts, 2 * shape.hidden, shape.dim),
        down_EDF=normal(shape.num_experts, shape.dim, shape.hidden),
    )


def make_fp8_weights(shape: LayerShape, generator: torch.Generator) -> ExpertWeights:
    """One set in e4m3 with scales of 128 x 128 blocks, of the same spread; scales differ by up to a fifth, so that a mixed-up one shows."""

    def stored(*size: int) -> Tensor:
        out = torch.empty(*size, dtype=torch.float8_e4m3fn, device=generator.device)
        for expert in out:  # one expert at a time: a bf16 copy of all would need twice the memory
            values = torch.empty(*size[1:], dtype=torch.bfloat16, device=generator.device).normal_(std=FP8_SPREAD, generator=generator)
            expert.copy_(values.clamp_(-448, 448))
        return out

    def scales(rows: int, columns: int) -> Tensor:
        blocks = (shape.num_experts, -(-rows // SCALE_BLOCK), -(-columns // SCALE_BLOCK))
        spread = torch.rand(*blocks, generator=generator, device=generator.device) * 0.4 + 0.8
        return spread * (WEIGHT_STD / FP8_SPREAD)

    return ExpertWeights(
        gate_up_EFD=stored(shape.num_experts, 2 * shape.hidden, shape.dim),
        down_EDF=stored(shape.num_experts, shape.dim, shape.hidden),
        gate_up_scale_Efd=scales(2 * shape.hidden, shape.dim),
        down_scale_Edf=scales(shape.dim, shape.hidden),
    )
