"""Owns the Qwen3-MoE decoder on one device. Knows rows and a pool of KV, no sequences, batches or services.

Pre-norm decoder: x += attention(norm(x)); x += experts(norm(x)); logits = norm(x) @ lm_head (Qwen3 technical report, 2025).

Legend: T rows, D model, V vocabulary, E experts.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from duomo.models.config import ModelConfig, load_config, refuse_on_cpu
from duomo.models.layers.attention import AttentionPlan, AttentionWeights, attention_layer
from duomo.models.layers.experts import ExpertWeights, expert_layer
from duomo.models.weights import WeightFolder
from duomo_kernels.norm_rope import RmsWeight, rms_norm, rms_weight, rope_tables
from duomo_kernels.paged_attention import KvShape, prove_tail
from duomo_kernels.row_gemm import RowGemm, row_gemm_for

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer."""

    input_norm_D: RmsWeight
    attention: AttentionWeights
    post_norm_D: RmsWeight
    experts: ExpertWeights


class Model:
    """Weights and the forward of one layer; the runner owns the order of layers."""

    def __init__(self, config: ModelConfig, embed_VD: Tensor, layers: list[LayerWeights], norm_D: RmsWeight, lm_head_DV: Tensor) -> None:
        self.config = config
        self.embed_VD = embed_VD
        self.layers = layers
        self.norm_D = norm_D
        self.lm_head_DV = lm_head_DV
        self.cos_PC, self.sin_PC = rope_tables(config.max_position_tokens, config.head_dim, config.rope_theta)
        self.gemm: RowGemm = row_gemm_for(_gemm_shapes(config), config.head_dim)
        self.is_row_exact = prove_tail()

    def kv_shape(self, block_tokens: int) -> KvShape:
        """Heads and block of each layer's pool."""
        return KvShape(self.config.num_heads, self.config.num_kv_heads, self.config.head_dim, block_tokens)

    def embed(self, token_ids_T: Tensor) -> Tensor:
        """Token ids [T] -> rows [T, D]."""
        return self.embed_VD.index_select(0, token_ids_T)

    def layer(self, layer_idx: int, x_TD: Tensor, pool: Tensor, plan: AttentionPlan, shape: KvShape) -> tuple[Tensor, Tensor]:
        """One layer over the rows; x is changed in place. Returns (x [T, D], expert ids [T, K])."""
        weights = self.layers[layer_idx]
        x_TD += attention_layer(self.gemm, rms_norm(x_TD, weights.input_norm_D), weights.attention, pool, plan, shape)
        normed_TD = rms_norm(x_TD, weights.post_norm_D)
        mixed_TD, ids_TK = expert_layer(self.gemm, normed_TD, weights.experts, self.config.top_k, self.config.normalises_topk)
        x_TD += mixed_TD
        return x_TD, ids_TK

    def logits(self, x_TD: Tensor) -> Tensor:
        """Rows after the last layer [T, D] -> float32 [T, V]."""
        return self.gemm.mm(rms_norm(x_TD, self.norm_D), self.lm_head_DV)


def implementation_of(config: ModelConfig) -> str:
    """What this machine computes the model with, for logs and `duomo doctor` (the names: duomo_kernels/row_gemm.py). Raises ModelError."""
    refuse_on_cpu(config)
    gemm = row_gemm_for(_gemm_shapes(config), config.head_dim)
    exactness = (
        "rows are bit for bit free of their batch" if prove_tail() else "NOT proven free of the batch: results may differ in the last bits"
    )
    return f"products by {gemm.name}, {exactness}"


def _gemm_shapes(config: ModelConfig) -> tuple[tuple[int, int], ...]:
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    return (
        (config.hidden, heads),
        (config.num_heads * config.head_dim, config.hidden),
        (config.hidden, config.num_experts),
        (config.hidden, 2 * config.expert_hidden),
        (config.expert_hidden, config.hidden),
        (config.hidden, config.vocab),
    )


def load_model(folder: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu", progress: bool = False) -> Model:
    """Load a Hugging Face folder: safetensors in one or many files, bf16, f16, f32 or fp8 with block scales.

    Weights are kept with the summed axis first, in `dtype` (float32, the CPU engine's only one). Raises ModelError naming the file,
    tensor, shape or architecture at fault. progress shows a bar on stderr.
    """
    assert dtype is torch.float32 and device == "cpu", "the CPU engine computes in float32"
    config = load_config(folder)
    refuse_on_cpu(config)
    with WeightFolder(
        folder, config.quantisation, num_tensors=3 + config.num_layers * (9 + 3 * config.num_experts), progress=progress
    ) as weights:
        embed_VD = weights.take("model.embed_tokens.weight", (config.vocab, config.hidden))
        layers = [_load_layer(weights, config, index) for index in range(config.num_layers)]
        norm_D = rms_weight(weights.take("model.norm.weight", (config.hidden,)), config.norm_eps)
        head_VD = embed_VD if config.ties_embeddings else weights.take("lm_head.weight", (config.vocab, config.hidden))
    model = Model(config, embed_VD, layers, norm_D, head_VD.t().contiguous())
    log.log(
        logging.INFO if model.is_row_exact else logging.WARNING,
        "%s computes in float32, %s",
        config.architecture,
        implementation_of(config),
    )
    return model


def _load_layer(weights: WeightFolder, config: ModelConfig, index: int) -> LayerWeights:
    prefix, hidden, dim = f"model.layers.{index}.", config.hidden, config.head_dim
    num_q, num_kv = config.num_heads * dim, config.num_kv_heads * dim
    sizes = (("q", num_q), ("k", num_kv), ("v", num_kv))
    qkv = torch.cat([weights.take(f"{prefix}self_attn.{side}_proj.weight", (rows, hidden)) for side, rows in sizes])
    q_norm_C = weights.take(f"{prefix}self_attn.q_norm.weight", (dim,)) * dim**-0.5
    k_norm_C = weights.take(f"{prefix}self_attn.k_norm.weight", (dim,))
    qk_norm_HC = torch.cat((q_norm_C.expand(config.num_heads, dim), k_norm_C.expand(config.num_kv_heads, dim)))
    attention = AttentionWeights(
        qkv_DP=qkv.t().contiguous(),
        qk_norm_HC=rms_weight(qk_norm_HC, config.norm_eps),
        out_HD=weights.take(f"{prefix}self_attn.o_proj.weight", (hidden, num_q)).t().contiguous(),
    )
    gate_up, down = [], []
    for expert in range(config.num_experts):
        at = f"{prefix}mlp.experts.{expert}."
        pair = [weights.take(f"{at}{side}_proj.weight", (config.expert_hidden, hidden)) for side in ("gate", "up")]
        gate_up.append(torch.cat(pair).t().contiguous())
        down.append(weights.take(f"{at}down_proj.weight", (hidden, config.expert_hidden)).t().contiguous())
    gate_ED = weights.take(f"{prefix}mlp.gate.weight", (config.num_experts, hidden))
    return LayerWeights(
        input_norm_D=rms_weight(weights.take(f"{prefix}input_layernorm.weight", (hidden,)), config.norm_eps),
        attention=attention,
        post_norm_D=rms_weight(weights.take(f"{prefix}post_attention_layernorm.weight", (hidden,)), config.norm_eps),
        experts=ExpertWeights(gate_ED.t().contiguous(), gate_up, down),
    )
