"""Small random decoders of every family, in transformers and loaded for a GPU, with numbers that make mistakes visible.

Weights are spread as 1 / sqrt(summed axis), so that no part of a layer drowns in the residual and scores of attention and router differ by
about one; norms lie between one half and one and a half. All are rounded to the format of the kernels before either model takes them.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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

from duomo.models.gpu_load import load_gpu_weights
from duomo.models.gpu_weights import GpuWeights
from duomo_kernels._bounds import bound

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


@dataclass(frozen=True, repr=False)
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


def small_decoder(
    family: str, *, dtype: torch.dtype, device: torch.device, sizes: Sizes | None = None, quantise: Literal["fp8"] | None = None
) -> SmallDecoder:
    """Random weights, rounded to dtype in both; quantise turns the kernels' alone to fp8."""
    sizes = Sizes() if sizes is None else sizes
    config_class, model_class, extra = FAMILIES[family]
    config = config_class(**_keys(family, sizes) | extra, architectures=[model_class.__name__], attn_implementation="eager")
    config._experts_implementation = "eager"  # the others take no float64
    theirs = model_class(config).double().eval()
    made = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            drawn = torch.rand(parameter.shape, generator=made) + 0.5
            if parameter.ndim > 1:
                spread = 1.0 if parameter.shape[0] == sizes.vocab else parameter.shape[-1] ** -0.5
                drawn = torch.randn(parameter.shape, generator=made) * spread
            parameter.copy_(drawn.to(dtype).double())
    with tempfile.TemporaryDirectory() as folder:
        copy.deepcopy(theirs).to(dtype).save_pretrained(folder)
        weights = load_gpu_weights(Path(folder), device=device, dtype=dtype, quantise=quantise)
    return SmallDecoder(theirs, weights)


def _keys(family: str, sizes: Sizes) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.expert_hidden,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.num_kv_heads,
        "head_dim": sizes.head_dim,
        "max_position_embeddings": 2048,
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
