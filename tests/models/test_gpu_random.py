"""Drawn models: the same for the same name, seed and device, whoever asks and however tensors are joined."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from duomo.models.config import ModelConfig, load_config
from duomo.models.gpu_load import load_gpu_weights
from duomo.models.gpu_random import random_checkpoint, random_gpu_weights, random_tensor, seed_of
from duomo.models.gpu_weights import GpuWeights

CPU = torch.device("cpu")
FAMILIES = ["olmoe-1b-7b-0924", "qwen3-30b-a3b", "mixtral-8x7b-v0.1", "llama-3-8b", "qwen3-0.6b"]


def small(name: str, folder: Path) -> ModelConfig:
    """A published configuration, made small; its config.json lies in folder."""
    raw = json.loads((Path(__file__).parent / "published" / f"{name}.json").read_text())
    raw |= {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 70}
    raw |= {"intermediate_size": 256, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    raw |= {key: value for key, value in (("num_experts", 5), ("num_local_experts", 5), ("num_experts_per_tok", 2)) if key in raw}
    raw |= {"moe_intermediate_size": 128} if "moe_intermediate_size" in raw else {}
    raw |= {"head_dim": 64} if "head_dim" in raw else {}
    (folder / "config.json").write_text(json.dumps(raw))
    return load_config(folder, needs_weights=False)


def tensors_of(weights: GpuWeights) -> list[Tensor]:
    found = [weights.embed_VD, weights.norm_D, weights.head_VD]
    for layer in weights.layers:
        found += [layer.input_norm_D, layer.post_norm_D, layer.qkv.weight_NK, layer.out.weight_NK]
        found += [layer.experts.gate_up_EFD, layer.experts.down_EDF]
        found += [] if layer.router_ED is None else [layer.router_ED]
        found += [] if layer.qk_norm is None else [layer.qk_norm.q_weight, layer.qk_norm.k_weight]
    return found


def drawn(name: str, shape: tuple[int, ...] = (63, 257), *, dtype: torch.dtype = torch.float32, seed: int = 0, std: float = 0.02) -> Tensor:
    return random_tensor(name, shape, device=CPU, dtype=dtype, seed=seed, std=std)


def test_a_tensor_is_its_name_and_seed() -> None:
    first = drawn("model.layers.0.mlp.experts.7.up_proj.weight")
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert torch.equal(first, drawn("model.layers.0.mlp.experts.7.up_proj.weight"))
    assert torch.equal(state, torch.get_rng_state())
    for other in (drawn("model.layers.0.mlp.experts.8.up_proj.weight"), drawn("model.layers.0.mlp.experts.7.up_proj.weight", seed=1)):
        assert abs(float(torch.corrcoef(torch.stack((first.flatten(), other.flatten())))[0, 1])) < 0.05
    assert abs(float(first.mean())) < 1e-3 and float(first.std()) == pytest.approx(0.02, rel=0.05)
    assert float(drawn("w", std=0.5).std()) == pytest.approx(0.5, rel=0.05)


def test_a_half_precision_is_the_same_model_rounded() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(drawn("w").to(dtype), drawn("w", dtype=dtype))


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.3.input_layernorm.weight", "model.layers.3.self_attn.k_norm.weight"])
def test_norms_are_ones(name: str) -> None:
    assert torch.equal(drawn(name, (9,), dtype=torch.bfloat16), torch.ones(9, dtype=torch.bfloat16))


def test_seeds_are_of_63_bits_and_stay_what_they_are() -> None:
    """A change would make another model of every recorded benchmark."""
    assert seed_of("lm_head.weight", 0) == 4282841422899934140
    assert all(0 <= seed_of(f"w{index}", 0) < 2**63 for index in range(100))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_drawn_model_is_the_drawn_checkpoint(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Joined and stacked, or one by one through a file."""
    config = small(name, tmp_path)
    save_file(dict(random_checkpoint(config, device=CPU, dtype=dtype, seed=7, std=0.1)), tmp_path / "model.safetensors")
    ours, loaded = random_gpu_weights(config, device=CPU, dtype=dtype, seed=7, std=0.1), load_gpu_weights(tmp_path, device=CPU, dtype=dtype)
    for got, want in zip(tensors_of(ours), tensors_of(loaded), strict=True):
        assert got.dtype == want.dtype == dtype and torch.equal(got, want)
    assert (ours.head_VD is ours.embed_VD) is config.ties_embeddings and ours.config.fingerprint != loaded.config.fingerprint


@pytest.mark.parametrize("name", FAMILIES)
def test_quantised_after_drawing(name: str, tmp_path: Path) -> None:
    config = small(name, tmp_path)
    save_file(dict(random_checkpoint(config, device=CPU)), tmp_path / "model.safetensors")
    ours, loaded = random_gpu_weights(config, device=CPU, quantise="fp8"), load_gpu_weights(tmp_path, device=CPU, quantise="fp8")
    for got, want in zip(tensors_of(ours), tensors_of(loaded), strict=True):
        assert got.dtype == want.dtype and torch.equal(got.view(torch.uint8), want.view(torch.uint8))
    assert all(layer.experts.is_fp8 and layer.qkv.is_fp8 and layer.out.is_fp8 for layer in ours.layers)
    got_scale, want_scale = (weights.layers[1].experts.gate_up_scale_Efd for weights in (ours, loaded))
    assert got_scale is not None and want_scale is not None and torch.equal(got_scale, want_scale)


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_takes_the_checkpoint(name: str, tmp_path: Path) -> None:
    """No name too many, none too few: what a peer is given is the whole model."""
    config = small(name, tmp_path)
    peer: Any = getattr(transformers, config.architecture)
    checkpoint = dict(random_checkpoint(config, device=CPU, dtype=torch.float32))
    their_config = transformers.AutoConfig.from_pretrained(tmp_path)
    model, report = peer.from_pretrained(None, config=their_config, state_dict=checkpoint, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"], report
    state = model.state_dict()
    layer = random_gpu_weights(config, device=CPU, dtype=torch.float32).layers[1]
    if config.has_router:
        assert torch.equal(state["model.layers.1.mlp.experts.gate_up_proj"], layer.experts.gate_up_EFD)
        assert torch.equal(state["model.layers.1.mlp.experts.down_proj"], layer.experts.down_EDF)
    else:
        assert torch.equal(state["model.layers.1.mlp.down_proj.weight"], layer.experts.down_EDF[0])
    assert torch.equal(state["model.layers.1.self_attn.o_proj.weight"], layer.out.weight_NK)


@pytest.mark.gpu
def test_a_real_layer_is_drawn_alike_however_it_is_stacked(tmp_path: Path) -> None:
    """On the device, with tensors in the middle of a stack and alone."""
    config, cuda = small("qwen3-30b-a3b", tmp_path), torch.device("cuda")
    weights = random_gpu_weights(config, device=cuda, seed=5)
    alone = dict(random_checkpoint(config, device=cuda, seed=5))
    for index in range(config.num_experts):
        at = f"model.layers.1.mlp.experts.{index}."
        pair = torch.cat([alone[f"{at}{side}_proj.weight"] for side in ("gate", "up")])
        assert torch.equal(weights.layers[1].experts.gate_up_EFD[index], pair)
        assert torch.equal(weights.layers[1].experts.down_EDF[index], alone[f"{at}down_proj.weight"])
