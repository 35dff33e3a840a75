"""Owns the forward of a wave of prompts on one GPU, unit by unit: embeddings, layers lo..hi, logits. Knows no request, policy or sampling.

The verbs of duomo.engine.runner; here a wave is laid out by one upload, and nothing waits for the device until its numbers are asked for.
Short waves replay captured layers (gpu_captured_layers.py), where capture() was called; their launches would take the host longer than the
GPU. Long ones are launched kernel by kernel, beside the GPU's work.

Legend: T rows, S sequences, L layers, E experts, K experts a token, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from duomo.engine.batch import StepBatch
from duomo.engine.gpu_captured_layers import CapturedLimits, GpuCapturedLayers
from duomo.engine.gpu_kv_cache import GpuKvCache
from duomo.engine.gpu_wave import GpuWave, upload_rows, upload_wave
from duomo.engine.gpu_wave_attention import attend_over
from duomo.models.gpu_decoder import GpuDecoder, KvPlace, RowState

COUNTED_TOGETHER = 1 << 20  # routed ids of several layers by one launch: of all layers of a long wave they would take much memory


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
        step = self.num_layers if not self.routed_ids else max(1, COUNTED_TOGETHER // self.routed_ids[0].numel())
        for lo in range(0, len(self.routed_ids), step):
            ids_LTK = torch.stack(self.routed_ids[lo : lo + step])
            flat_LX = (sequence_T[:, None] * self.num_experts + ids_LTK).flatten(1)
            counts_LX[lo : lo + step].scatter_add_(1, flat_LX, torch.ones_like(flat_LX))
        return counts_LX.view(self.num_layers, num_sequences, -1).transpose(0, 1).contiguous().cpu()


class GpuPrefill:
    """A decoder over a pool of KV. One stream, one thread at a time; several waves may be under way between units."""

    def __init__(self, decoder: GpuDecoder, cache: GpuKvCache) -> None:
        self.decoder = decoder
        self.cache = cache
        self.captured: GpuCapturedLayers | None = None

    def capture(self, limits: CapturedLimits, *, progress: bool = False) -> None:
        """Capture what short waves run: from here on they replay. Touches no KV."""
        self.captured = GpuCapturedLayers(self.decoder, self.cache, limits)
        self.captured.capture(progress=progress)

    @property
    def num_graphs(self) -> int:
        return 0 if self.captured is None else len(self.captured.graphs)

    @property
    def graph_bytes(self) -> int:
        """What the device lost to the graphs of short waves."""
        return 0 if self.captured is None else self.captured.graphs.pool_bytes

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
        if self.captured is not None and self.captured.bucket_of(state.wave) is not None:
            state.routed_ids += self.captured.run(lo, hi, state.rows, state.wave)
        else:
            self.launch_layers(lo, hi, state)
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

    @torch.inference_mode()
    def launch_layers(self, lo: int, hi: int, state: GpuBoundaryState) -> None:
        """These layers kernel by kernel, whatever was captured: run_layers without its books."""
        place = KvPlace(slot_T=state.wave.slot_T, position_T=state.wave.position_T, wants_packed=True)
        for layer_idx in range(lo, hi):
            pool = self.cache.layer(layer_idx)
            attend = attend_over(self.decoder, state.wave, pool)
            state.routed_ids.append(self.decoder.layer(layer_idx, state.rows, place, pool, attend))
