"""Owns the rotary tables that a configuration asks for. Knows no kernel and no device.

Llama 3.1 stretches the frequencies of a longer context (Dubey et al. 2024): with w = original tokens / wavelength, a frequency f becomes

    f / factor                      w <= low_freq_factor: turns too slowly to have been seen whole
    f                               w >= high_freq_factor
    (1 - s) f / factor + s f        between, s = (w - low_freq_factor) / (high_freq_factor - low_freq_factor)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from duomo.models.config import Llama3Rope, ModelConfig
from duomo_kernels.norm_rope import rope_frequencies, rope_tables_of


def tables_for(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin [max_position_tokens, head_dim], as duomo_kernels.norm_rope.rope_tables makes them."""
    frequency_C = rope_frequencies(config.head_dim, config.rope_theta)
    if config.rope_scaling is not None:
        frequency_C = stretched(frequency_C, config.rope_scaling)
    return rope_tables_of(config.max_position_tokens, frequency_C)


def stretched(frequency_C: Tensor, scaling: Llama3Rope) -> Tensor:
    turns_C = scaling.original_tokens / (2 * math.pi / frequency_C)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    share_C = (turns_C - low) / (high - low)
    blended_C = (1 - share_C) * frequency_C / scaling.factor + share_C * frequency_C
    return torch.where(turns_C <= low, frequency_C / scaling.factor, torch.where(turns_C >= high, frequency_C, blended_C))
