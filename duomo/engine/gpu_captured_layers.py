"""Owns the captured layers of short waves on one GPU: a graph for each layer and bucket of rows. Knows no tokens, logits or requests.

Some fifteen launches a layer take the host longer than a thousand tokens take the GPU; one replay takes it a few microseconds. A wave of
T rows runs in the smallest bucket that holds them: rows past T have no slot, take no expert and are no one's keys. Graphs read and write
tensors that all waves share, so a wave's own rows are copied there before its layers and back behind them: others may run in between.

Attention is our kernel under a prefix (of no keys where nothing is cached): one graph serves both.

Legend: T rows, R rows of a bucket, D model, S sequences, W width of the block tables, L layers, K experts a token.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from duomo.engine.gpu_graphs import GpuGraphs
from duomo.engine.gpu_kv_cache import GpuKvCache
from duomo.engine.gpu_wave import GpuWave, aligned
from duomo.engine.gpu_wave_attention import attend_under
from duomo.engine.wave_buckets import MAX_WAVE_PROMPTS, WAVE_BUCKETS, wave_buckets_up_to
from duomo.models.gpu_decoder import GpuDecoder, KvPlace, RowState
from duomo_kernels.prefill_attention import CachedPrefix


@dataclass(frozen=True, kw_only=True, slots=True)
class CapturedLimits:
    """The waves that graphs serve: rows, sequences, and tokens of a sequence with its prefix."""

    max_rows: int = WAVE_BUCKETS[-1]
    max_sequences: int = MAX_WAVE_PROMPTS
    max_sequence_tokens: int


class GpuCapturedLayers:
    """One thread and one stream at a time."""

    def __init__(self, decoder: GpuDecoder, cache: GpuKvCache, limits: CapturedLimits) -> None:
        config, device, dtype = decoder.config, cache.device, decoder.weights.dtype
        self.decoder, self.cache = decoder, cache
        self.buckets = wave_buckets_up_to(limits.max_rows)
        self.graphs = GpuGraphs(device)
        most, width = self.buckets[-1], aligned(-(-limits.max_sequence_tokens // cache.spec.block_tokens))
        self._x_RD = torch.zeros(most, config.hidden, dtype=dtype, device=device)
        self._residual_RD = torch.zeros_like(self._x_RD)
        self._ids_LRK = torch.zeros(config.num_layers, most, config.top_k, dtype=torch.int32, device=device)
        self._slot_R = torch.full((most,), -1, dtype=torch.int64, device=device)
        self._position_R = torch.zeros(most, dtype=torch.int32, device=device)
        self._num_valid = torch.zeros(1, dtype=torch.int32, device=device)
        self._cu_seqlens_S1 = torch.zeros(limits.max_sequences + 1, dtype=torch.int32, device=device)
        self._start_S = torch.zeros(limits.max_sequences, dtype=torch.int32, device=device)
        self._table_SW = torch.zeros(limits.max_sequences, width, dtype=torch.int32, device=device)

    def bucket_of(self, wave: GpuWave) -> int | None:
        """Rows of the bucket that a wave runs in; None where it is too large."""
        num_sequences, width = wave.table_SW.shape
        if num_sequences > self._start_S.shape[0] or width > self._table_SW.shape[1]:
            return None
        return next((rows for rows in self.buckets if rows >= wave.num_rows), None)

    @torch.inference_mode()
    def capture(self, *, progress: bool = False) -> None:
        """All layers of all buckets, largest first; one layer of each kind runs before, so that all is compiled. Touches no KV."""
        self._slot_R.fill_(-1)
        for empty in (self._num_valid, self._cu_seqlens_S1, self._start_S):
            empty.zero_()
        num_layers = self.decoder.config.num_layers
        with self.graphs.capturing():
            for rows in tqdm(self.buckets[::-1], desc="capturing waves", unit="bucket", file=sys.stderr, disable=not progress, leave=False):
                for layer_idx in self.decoder.weights.first_of_kinds:
                    self._layer(rows, layer_idx)
                for layer_idx in range(num_layers):
                    self.graphs.capture((rows, layer_idx), partial(self._layer, rows, layer_idx))

    @torch.inference_mode()
    def run(self, lo: int, hi: int, rows: RowState, wave: GpuWave) -> Tensor:
        """Layers lo..hi-1 of a wave that has a bucket; `rows` becomes theirs. Returns the experts' ids int32 [hi - lo, T, K], until the
        next run."""
        bucket, num_rows = self.bucket_of(wave), wave.num_rows
        assert bucket is not None, "a wave without a bucket"
        self._place(wave, bucket)
        x_TD, residual_TD = self._x_RD[:num_rows], self._residual_RD[:num_rows]
        if rows.residual_TD is None:  # before the first layer: the same sum, so that all layers are alike
            residual_TD.copy_(rows.x_TD)
            x_TD.zero_()
        else:
            residual_TD.copy_(rows.residual_TD)
            x_TD.copy_(rows.x_TD)
        for layer_idx in range(lo, hi):
            self.graphs.run((bucket, layer_idx), partial(self._layer, bucket, layer_idx))
        rows.x_TD, rows.residual_TD = x_TD.clone(), residual_TD.clone()
        return self._ids_LRK[lo:hi, :num_rows]

    def _place(self, wave: GpuWave, bucket: int) -> None:
        """Where the wave's rows, sequences and cached keys are, into the tensors that graphs read."""
        num_rows, (num_sequences, width) = wave.num_rows, wave.table_SW.shape
        self._slot_R[:num_rows].copy_(wave.slot_T)
        self._slot_R[num_rows:bucket].fill_(-1)
        self._position_R[:num_rows].copy_(wave.position_T)
        self._num_valid.fill_(num_rows)
        self._cu_seqlens_S1[: num_sequences + 1].copy_(wave.cu_seqlens_S1)
        self._cu_seqlens_S1[num_sequences + 1 :].fill_(num_rows)
        self._start_S[:num_sequences].copy_(wave.start_S)
        self._table_SW[:num_sequences, :width].copy_(wave.table_SW)

    def _layer(self, bucket: int, layer_idx: int) -> None:
        """What a graph holds; only launches."""
        rows = RowState(self._x_RD[:bucket], self._residual_RD[:bucket])
        place = KvPlace(slot_T=self._slot_R[:bucket], position_T=self._position_R[:bucket], num_valid=self._num_valid, wants_packed=True)
        pool = self.cache.layer(layer_idx)
        prefix = CachedPrefix(pool=pool, block_table_SB=self._table_SW, lengths_S=self._start_S)
        attend = attend_under(self.decoder, self._cu_seqlens_S1, prefix)
        ids_RK = self.decoder.layer(layer_idx, rows, place, pool, attend, out_TD=rows.x_TD)
        self._ids_LRK[layer_idx, :bucket].copy_(ids_RK)
