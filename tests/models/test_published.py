"""Published config.json files of every family: read as transformers reads them, counted as it counts, and refused where we compute less."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from duomo.errors import ModelError
from duomo.models.checkpoint import all_entries
from duomo.models.config import Llama3Rope, ModelConfig, load_config
from duomo.models.qwen3_moe import implementation_of, load_model
from duomo.models.rope import tables_for
from duomo_kernels.norm_rope import rope_tables

PUBLISHED = Path(__file__).parent / "published"
NAMES = sorted(file.stem for file in PUBLISHED.glob("*.json"))
Raw = dict[str, Any]


def read(name: str, folder: Path, edit: Callable[[Raw], object] = lambda raw: None) -> ModelConfig:
    raw = json.loads((PUBLISHED / f"{name}.json").read_text())
    edit(raw)
    (folder / "config.json").write_text(json.dumps(raw))
    return load_config(folder, needs_weights=False)


def theirs(name: str, folder: Path) -> Any:
    (folder / "config.json").write_text((PUBLISHED / f"{name}.json").read_text())
    return AutoConfig.from_pretrained(folder)


def model_of(config: Any) -> Any:
    return AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]  # transformers ships no types


@pytest.mark.parametrize("name", NAMES)
def test_read_as_transformers_reads_it(name: str, tmp_path: Path) -> None:
    ours, other = read(name, tmp_path), theirs(name, tmp_path)
    assert (ours.num_layers, ours.hidden, ours.num_heads) == (other.num_hidden_layers, other.hidden_size, other.num_attention_heads)
    assert (ours.num_kv_heads, ours.vocab, ours.norm_eps) == (other.num_key_value_heads, other.vocab_size, other.rms_norm_eps)
    assert (ours.head_dim, ours.ties_embeddings) == (getattr(other, "head_dim", None) or 128, other.tie_word_embeddings)
    assert (ours.rope_theta, ours.max_position_tokens) == (other.rope_parameters["rope_theta"], other.max_position_embeddings)
    assert ours.has_router is hasattr(other, "num_experts_per_tok")
    if ours.has_router:
        assert (ours.num_experts, ours.top_k) == (other.num_experts, other.num_experts_per_tok)
        assert ours.normalises_topk is getattr(other, "norm_topk_prob", True)
    else:
        assert (ours.num_experts, ours.top_k, ours.expert_hidden) == (1, 1, other.intermediate_size)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_counted_as_transformers_holds_them(name: str, tmp_path: Path) -> None:
    config, other = read(name, tmp_path), theirs(name, tmp_path)
    if hasattr(other, "quantization_config"):
        del other.quantization_config
    with torch.device("meta"):
        model = model_of(other)
    assert config.total_params == sum(parameter.numel() for parameter in model.parameters())
    assert config.total_params == sum(int(torch.Size(shape).numel()) for _, shape in all_entries(config))
    idle = (config.num_experts - config.top_k) * 3 * config.hidden * config.expert_hidden * config.num_layers
    assert config.active_params == config.total_params - idle


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("qwen3-30b-a3b", 30.53e9, 3.35e9), ("olmoe-1b-7b-0924", 6.92e9, 1.28e9), ("mixtral-8x7b-v0.1", 46.70e9, 12.88e9)],
)
def test_counts_are_the_published_ones(name: str, total: float, active: float, tmp_path: Path) -> None:
    config = read(name, tmp_path)
    assert config.total_params == pytest.approx(total, rel=2e-3) and config.active_params == pytest.approx(active, rel=2e-3)


def test_norms_of_query_and_key(tmp_path: Path) -> None:
    kinds = {name: read(name, tmp_path).qk_norm for name in NAMES}
    assert [name for name in NAMES if kinds[name] == "whole"] == ["olmoe-1b-7b-0924"]
    assert [name for name in NAMES if kinds[name] == "head"] == ["qwen3-0.6b", "qwen3-30b-a3b", "qwen3-30b-a3b-fp8"]


def test_what_a_config_leaves_out_is_its_familys(tmp_path: Path) -> None:
    def bare(raw: Raw) -> None:
        for key in ("rms_norm_eps", "rope_theta", "rope_scaling", "head_dim"):
            raw.pop(key, None)

    found = {name: (config.norm_eps, config.rope_theta, config.head_dim) for name in NAMES if (config := read(name, tmp_path, bare))}
    assert found["olmoe-1b-7b-0924"] == (1e-5, 1e4, 128)
    assert found["mixtral-8x7b-v0.1"] == (1e-5, 1e6, 128)
    assert found["qwen3-0.6b"] == (1e-6, 1e4, 128)
    assert found["llama-3.2-1b"] == (1e-6, 1e4, 64)
    assert read("llama-3-8b", tmp_path, lambda raw: raw.pop("num_key_value_heads")).num_kv_heads == 32


def test_stretched_positions_are_transformers(tmp_path: Path) -> None:
    config = read("llama-3.2-1b", tmp_path, lambda raw: raw.update(max_position_embeddings=16384))
    assert config.rope_scaling == Llama3Rope(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_tokens=8192)
    other = AutoConfig.from_pretrained(tmp_path)
    other.num_hidden_layers, other.vocab_size = 0, 8
    rotary = model_of(other).model.rotary_emb
    cos_1PD, sin_1PD = rotary(torch.zeros(1), torch.arange(16384)[None])
    cos_PD, sin_PD = tables_for(config)
    # A frequency may differ in its last bit, and a position multiplies that.
    assert (cos_PD - cos_1PD[0]).abs().max() < 16384 * 2**-23 and (sin_PD.abs() - sin_1PD[0].abs()).abs().max() < 16384 * 2**-23
    assert (cos_PD - rope_tables(16384, 64, 5e5)[0]).abs().max() > 0.5


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("olmoe-1b-7b-0924", {"clip_qkv": 8.0}, ["clip_qkv", "8.0"]),
        ("olmoe-1b-7b-0924", {"head_dim": 64}, ["head_dim"]),
        ("mixtral-8x7b-v0.1", {"sliding_window": 4096}, ["sliding_window", "4096"]),
        ("mixtral-8x7b-v0.1", {"num_key_value_heads": None}, ["num_key_value_heads"]),
        ("qwen3-30b-a3b", {"use_sliding_window": True}, ["use_sliding_window"]),
        ("qwen3-30b-a3b", {"mlp_only_layers": [3]}, ["mlp_only_layers"]),
        ("qwen3-30b-a3b", {"decoder_sparse_step": 2}, ["decoder_sparse_step"]),
        ("qwen3-30b-a3b", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["rope_type", "llama3"]),
        ("qwen3-0.6b", {"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types", "sliding_attention"]),
        ("qwen3-0.6b", {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, ["rope_parameters"]),
        ("llama-3-8b", {"attention_bias": True}, ["attention_bias"]),
        ("llama-3-8b", {"mlp_bias": True}, ["mlp_bias"]),
        ("llama-3-8b", {"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ("llama-3-8b", {"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_type", "linear", "llama3"]),
        ("llama-3-8b", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["low_freq_factor"]),
        ("llama-3-8b", {"rope_scaling": "llama3"}, ["rope_scaling", "object"]),
        ("llama-3-8b", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        ("llama-3-8b", {"hidden_size": 4000, "num_attention_heads": 48}, ["hidden_size 4000", "num_attention_heads 48"]),
    ],
)
def test_what_we_do_not_compute_is_refused_by_name(name: str, change: Raw, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        read(name, tmp_path, lambda raw: raw.update(change))
    assert all(word in caught.value.detail for word in words), caught.value.detail


def test_a_window_as_long_as_the_context_is_none(tmp_path: Path) -> None:
    read("mixtral-8x7b-v0.1", tmp_path, lambda raw: raw.update(sliding_window=32768))


@pytest.mark.parametrize("name", ["olmoe-1b-7b-0924", "llama-3-8b"])
def test_the_cpu_refuses_other_families(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="on a GPU only; on the CPU: Qwen3MoeForCausalLM"):
        implementation_of(read(name, tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(ModelError, match="on a GPU only"):
        load_model(tmp_path)


def test_random_weights_need_a_config_alone(tmp_path: Path) -> None:
    first = read("olmoe-1b-7b-0924", tmp_path)
    assert first.fingerprint == load_config(tmp_path, needs_weights=False, random_seed=0).fingerprint
    assert first.fingerprint != load_config(tmp_path, needs_weights=False, random_seed=1).fingerprint
    assert first.fingerprint != read("olmoe-1b-7b-0924", tmp_path, lambda raw: raw.update(eos_token_id=7)).fingerprint
    (tmp_path / "model.safetensors").write_bytes(b"of no account")
    assert first.fingerprint != (with_file := load_config(tmp_path)).fingerprint != load_config(tmp_path, needs_weights=False).fingerprint
    assert with_file.eos_ids == (7,)
