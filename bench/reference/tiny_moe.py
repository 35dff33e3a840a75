"""Owns the float32 reference: transformers' Qwen3MoeForCausalLM filled by hand from a model folder. Knows nothing of Duomo's engine.

Weights are `q.float() * scale`, never rounded to bf16 (plain from_pretrained rounds, and gives other tokens). The files are read here with
safetensors and json alone, so that a fault of our loader cannot hide in both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

BLOCK = 128


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Every weight of the folder in float32, dequantised."""
    raw: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            raw |= {name: opened.get_tensor(name) for name in opened.keys()}
    weights: dict[str, Tensor] = {}
    for name, tensor in raw.items():
        if name.endswith("_scale_inv"):
            continue
        weights[name] = tensor.float()
        scale = raw.get(name + "_scale_inv")
        if scale is not None:
            for i in range(scale.shape[0]):
                for j in range(scale.shape[1]):
                    weights[name][i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK] *= scale[i, j]
    return weights


def build_reference(folder: Path) -> Any:
    """The reference model, in evaluation mode, float32, eager attention."""
    raw = json.loads((folder / "config.json").read_text())
    raw.pop("quantization_config", None)
    raw.pop("dtype", None)
    config = Qwen3MoeConfig(**raw)
    config._attn_implementation = "eager"
    model: Any = Qwen3MoeForCausalLM(config)
    weights = read_weights(folder)
    state = dict.fromkeys(model.state_dict(), torch.empty(0))
    for name in list(state):
        if ".mlp.experts." not in name:
            state[name] = weights["model.embed_tokens.weight" if name == "lm_head.weight" and name not in weights else name]
            continue
        prefix, _, kind = name.rpartition(".")
        experts = range(config.num_experts)
        if kind == "gate_up_proj":
            pairs = [torch.cat([weights[f"{prefix}.{e}.{side}_proj.weight"] for side in ("gate", "up")]) for e in experts]
            state[name] = torch.stack(pairs)
        else:
            state[name] = torch.stack([weights[f"{prefix}.{e}.down_proj.weight"] for e in experts])
    model.load_state_dict(state)
    return model.float().eval()


@torch.inference_mode()
def greedy_tokens(model: Any, prompt_ids: list[int], num_tokens: int) -> list[int]:
    """Greedy continuation of exactly num_tokens tokens; ends for nothing."""
    cache, ids, tokens = None, torch.tensor([prompt_ids]), []
    for _ in range(num_tokens):
        out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        tokens.append(int(out.logits[0, -1].argmax()))
        ids = torch.tensor([[tokens[-1]]])
    return tokens
