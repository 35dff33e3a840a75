"""Owns what a model folder says about itself: shapes, counts, fingerprint. Knows no torch: the gateway reads it too."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from duomo.config import ModelSection
from duomo.errors import ModelError
from duomo.models.config_json import ConfigReader, Json, read_json
from duomo.models.families import FAMILIES, Family, QkNormKind

SUPPORTED_ARCHITECTURES = tuple(FAMILIES)
CPU_ARCHITECTURES = ("Qwen3MoeForCausalLM",)
WHOLE_FILE_BYTES = 256 * 1024 * 1024  # files above are fingerprinted by header and samples: hashing 60 GB takes a minute
SAMPLE_BYTES = 64 * 1024
NUM_SAMPLES = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Blocks:
    """fp8 e4m3 weights with one float32 scale for each block of (rows, columns)."""

    block: tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama3Rope:
    """Llama 3.1's stretch of the rotary frequencies: low ones divided by factor, high ones left, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A decoder of experts. Counts are of parameters, as published: scales of quantisation not counted.

    A dense model (has_router False) is one expert that every token takes: num_experts 1, top_k 1, expert_hidden its MLP's width.
    """

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
    qk_norm: QkNormKind
    has_router: bool
    rope_scaling: Llama3Rope | None = None

    @property
    def _params_outside_experts(self) -> int:
        attention = self.hidden * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        qk_norm = {"none": 0, "head": 2, "whole": self.num_heads + self.num_kv_heads}[self.qk_norm] * self.head_dim
        router = self.hidden * self.num_experts if self.has_router else 0
        layer = attention + qk_norm + router + 2 * self.hidden
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


def load_config(folder: Path, *, needs_weights: bool = True, random_seed: int = 0) -> ModelConfig:
    """Read config.json (and generation_config.json for further end-of-sequence ids) of a Hugging Face folder.

    needs_weights False: config.json is enough; the fingerprint is of a model whose weights are drawn with random_seed.
    Raises ModelError naming the file, key or architecture at fault.
    """
    raw = read_json(folder / "config.json")
    architectures = raw.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else raw.get("model_type", "none named")
    family = FAMILIES.get(str(name))
    if family is None:
        raise ModelError(
            f"architecture {name} of {folder} is not supported; supported: {', '.join(SUPPORTED_ARCHITECTURES)}", code="bad_architecture"
        )
    reader = ConfigReader(raw, folder)
    _refuse_unsupported(reader)
    num_heads = reader.integer("num_attention_heads")
    config = ModelConfig(
        architecture=str(name),
        num_layers=reader.integer("num_hidden_layers"),
        hidden=reader.integer("hidden_size"),
        num_heads=num_heads,
        num_kv_heads=reader.integer("num_key_value_heads", default=num_heads if family.can_omit_kv_heads else None),
        head_dim=_head_dim(reader, family),
        num_experts=1 if family.is_dense else reader.integer(*family.num_experts),
        top_k=1 if family.is_dense else reader.integer("num_experts_per_tok"),
        expert_hidden=reader.integer(family.expert_hidden),
        vocab=reader.integer("vocab_size"),
        max_position_tokens=reader.integer("max_position_embeddings"),
        norm_eps=reader.number("rms_norm_eps", family.norm_eps),
        rope_theta=_rope_section(reader).number("rope_theta", reader.number("rope_theta", family.rope_theta)),
        normalises_topk=raw.get("norm_topk_prob", False) is True if family.normalises_topk is None else family.normalises_topk,
        ties_embeddings=raw.get("tie_word_embeddings", False) is True,
        eos_ids=_eos_ids(raw, folder),
        quantisation=_quantisation(raw),
        fingerprint=fingerprint(folder) if needs_weights else random_fingerprint(folder, random_seed),
        qk_norm=family.qk_norm,
        has_router=not family.is_dense,
        rope_scaling=_rope_scaling(reader, family),
    )
    _check_shapes(config, folder)
    return config


def served_config(section: ModelSection) -> ModelConfig:
    """load_config of the model that the configuration names, its weights a folder's or drawn: every process reads it by this.

    Drawn weights are not held in fp8, whatever config.json says of its own checkpoint: model.quantize decides.
    """
    config = load_config(section.path, needs_weights=not section.random_weights, random_seed=section.random_seed)
    return replace(config, quantisation=None) if section.random_weights else config


def refuse_on_cpu(config: ModelConfig) -> None:
    """Raise ModelError where only a GPU runs the model: asked before anything is started, and by the CPU engine."""
    if config.architecture not in CPU_ARCHITECTURES:
        raise ModelError(f"{config.architecture} runs on a GPU only; on the CPU: {', '.join(CPU_ARCHITECTURES)}", code="bad_architecture")


def _check_shapes(config: ModelConfig, folder: Path) -> None:
    if config.num_heads % config.num_kv_heads:
        raise ModelError(f"num_attention_heads {config.num_heads} of {folder} is no multiple of num_key_value_heads {config.num_kv_heads}")
    if not 1 <= config.top_k <= config.num_experts:
        raise ModelError(f"num_experts_per_tok {config.top_k} of {folder} must be 1..num_experts ({config.num_experts})")
    if config.head_dim % 2:
        raise ModelError(f"head_dim {config.head_dim} of {folder} must be even")


def _head_dim(reader: ConfigReader, family: Family) -> int:
    hidden, num_heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    named = reader.raw.get("head_dim") or family.head_dim
    if named is None and hidden % num_heads:
        raise ModelError(f"hidden_size {hidden} of {reader.folder} is no multiple of num_attention_heads {num_heads}")
    if family.qk_norm == "whole" and named is not None:  # its norms are as wide as the hidden state
        reader.refuse_unless("head_dim", named, hidden // num_heads)
    return reader.integer("head_dim", default=family.head_dim or hidden // num_heads)


def _rope_section(reader: ConfigReader) -> ConfigReader:
    """transformers 5 writes rope_parameters, all before it rope_scaling (mostly null) beside rope_theta."""
    return reader.inside("rope_parameters", "rope_scaling")


def _rope_scaling(reader: ConfigReader, family: Family) -> Llama3Rope | None:
    section = _rope_section(reader)
    kind = section.raw.get("rope_type", section.raw.get("type", "default"))
    if kind not in family.rope_types:
        supported = " or ".join(repr(each) for each in family.rope_types)
        raise ModelError(f"rope_type = {kind!r} of {reader.folder} is not supported, only {supported}", code="bad_model_config")
    if kind == "default":
        return None
    scaling = Llama3Rope(
        factor=section.number("factor"),
        low_freq_factor=section.number("low_freq_factor"),
        high_freq_factor=section.number("high_freq_factor"),
        original_tokens=section.integer("original_max_position_embeddings"),
    )
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise ModelError(f"low_freq_factor of {reader.folder} must be below high_freq_factor: {scaling}", code="bad_model_config")
    return scaling


def _refuse_unsupported(reader: ConfigReader) -> None:
    raw, rope = reader.raw, _rope_section(reader).raw
    for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
        reader.refuse_unless(key, raw.get(key) or False, False)
    reader.refuse_unless("hidden_act", raw.get("hidden_act", "silu"), "silu")
    reader.refuse_unless("clip_qkv", raw.get("clip_qkv"), None)
    reader.refuse_unless("mlp_only_layers", raw.get("mlp_only_layers") or [], [])
    reader.refuse_unless("decoder_sparse_step", raw.get("decoder_sparse_step", 1), 1)
    layer_types = raw.get("layer_types") or []
    if isinstance(layer_types, Iterable):
        for layer_type in layer_types:
            reader.refuse_unless("layer_types", layer_type, "full_attention")
    for section in (raw, rope):
        reader.refuse_unless("partial_rotary_factor", section.get("partial_rotary_factor", 1.0), 1.0)
    if any(isinstance(value, dict) for value in rope.values()):
        raise ModelError(f"rope_parameters of {reader.folder} differ between layers: not supported", code="bad_model_config")
    window, limit = raw.get("sliding_window"), raw.get("max_position_embeddings")
    # Qwen3 asks use_sliding_window first; a window as long as the context is none.
    if "use_sliding_window" not in raw and isinstance(window, int) and isinstance(limit, int) and window < limit:
        reader.refuse_unless("sliding_window", window, None)


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
    return _digest(folder, sorted(file.name for file in folder.glob("*.safetensors")), "")


def random_fingerprint(folder: Path, seed: int) -> str:
    """The same of a model whose weights are drawn: of its config, tokenizer and seed."""
    return _digest(folder, [], f"random:{seed}")


def _digest(folder: Path, weight_files: list[str], beside: str) -> str:
    digest = hashlib.sha256(beside.encode())
    names = ["config.json", "tokenizer.json", *weight_files]
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
