"""Owns what people are told of the kernels that serve a model on a GPU: for each part, whose implementation runs. Launches nothing.

Who decides are the kernels' launchers; here their rules are said in words, with the constants that they decide by.
"""

from __future__ import annotations

import importlib.metadata

from duomo.config import DuomoConfig
from duomo.engine.device import Card
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
    from duomo_kernels.prefill_attention import CUDNN_MIN_TOKENS

    if config.deterministic or model.head_dim not in HEAD_DIMS:
        return "ours (prefill_attention)"
    return f"ours (prefill_attention), cuDNN where a wave's prompts are equally long, from {CUDNN_MIN_TOKENS} tokens on"


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
