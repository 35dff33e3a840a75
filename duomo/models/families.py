"""Owns what sets one family of decoders apart: its norms, its config.json's keys and defaults, its checkpoints' names. Knows no torch.

A default is what the family's own code (transformers) takes where a published config.json leaves the key out. A dense family is read as
one expert that every token takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

QkNormKind = Literal["none", "head", "whole"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """qk_norm: over each head, over the whole projection, or none. normalises_topk None: config.json says so (norm_topk_prob).

    expert_hidden and num_experts name keys of config.json, num_experts in both spellings that are in use; none: dense. router, experts,
    gate, up, down: parts of a layer's tensor names, `experts` with the expert's number in it.
    """

    qk_norm: QkNormKind
    expert_hidden: str = "intermediate_size"
    num_experts: tuple[str, ...] = ()
    normalises_topk: bool | None = None
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_types: tuple[str, ...] = ("default",)
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    can_omit_kv_heads: bool = False  # num_key_value_heads may be missing: as many as query heads
    router: str = "mlp.gate.weight"
    experts: str = "mlp.experts.{expert}."
    gate: str = "gate_proj.weight"
    up: str = "up_proj.weight"
    down: str = "down_proj.weight"

    @property
    def is_dense(self) -> bool:
        return not self.num_experts


_EXPERTS = ("num_experts", "num_local_experts")

FAMILIES = {
    "Qwen3MoeForCausalLM": Family(qk_norm="head", expert_hidden="moe_intermediate_size", num_experts=_EXPERTS),
    "OlmoeForCausalLM": Family(qk_norm="whole", num_experts=_EXPERTS, norm_eps=1e-5, can_omit_kv_heads=True),
    "MixtralForCausalLM": Family(
        qk_norm="none",
        num_experts=("num_local_experts", "num_experts"),
        normalises_topk=True,
        norm_eps=1e-5,
        rope_theta=1e6,
        router="block_sparse_moe.gate.weight",
        experts="block_sparse_moe.experts.{expert}.",
        gate="w1.weight",
        up="w3.weight",
        down="w2.weight",
    ),
    "LlamaForCausalLM": Family(
        qk_norm="none", normalises_topk=True, rope_types=("default", "llama3"), can_omit_kv_heads=True, experts="mlp."
    ),
    "Qwen3ForCausalLM": Family(qk_norm="head", normalises_topk=True, head_dim=128, experts="mlp."),
}
