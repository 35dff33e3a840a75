"""Configurations of published models, as their config.json says."""

from __future__ import annotations

from dataclasses import replace

from duomo.models.config import ModelConfig

OLMOE = ModelConfig(
    architecture="OlmoeForCausalLM",
    num_layers=16,
    hidden=2048,
    num_heads=16,
    num_kv_heads=16,
    head_dim=128,
    num_experts=64,
    top_k=8,
    expert_hidden=1024,
    vocab=50304,
    max_position_tokens=4096,
    norm_eps=1e-5,
    rope_theta=1e4,
    normalises_topk=False,
    ties_embeddings=False,
    eos_ids=(50279,),
    quantisation=None,
    fingerprint="",
    qk_norm="whole",
    has_router=True,
)
QWEN3_30B = replace(
    OLMOE,
    architecture="Qwen3MoeForCausalLM",
    num_layers=48,
    num_heads=32,
    num_kv_heads=4,
    num_experts=128,
    expert_hidden=768,
    vocab=151936,
    max_position_tokens=40960,
    normalises_topk=True,
    qk_norm="head",
)
MIXTRAL = replace(
    OLMOE,
    architecture="MixtralForCausalLM",
    num_layers=32,
    hidden=4096,
    num_heads=32,
    num_kv_heads=8,
    num_experts=8,
    top_k=2,
    expert_hidden=14336,
    vocab=32000,
    max_position_tokens=32768,
    normalises_topk=True,
    qk_norm="none",
)
