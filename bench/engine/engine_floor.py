"""Owns the least time of a step or a wave: bytes that must be read, operations that must be done. Knows no engine and no clock.

    decode    L (attention + router + D 3 h i) w + V h 2 + sum of contexts x KV bytes of a token
    prefill   the same weights once, and 2 FLOP for each weight that a token passes, 4 H Dh for each pair of a query and a key it sees

D is what was counted: the distinct experts of a layer, mean over the layers. Rates are those of bench/gpu_stopwatch.py unless a run's own
are given. The larger of the two times counts; neither the rows between kernels nor the KV that is written is counted.

Legend: L layers, D distinct experts, h model, i expert hidden, V vocabulary, H query heads, N kv heads, Dh head dim.
"""

from __future__ import annotations

from bench.engine.engine_cases import Dtype, EngineCase
from bench.gpu_stopwatch import SEEN_BF16_FLOP_PER_S, SEEN_BYTES_PER_S, SEEN_FP8_FLOP_PER_S
from duomo.models.config import ModelConfig
from duomo_kernels._weights import SCALE_BLOCK

FP8_BYTES = 1 + 4 / SCALE_BLOCK**2  # of a weight, with its share of a block's float32 scale


def attention_weights(config: ModelConfig) -> int:
    """Weights of one layer's q, k, v and output products."""
    return 2 * config.hidden * config.head_dim * (config.num_heads + config.num_kv_heads)


def expert_weights(config: ModelConfig) -> int:
    return 3 * config.hidden * config.expert_hidden


def expert_bytes(config: ModelConfig, dtype: Dtype) -> float:
    """Of one expert's weights."""
    return expert_weights(config) * (2.0 if dtype == "bf16" else FP8_BYTES)


def kv_bytes_per_token(config: ModelConfig) -> int:
    """All layers, bf16."""
    return 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim


def weight_bytes(config: ModelConfig, dtype: Dtype, distinct: float) -> float:
    """What one step reads of the weights: router and head stay in bf16."""
    wide = 2.0 if dtype == "bf16" else FP8_BYTES
    layer = wide * (attention_weights(config) + distinct * expert_weights(config)) + 2.0 * config.hidden * config.num_experts
    return config.num_layers * layer + 2.0 * config.vocab * config.hidden


def _product_flop(config: ModelConfig, num_tokens: int, num_heads_rows: int) -> float:
    """Products of num_tokens rows through the layers, and of the rows that are sampled through the head."""
    layer = attention_weights(config) + config.top_k * expert_weights(config) + config.hidden * config.num_experts
    return 2.0 * (num_tokens * config.num_layers * layer + num_heads_rows * config.vocab * config.hidden)


def floor_us(
    config: ModelConfig, dtype: Dtype, case: EngineCase, distinct: float, context: float, bytes_per_s: float = SEEN_BYTES_PER_S
) -> float:
    """Microseconds; context is that of a decode step, mean over sequences (a wave's is in the case)."""
    rate = SEEN_BF16_FLOP_PER_S if dtype == "bf16" else SEEN_FP8_FLOP_PER_S
    num_bytes = weight_bytes(config, dtype, distinct)
    pair_flop = 4.0 * config.num_layers * config.num_heads * config.head_dim
    if case.phase == "decode":
        num_bytes += case.batch * context * kv_bytes_per_token(config)
        attention_flop = pair_flop * case.batch * context
    else:
        attention_flop = pair_flop * case.batch * case.tokens * (case.tokens + 1) / 2
    products_s = _product_flop(config, case.step_tokens, case.batch) / rate
    return max(num_bytes / bytes_per_s, products_s + attention_flop / SEEN_BF16_FLOP_PER_S) * 1e6
