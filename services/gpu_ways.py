"""Owns what people are told of the kernels that serve a model on a GPU: for each part, whose implementation runs. Launches nothing.

Who decides are the kernels' launchers; here their rules are said in words, with the constants that they decide by.
"""

from __future__ import annotations

import importlib.metadata

from duomo.config import DuomoConfig
from duomo.engine.decode_buckets import buckets_up_to
from duomo.engine.device import Card
from duomo.engine.memory_plan import captured_rows
from duomo.engine.settle import memory_limits
from duomo.engine.wave_buckets import wave_buckets_up_to
from duomo.models.config import ModelConfig


def ways(config: DuomoConfig, model: ModelConfig, card: Card | None) -> list[str]:
    """One line for each part. Raises PackageNotFoundError or ImportError where Triton is missing."""
    triton = importlib.metadata.version("triton")
    return [
        f"Triton {triton}; {_table(card)}" + ("; deterministic: one configuration for every batch" if config.deterministic else ""),
        f"attention: decode {_decode(config, model, card)}; prefill {_prefill(config, model)}",
        f"experts: {_experts(config, model, card)}" if model.has_router else "experts: none, a dense model's MLP is one expert",
        f"linear: {_linear(config)}",
        "sampler: ours (sample, token_logprobs)",
        f"graphs: {_graphs(config, model)}",
    ]


def _table(card: Card | None) -> str:
    from duomo_kernels._tuning import FOLDER, file_name

    if card is None:
        return "the card is another machine's and was not looked at"
    file = FOLDER / file_name(card.name)
    return f"launch configurations measured for this card: {file.name}" if file.is_file() else f"no {file.name}: heuristics choose"


def _decode(config: DuomoConfig, model: ModelConfig, card: Card | None) -> str:
    sizes = {"num_q_heads": model.num_heads, "num_kv_heads": model.num_kv_heads, "head_dim": model.head_dim}
    return f"ours (decode_attention), {_chosen('decode_attention', sizes, 'bf16', card, is_asked=not config.deterministic)}"


def _prefill(config: DuomoConfig, model: ModelConfig) -> str:
    from duomo_kernels._prefill_library import HEAD_DIMS

    if config.deterministic or model.head_dim not in HEAD_DIMS:
        return "ours (prefill_attention)"
    from duomo.engine.gpu_wave_attention import LIBRARY_MIN_TOKENS

    return (
        f"ours (prefill_attention), cuDNN without a cached prefix from {LIBRARY_MIN_TOKENS} tokens on, alone or among equally long prompts"
    )


def _graphs(config: DuomoConfig, model: ModelConfig) -> str:
    """What is captured at a start; their bytes are the plan's."""
    limits = memory_limits(config, model, "both" if config.layout == "colocated" else "prefill")
    waves = wave_buckets_up_to(captured_rows(model, limits))
    steps = buckets_up_to(config.decode.max_batch)
    return (
        f"decode steps of up to {steps[-1]} rows in {len(steps)} sizes; waves of up to {waves[-1]} rows in {len(waves)} sizes, "
        "one for each layer; longer ones go kernel by kernel"
    )


def _experts(config: DuomoConfig, model: ModelConfig, card: Card | None) -> str:
    is_fp8 = bool(config.model.quantize) or model.quantisation is not None
    shape = {"num_experts": model.num_experts, "top_k": model.top_k, "dim": model.hidden, "hidden": model.expert_hidden}
    chosen = _chosen("experts", shape, "fp8" if is_fp8 else "bf16", card, is_asked=not config.deterministic)
    few = "" if config.deterministic else ", expert_direct for few tokens"
    return f"ours (gate, {'expert_gemm_fp8' if is_fp8 else 'expert_gemm'}, expert_combine{few}), {chosen}"


def _linear(config: DuomoConfig) -> str:
    if config.deterministic:
        return "ours, the same tiles for any number of rows"
    return "ours where weights stream (few rows), torch's where operations bind"


def _chosen(op: str, shape: dict[str, int], dtype: str, card: Card | None, *, is_asked: bool) -> str:
    """By what the launch configuration is chosen: the card's table where it has this shape."""
    from duomo_kernels._tuning import FOLDER, file_name, read_table, shape_key

    file = None if card is None else FOLDER / file_name(card.name)
    if not is_asked or file is None or not file.is_file():
        return "by the heuristic" if is_asked else "one configuration"
    entries = read_table(file).get((op, shape_key(shape), dtype), ())
    if not entries:
        return f"by the heuristic: the table has no {dtype} {op} of this shape"
    return f"measured at {', '.join(str(entry.num_tokens) for entry in entries)} rows"
