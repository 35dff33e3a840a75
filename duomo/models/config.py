"""Owns what a model folder says about itself: shapes, counts, fingerprint. Knows no torch: the gateway reads it too."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from duomo.errors import ModelError

SUPPORTED_ARCHITECTURES = ("Qwen3MoeForCausalLM",)
WHOLE_FILE_BYTES = 256 * 1024 * 1024  # files above are fingerprinted by header and samples: hashing 60 GB takes a minute
SAMPLE_BYTES = 64 * 1024
NUM_SAMPLES = 64

Json = dict[str, object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Blocks:
    """fp8 e4m3 weights with one float32 scale for each block of (rows, columns)."""

    block: tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A mixture-of-experts decoder. Counts are of parameters, as published: scales of quantisation not counted."""

    architecture: str
    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    top_k: int
    expert_hidden: int
    vocab: int
    max_position_tokens: int
    norm_eps: float
    rope_theta: float
    normalises_topk: bool
    ties_embeddings: bool
    eos_ids: tuple[int, ...]
    quantisation: Fp8Blocks | None
    fingerprint: str

    @property
    def _params_outside_experts(self) -> int:
        heads = self.num_heads + 2 * self.num_kv_heads
        layer = (
            self.hidden * self.head_dim * (heads + self.num_heads) + self.hidden * self.num_experts + 2 * self.hidden + 2 * self.head_dim
        )
        return self.vocab * self.hidden * (1 if self.ties_embeddings else 2) + self.num_layers * layer + self.hidden

    @property
    def _params_per_expert(self) -> int:
        return 3 * self.hidden * self.expert_hidden

    @property
    def total_params(self) -> int:
        """Every parameter."""
        return self._params_outside_experts + self.num_layers * self.num_experts * self._params_per_expert

    @property
    def active_params(self) -> int:
        """The parameters that one token passes through (top_k experts a layer)."""
        return self._params_outside_experts + self.num_layers * self.top_k * self._params_per_expert


def load_config(folder: Path) -> ModelConfig:
    """Read config.json (and generation_config.json for further end-of-sequence ids) of a Hugging Face folder.

    Raises ModelError naming the file, key or architecture at fault.
    """
    raw = read_json(folder / "config.json")
    architectures = raw.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else raw.get("model_type", "none named")
    if name not in SUPPORTED_ARCHITECTURES:
        raise ModelError(
            f"architecture {name} of {folder} is not supported; supported: {', '.join(SUPPORTED_ARCHITECTURES)}", code="bad_architecture"
        )
    reader = _Reader(raw, folder)
    _refuse_unsupported(reader)
    num_heads, hidden = reader.integer("num_attention_heads"), reader.integer("hidden_size")
    config = ModelConfig(
        architecture=str(name),
        num_layers=reader.integer("num_hidden_layers"),
        hidden=hidden,
        num_heads=num_heads,
        num_kv_heads=reader.integer("num_key_value_heads"),
        head_dim=reader.integer("head_dim", default=hidden // num_heads),
        num_experts=reader.integer("num_experts", "num_local_experts"),
        top_k=reader.integer("num_experts_per_tok"),
        expert_hidden=reader.integer("moe_intermediate_size"),
        vocab=reader.integer("vocab_size"),
        max_position_tokens=reader.integer("max_position_embeddings"),
        norm_eps=reader.number("rms_norm_eps", 1e-6),
        rope_theta=_rope_theta(reader),
        normalises_topk=raw.get("norm_topk_prob", False) is True,
        ties_embeddings=raw.get("tie_word_embeddings", False) is True,
        eos_ids=_eos_ids(raw, folder),
        quantisation=_quantisation(raw),
        fingerprint=fingerprint(folder),
    )
    _check_shapes(config, folder)
    return config


def _check_shapes(config: ModelConfig, folder: Path) -> None:
    if config.num_heads % config.num_kv_heads:
        raise ModelError(f"num_attention_heads {config.num_heads} of {folder} is no multiple of num_key_value_heads {config.num_kv_heads}")
    if not 1 <= config.top_k <= config.num_experts:
        raise ModelError(f"num_experts_per_tok {config.top_k} of {folder} must be 1..num_experts ({config.num_experts})")
    if config.head_dim % 2:
        raise ModelError(f"head_dim {config.head_dim} of {folder} must be even")


def read_json(file: Path) -> Json:
    """A JSON object from a file. Raises ModelError naming the file."""
    try:
        loaded = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {file}: {error}", code="bad_model_file") from error
    if not isinstance(loaded, dict):
        raise ModelError(f"{file} must hold a JSON object", code="bad_model_file")
    return loaded


class _Reader:
    """Typed reads from config.json that name the missing or wrong key."""

    def __init__(self, raw: Json, folder: Path) -> None:
        self.raw = raw
        self.folder = folder

    def integer(self, *keys: str, default: int | None = None) -> int:
        """The first of `keys` that is there; both spellings of a key are in use."""
        for key in keys:
            value = self.raw.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
            if value is not None:
                raise ModelError(
                    f"{key} in {self.folder / 'config.json'} must be a positive integer, not {value!r}", code="bad_model_config"
                )
        if default is None:
            raise ModelError(f"{self.folder / 'config.json'} lacks {' or '.join(keys)}", code="bad_model_config")
        return default

    def number(self, key: str, default: float) -> float:
        value = self.raw.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ModelError(f"{key} in {self.folder / 'config.json'} must be a number, not {value!r}", code="bad_model_config")
        return float(value)


def _rope_theta(reader: _Reader) -> float:
    nested = reader.raw.get("rope_parameters")
    if nested is None:
        return reader.number("rope_theta", 10000.0)
    if not isinstance(nested, dict):
        raise ModelError(f"rope_parameters in {reader.folder / 'config.json'} must be an object", code="bad_model_config")
    return _Reader(nested, reader.folder).number("rope_theta", 10000.0)


def _refuse_unsupported(reader: _Reader) -> None:
    raw = reader.raw
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope_type = scaling.get("rope_type", scaling.get("type", "default")) if isinstance(scaling, dict) else scaling
    wanted: tuple[tuple[str, object, object], ...] = (
        ("hidden_act", raw.get("hidden_act", "silu"), "silu"),
        ("attention_bias", raw.get("attention_bias", False), False),
        ("use_sliding_window", raw.get("use_sliding_window", False), False),
        ("mlp_only_layers", raw.get("mlp_only_layers") or [], []),
        ("decoder_sparse_step", raw.get("decoder_sparse_step", 1), 1),
        ("rope_type", rope_type, "default"),
    )
    for key, value, supported in wanted:
        if value != supported:
            raise ModelError(f"{key} = {value!r} of {reader.folder} is not supported, only {supported!r}", code="bad_model_config")


def _quantisation(raw: Json) -> Fp8Blocks | None:
    section = raw.get("quantization_config")
    if section is None:
        return None
    method = section.get("quant_method") if isinstance(section, dict) else section
    block = section.get("weight_block_size") if isinstance(section, dict) else None
    form = section.get("fmt", "e4m3") if isinstance(section, dict) else None
    is_pair = isinstance(block, list) and len(block) == 2 and all(isinstance(side, int) and side > 0 for side in block)
    if method != "fp8" or form != "e4m3" or not isinstance(block, list) or not is_pair:
        raise ModelError(
            f"quantisation {method!r} (fmt {form!r}, weight_block_size {block!r}) is not supported; "
            "supported: fp8 e4m3 with block scales, or none",
            code="bad_quantisation",
        )
    return Fp8Blocks(block=(block[0], block[1]))


def _eos_ids(raw: Json, folder: Path) -> tuple[int, ...]:
    sources = [raw.get("eos_token_id")]
    if (folder / "generation_config.json").exists():
        sources.append(read_json(folder / "generation_config.json").get("eos_token_id"))
    found: list[int] = []
    for source in sources:
        found += [value for value in (source if isinstance(source, list) else [source]) if isinstance(value, int)]
    return tuple(sorted(set(found)))


def fingerprint(folder: Path) -> str:
    """What the folder computes, as 32 hex digits: equal for equal config, tokenizer and weights, wherever the folder lies.

    Weight files up to WHOLE_FILE_BYTES are hashed whole, larger ones by size, head, tail and NUM_SAMPLES samples. Raises ModelError.
    """
    digest = hashlib.sha256()
    names = ["config.json", "tokenizer.json", *sorted(file.name for file in folder.glob("*.safetensors"))]
    try:
        for name in names:
            file = folder / name
            if name == "tokenizer.json" and not file.exists():
                continue
            size = file.stat().st_size
            digest.update(f"{name}:{size};".encode())
            with file.open("rb") as stream:
                if size <= WHOLE_FILE_BYTES:
                    digest.update(stream.read())
                    continue
                for sample in range(NUM_SAMPLES):
                    stream.seek((size - SAMPLE_BYTES) * sample // (NUM_SAMPLES - 1))
                    digest.update(stream.read(SAMPLE_BYTES))
    except OSError as error:
        raise ModelError(f"cannot read model folder {folder}: {error}", code="bad_model_file") from error
    return digest.hexdigest()[:32]
