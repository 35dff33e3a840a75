"""Small random decoders of every family, in transformers and as the GPU's tensors, with numbers that make mistakes visible.

Weights are spread as 1 / sqrt(summed axis), so that no part of a layer drowns in the residual and scores of attention and router differ by
about one; norms lie between one half and one and a half. All are rounded to the format of the kernels before either model takes them.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from duomo.models.config import ModelConfig, load_config
from duomo.models.gpu_weights import GpuLayer, GpuWeights, LinearWeights
from duomo_kernels._bounds import bound
from duomo_kernels._weights import ExpertWeights
from duomo_kernels.norm_rope import rope_tables
from duomo_kernels.qk_rope_write import QkNorm, RopeTables

FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, {"norm_topk_prob": True}),
    "olmoe": (OlmoeConfig, OlmoeForCausalLM, {"norm_topk_prob": False}),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {}),
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"tie_word_embeddings": True}),
}
DENSE = ("llama", "qwen3")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a model; head_dim * num_heads need not be hidden (but for OLMoE, whose norms are as wide as hidden)."""

    num_layers: int = 2
    hidden: int = 64
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    num_experts: int = 5
    top_k: int = 2
    expert_hidden: int = 48
    vocab: int = 100


@dataclass(frozen=True)
class SmallDecoder:
    """The same model twice: transformers' in float64 on the CPU, and the kernels' tensors."""

    theirs: Any
    weights: GpuWeights

    @torch.inference_mode()
    def their_logits(self, token_ids: list[int]) -> Tensor:
        """float64 [T, V]; norms and the router's softmax are float32 inside, whatever the model is."""
        logits: Tensor = self.theirs(torch.tensor([token_ids])).logits[0]
        return logits


def decoder_bound(dtype: torch.dtype, num_layers: int) -> float:
    """What error() of a decoder's logits may be.

    A block (attention with its norm, or the experts with theirs) rounds at most twelve times between residual and residual: by itself it
    is within bound(dtype). What its input was wrong by it hands on in proportion (products by random matrices keep ratios of lengths, the
    norm takes lengths out), and the residual, of which each block's answer is one term among equals, adds it in squares: so after 2 L
    blocks, the last norm and the head as one more, and the embedding's exact start, the error is sqrt(2 L + 1) of one block's.
    """
    return float(bound(dtype) * (2 * num_layers + 1) ** 0.5)


def small_decoder(family: str, *, dtype: torch.dtype, device: torch.device, sizes: Sizes | None = None, seed: int = 0) -> SmallDecoder:
    """Random weights, rounded to dtype in both."""
    sizes = Sizes() if sizes is None else sizes
    config_class, model_class, extra = FAMILIES[family]
    config = config_class(**_keys(family, sizes) | extra, architectures=[model_class.__name__], attn_implementation="eager")
    config._experts_implementation = "eager"  # the others take no float64
    theirs = model_class(config).double().eval()
    made = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in theirs.parameters():
            drawn = torch.rand(parameter.shape, generator=made) + 0.5
            if parameter.ndim > 1:
                spread = 1.0 if parameter.shape[0] == sizes.vocab else parameter.shape[-1] ** -0.5
                drawn = torch.randn(parameter.shape, generator=made) * spread
            parameter.copy_(drawn.to(dtype).double())
    return SmallDecoder(theirs, weights_of(theirs, dtype, device))


def _keys(family: str, sizes: Sizes) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.expert_hidden,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.num_kv_heads,
        "head_dim": sizes.head_dim,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "eos_token_id": 2,
        "bos_token_id": 1,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    if family not in DENSE:
        count = "num_local_experts" if family == "mixtral" else "num_experts"
        keys |= {count: sizes.num_experts, "num_experts_per_tok": sizes.top_k}
    if family == "qwen3_moe":
        keys |= {"moe_intermediate_size": sizes.expert_hidden}
    return keys


def config_of(theirs: Any) -> ModelConfig:
    """What duomo reads in the config.json that transformers writes."""
    with tempfile.TemporaryDirectory() as folder:
        theirs.config.save_pretrained(folder)
        return load_config(Path(folder), needs_weights=False)


def weights_of(theirs: Any, dtype: torch.dtype, device: torch.device) -> GpuWeights:
    """transformers' parameters in the kernels' order."""
    config, state = config_of(theirs), theirs.state_dict()

    def take(name: str) -> Tensor:
        taken: Tensor = state[name].to(device, dtype)
        return taken.contiguous()

    def layer(at: str) -> GpuLayer:
        qk_norm = None
        if config.qk_norm != "none":
            q_weight, k_weight = take(f"{at}self_attn.q_norm.weight"), take(f"{at}self_attn.k_norm.weight")
            qk_norm = QkNorm(q_weight=q_weight, k_weight=k_weight, eps=config.norm_eps)
        if config.has_router:
            experts = ExpertWeights(gate_up_EFD=take(f"{at}mlp.experts.gate_up_proj"), down_EDF=take(f"{at}mlp.experts.down_proj"))
        else:
            gate_up = torch.cat([take(f"{at}mlp.{side}_proj.weight") for side in ("gate", "up")])
            experts = ExpertWeights(gate_up_EFD=gate_up[None], down_EDF=take(f"{at}mlp.down_proj.weight")[None])
        return GpuLayer(
            input_norm_D=take(f"{at}input_layernorm.weight"),
            qkv=LinearWeights(weight_NK=torch.cat([take(f"{at}self_attn.{side}_proj.weight") for side in ("q", "k", "v")])),
            qk_norm=qk_norm,
            out=LinearWeights(weight_NK=take(f"{at}self_attn.o_proj.weight")),
            post_norm_D=take(f"{at}post_attention_layernorm.weight"),
            router_ED=take(f"{at}mlp.gate.weight") if config.has_router else None,
            experts=experts,
        )

    cos_PD, sin_PD = rope_tables(config.max_position_tokens, config.head_dim, config.rope_theta)
    embed_VD = take("model.embed_tokens.weight")
    return GpuWeights(
        config=config,
        embed_VD=embed_VD,
        layers=tuple(layer(f"model.layers.{index}.") for index in range(config.num_layers)),
        norm_D=take("model.norm.weight"),
        head_VD=embed_VD if config.ties_embeddings else take("lm_head.weight"),
        rope=RopeTables(cos_PD=cos_PD.to(device), sin_PD=sin_PD.to(device)),
    )
