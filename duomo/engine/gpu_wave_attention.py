"""Owns which kernel attends over a wave, and with which tiles. Knows no decoder's weights and no unit.

Our kernel, over packed rows and under cached prefixes; cuDNN where it is faster and its plans come back: it makes one for every length,
which takes the host longer than a short prompt takes the GPU. So it is given multiples of LIBRARY_STEP rows alone; one long prompt is
padded to that. Deterministic waves always take our kernel with the same tiles, with a prefix of zero keys where there is none.

Legend: T rows, H query heads, N kv heads, Dh head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from duomo.engine.gpu_wave import GpuWave
from duomo.models.gpu_decoder import Attend, GpuDecoder
from duomo_kernels.prefill_attention import CachedPrefix, PrefillConfig, choose_way, prefill_attention

LIBRARY_STEP = 256
LIBRARY_MIN_TOKENS = 1024  # a shorter prompt's attention is a small part of its time

# 64 keys a tile: a prefix of whole blocks of 64 then meets the tiles of the prompt that was prefilled whole.
DETERMINISTIC_TILES = PrefillConfig(block_rows=128, block_keys=64, num_stages=3, num_warps=8)


def attend_over(decoder: GpuDecoder, wave: GpuWave, pool: Tensor) -> Attend:
    """Attention of the wave over its packed keys, and over the pool of one layer where keys are cached."""
    prefix = CachedPrefix(pool=pool, block_table_SB=wave.table_SW, lengths_S=wave.start_S)
    if decoder.is_deterministic or wave.has_prefix:
        return attend_under(decoder, wave.cu_seqlens_S1, prefix)

    def attend(q_THD: Tensor, k_TND: Tensor | None, v_TND: Tensor | None) -> Tensor:
        assert k_TND is not None and v_TND is not None, "a wave attends over packed keys"
        if suits_library(q_THD, wave):
            return _equal_attention(q_THD, k_TND, v_TND, wave, decoder.attention_scale)
        return prefill_attention(q_THD, k_TND, v_TND, wave.cu_seqlens_S1, scale=decoder.attention_scale, way="ours")

    return attend


def attend_under(decoder: GpuDecoder, cu_seqlens_S1: Tensor, prefix: CachedPrefix) -> Attend:
    """Attention by our kernel over packed keys, and over those of the prefix before them."""

    def attend(q_THD: Tensor, k_TND: Tensor | None, v_TND: Tensor | None) -> Tensor:
        assert k_TND is not None and v_TND is not None, "a wave attends over packed keys"
        is_fixed = decoder.is_deterministic and q_THD.dtype != torch.float32  # float32 has one configuration anyhow
        config = DETERMINISTIC_TILES if is_fixed else None
        packed = (q_THD, k_TND, v_TND, cu_seqlens_S1)
        return prefill_attention(*packed, scale=decoder.attention_scale, prefix=prefix, way="ours", config=config)

    return attend


def attend_alone(decoder: GpuDecoder, cu_seqlens_S1: Tensor, num_rows: int) -> Attend:
    """Attention by cuDNN of one prompt from its first token on; rows past its last one, up to num_rows, are seen by none of its rows."""

    def attend(q_THD: Tensor, k_TND: Tensor | None, v_TND: Tensor | None) -> Tensor:
        assert k_TND is not None and v_TND is not None, "a wave attends over packed keys"
        packed = (q_THD, k_TND, v_TND, cu_seqlens_S1)
        return prefill_attention(*packed, scale=decoder.attention_scale, way="cudnn", tokens_each=num_rows)

    return attend


def suits_library(q_THD: Tensor, wave: GpuWave) -> bool:
    """Whether cuDNN attends over a wave without prefixes: one long prompt, or several of one length that comes back."""
    if wave.tokens_each is None or wave.tokens_each < LIBRARY_MIN_TOKENS:
        return False
    is_right_length = wave.num_sequences == 1 or wave.tokens_each % LIBRARY_STEP == 0
    return is_right_length and choose_way(q_THD, tokens_each=wave.tokens_each, has_prefix=False) == "cudnn"


def _equal_attention(q_THD: Tensor, k_TND: Tensor, v_TND: Tensor, wave: GpuWave, scale: float) -> Tensor:
    """By cuDNN; rows of zeros after the prompt's end are seen by none of its rows."""
    num_tokens = q_THD.shape[0]
    missing = -num_tokens % LIBRARY_STEP
    if missing:
        q_THD, k_TND, v_TND = (pad(x, (0, 0, 0, 0, 0, missing)) for x in (q_THD, k_TND, v_TND))
    each = q_THD.shape[0] // wave.num_sequences
    return prefill_attention(q_THD, k_TND, v_TND, wave.cu_seqlens_S1, scale=scale, way="cudnn", tokens_each=each)[:num_tokens]
