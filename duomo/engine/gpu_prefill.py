"""Owns the forward of a wave of prompts on one GPU, unit by unit: embeddings, layers lo..hi, logits. Knows no request, policy or sampling.

The verbs of duomo.engine.runner; here a wave is laid out by one upload, and nothing waits for the device until its numbers are asked for.

Attention: our kernel, over packed rows and under cached prefixes; cuDNN where it is faster and its plans come back: it makes one for
every length, which takes the host longer than a short prompt takes the GPU. So it is given multiples of LIBRARY_STEP rows alone; one long
prompt is padded to that. Deterministic waves always take our kernel with the same tiles, with a prefix of zero keys where there is none.

Legend: T rows, S sequences, L layers, E experts, K experts a token, V vocabulary, H query heads, N kv heads, Dh head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from duomo.engine.batch import StepBatch
from duomo.engine.gpu_kv_cache import GpuKvCache
from duomo.engine.gpu_wave import GpuWave, upload_rows, upload_wave
from duomo.models.gpu_decoder import Attend, GpuDecoder, KvPlace, RowState
from duomo_kernels.prefill_attention import CachedPrefix, PrefillConfig, choose_way, prefill_attention

LIBRARY_STEP = 256
LIBRARY_MIN_TOKENS = 1024  # a shorter prompt's attention is a small part of its time

# 64 keys a tile: a prefix of whole blocks of 64 then meets the tiles of the prompt that was prefilled whole.
DETERMINISTIC_TILES = PrefillConfig(block_rows=128, block_keys=64, num_stages=3, num_warps=8)


@dataclass(slots=True)
class GpuBoundaryState:
    """A wave between two units. Belongs to the prefill: others only hand it back, read next_layer and expert_counts."""

    batch: StepBatch
    wave: GpuWave
    rows: RowState
    next_layer: int
    num_layers: int
    num_experts: int
    routed_ids: list[Tensor] = field(default_factory=list)

    @property
    def expert_counts(self) -> Tensor:
        """Routed tokens, int64 [sequences, layers, experts] on the host, which waits for them; layers not yet run count zero."""
        sequence_T, num_sequences = self.wave.sequence_T, self.wave.num_sequences
        counts_LX = torch.zeros(self.num_layers, num_sequences * self.num_experts, dtype=torch.int64, device=sequence_T.device)
        for layer_idx, ids_TK in enumerate(self.routed_ids):
            flat_X = (sequence_T[:, None] * self.num_experts + ids_TK).flatten()
            counts_LX[layer_idx].scatter_add_(0, flat_X, torch.ones_like(flat_X))
        return counts_LX.view(self.num_layers, num_sequences, -1).transpose(0, 1).contiguous().cpu()


class GpuPrefill:
    """A decoder over a pool of KV. One stream, one thread at a time; several waves may be under way between units."""

    def __init__(self, decoder: GpuDecoder, cache: GpuKvCache) -> None:
        self.decoder = decoder
        self.cache = cache

    @torch.inference_mode()
    def begin(self, batch: StepBatch) -> GpuBoundaryState:
        """Embed the tokens and lay out the wave. Token ids must be below the vocabulary, positions below the context limit."""
        config = self.decoder.config
        assert all(part.end <= config.max_position_tokens for part in batch.slices), f"past {config.max_position_tokens} positions"
        wave = upload_wave(batch, self.cache.spec.block_tokens, self.cache.device)
        rows = RowState(self.decoder.embed(wave.token_id_T))
        return GpuBoundaryState(batch, wave, rows, 0, config.num_layers, config.num_experts)

    @torch.inference_mode()
    def run_layers(self, lo: int, hi: int, state: GpuBoundaryState) -> GpuBoundaryState:
        """Layers lo..hi-1, in order after those already run: writes the wave's KV and attends over it and what is cached before it."""
        assert lo == state.next_layer and lo < hi <= state.num_layers, (lo, hi, state.next_layer)
        place = KvPlace(slot_T=state.wave.slot_T, position_T=state.wave.position_T, wants_packed=True)
        for layer_idx in range(lo, hi):
            pool = self.cache.layer(layer_idx)
            state.routed_ids.append(self.decoder.layer(layer_idx, state.rows, place, pool, self._attend(state.wave, pool)))
        state.next_layer = hi
        return state

    @torch.inference_mode()
    def logits(self, state: GpuBoundaryState, rows: list[int]) -> Tensor:
        """float32 [len(rows), V] of these rows, after the last layer, on the device."""
        assert state.next_layer == state.num_layers, state.next_layer
        return self.decoder.logits(state.rows.select(upload_rows(rows, self.cache.device)))

    def run(self, batch: StepBatch) -> tuple[GpuBoundaryState, Tensor]:
        """The whole wave: state and the logits [sequences, V] of each slice's last token."""
        state = self.run_layers(0, self.decoder.config.num_layers, self.begin(batch))
        return state, self.logits(state, batch.last_rows)

    def _attend(self, wave: GpuWave, pool: Tensor) -> Attend:
        """Attention of the wave over its packed keys, and over the pool of one layer where keys are cached."""
        is_deterministic, scale = self.decoder.is_deterministic, self.decoder.attention_scale
        prefix = CachedPrefix(pool=pool, block_table_SB=wave.table_SW, lengths_S=wave.start_S)

        def attend(q_THD: Tensor, k_TND: Tensor | None, v_TND: Tensor | None) -> Tensor:
            assert k_TND is not None and v_TND is not None, "a wave attends over packed keys"
            if is_deterministic:
                packed = (q_THD, k_TND, v_TND, wave.cu_seqlens_S1)
                config = None if q_THD.dtype == torch.float32 else DETERMINISTIC_TILES  # float32 has one configuration anyhow
                return prefill_attention(*packed, scale=scale, prefix=prefix, way="ours", config=config)
            if not wave.has_prefix and suits_library(q_THD, wave):
                return _equal_attention(q_THD, k_TND, v_TND, wave, scale)
            used = prefix if wave.has_prefix else None
            return prefill_attention(q_THD, k_TND, v_TND, wave.cu_seqlens_S1, scale=scale, prefix=used, way="ours")

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
