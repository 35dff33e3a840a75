"""Owns the captured layers of short chunks on one GPU: a graph for each layer, bucket of rows and way to attend. Knows no requests.

Some fifteen launches a layer take the host longer than a thousand tokens take the GPU; one replay takes it a few microseconds. A chunk of
T rows runs in the smallest bucket that holds them: rows past T have no slot, take no expert and are no one's keys. What comes before the
first layer and after the last is captured too: embeddings, logits of last rows, first tokens (gpu_first_tokens.py), the count of what was
routed where (gpu_captured_counts.py). So a wave costs the host a few copies and its replays.

Graphs read and write tensors that all chunks share. They hold the rows of one chunk, which goes on where it stopped at no cost; when
another one runs in between, they are saved and brought back.

Two ways to attend. A prompt alone, with nothing cached before it: cuDNN, which plans for the bucket's rows once. Otherwise our kernel under
a prefix, which may be of no keys. Deterministic layers know the latter alone: a row's bits must not depend on its company.

Legend: T rows, R rows of a bucket, D model, S sequences, L layers, K experts a token, V vocabulary.
"""

from __future__ import annotations

import sys
import weakref
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from duomo.engine.batch import StepBatch
from duomo.engine.expert_counts import PendingUse
from duomo.engine.gpu_captured_counts import GpuCapturedCounts
from duomo.engine.gpu_first_tokens import GpuFirstTokens, LastLogits
from duomo.engine.gpu_graphs import GpuGraphs
from duomo.engine.gpu_kv_cache import GpuKvCache
from duomo.engine.gpu_wave_attention import attend_alone, attend_under
from duomo.engine.gpu_wave_page import GpuWavePage
from duomo.engine.wave_buckets import ALONE_MIN_ROWS, MAX_WAVE_PROMPTS, WAVE_BUCKETS, wave_buckets_up_to
from duomo.models.gpu_decoder import Attend, GpuDecoder, KvPlace, RowState
from duomo_kernels._prefill_library import takes
from duomo_kernels.prefill_attention import CachedPrefix

Way = Literal["alone", "under"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CapturedLimits:
    """The waves that graphs serve: rows, sequences, and tokens of a sequence with its prefix."""

    max_rows: int = WAVE_BUCKETS[-1]
    max_sequences: int = MAX_WAVE_PROMPTS
    max_sequence_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutedRows:
    """ids_LTK int32: the experts of layers from layer_lo on. prompt_T int64: for each row its prompt's place in the chunk."""

    layer_lo: int
    ids_LTK: Tensor
    prompt_T: Tensor


@dataclass(slots=True)
class SavedRows:
    """What the shared tensors held of a chunk: its rows [T, D], and the experts of the layers that nobody has asked for yet."""

    rows: RowState
    routed: RoutedRows


@dataclass(slots=True, weakref_slot=True, eq=False)
class CapturedChunk:
    """A chunk that runs from graphs. saved: None while the shared tensors hold it, and before its first layer. num_layers_told: whose
    experts have been asked for; nothing is kept of them."""

    batch: StepBatch
    bucket: int
    way: Way
    num_layers_run: int = 0
    num_layers_told: int = 0
    saved: SavedRows | None = None

    @property
    def num_rows(self) -> int:
        return self.batch.num_rows


class GpuCapturedLayers:
    """One thread and one stream at a time."""

    def __init__(self, decoder: GpuDecoder, cache: GpuKvCache, limits: CapturedLimits) -> None:
        config, device, dtype = decoder.config, cache.device, decoder.weights.dtype
        self.decoder, self.cache = decoder, cache
        self.buckets = wave_buckets_up_to(limits.max_rows)
        self.graphs = GpuGraphs(device)
        most = self.buckets[-1]
        self._page = GpuWavePage(most, limits.max_sequences, limits.max_sequence_tokens, cache.spec.block_tokens, device)
        self._x_RD = torch.zeros(most, config.hidden, dtype=dtype, device=device)
        self._residual_RD = torch.zeros_like(self._x_RD)
        self._ids_LRK = torch.zeros(config.num_layers, most, config.top_k, dtype=torch.int32, device=device)
        expert_bytes_L = [layer.expert_bytes for layer in decoder.weights.layers]
        self._counts = GpuCapturedCounts(most, limits.max_sequences, config.num_experts, expert_bytes_L, device)
        logits_SV = torch.zeros(limits.max_sequences, config.vocab, device=device)
        self._last = LastLogits(logits_SV, position_S=self._page.end_S, num_valid=self._page.num_sequences, graphs=self.graphs)
        self._ways = {rows: self._ways_of(rows) for rows in self.buckets}
        self._owner: weakref.ref[CapturedChunk] | None = None

    def bucket_of(self, batch: StepBatch) -> int | None:
        """Rows of the bucket that a chunk runs in; None where it is too large."""
        return next((rows for rows in self.buckets if rows >= batch.num_rows), None) if self._page.holds(batch) else None

    def begin(self, batch: StepBatch) -> CapturedChunk:
        """A chunk that has a bucket; nothing of it is on the device yet."""
        bucket = self.bucket_of(batch)
        assert bucket is not None, "a chunk without a bucket"
        is_alone = len(batch.slices) == 1 and not batch.slices[0].start
        return CapturedChunk(batch, bucket, "alone" if is_alone and "alone" in self._ways[bucket] else "under")

    @torch.inference_mode()
    def capture(self, first_tokens: GpuFirstTokens | None = None, *, progress: bool = False) -> None:
        """All layers of all buckets, largest first; each way runs one layer of each kind before, so that all is compiled. Touches no KV.

        first_tokens: who samples the logits that are left here, in graphs of the same pool.
        """
        self._page.clear()
        with self.graphs.capturing():
            for rows in tqdm(self.buckets[::-1], desc="capturing waves", unit="bucket", file=sys.stderr, disable=not progress, leave=False):
                self._capture(("embed", rows), partial(self._embed, rows))
                self._capture(("logits", rows), partial(self._logits, rows))
                for way in self._ways[rows]:
                    for layer_idx in self.decoder.weights.first_of_kinds:
                        self._layer(rows, way, layer_idx)
                    for layer_idx in range(self.decoder.config.num_layers):
                        self.graphs.capture((rows, way, layer_idx), partial(self._layer, rows, way, layer_idx))
                self._capture(("count", rows), partial(self._count, rows))  # behind the layers, whose larger tensors have made room for its
            if first_tokens is not None:
                first_tokens.capture(self._last)

    @torch.inference_mode()
    def run(self, lo: int, hi: int, chunk: CapturedChunk) -> None:
        """Layers lo..hi-1 of a chunk, in order after those already run."""
        self._take(chunk)
        for layer_idx in range(lo, hi):
            self.graphs.run((chunk.bucket, chunk.way, layer_idx), partial(self._layer, chunk.bucket, chunk.way, layer_idx))
        chunk.num_layers_run = hi

    @torch.inference_mode()
    def tell_routed(self, chunk: CapturedChunk) -> RoutedRows:
        """Of the layers that have run since this was asked the last time; what the next chunk's layers may write over."""
        routed = self._routed(chunk)
        chunk.num_layers_told = chunk.num_layers_run
        if chunk.saved is not None:
            chunk.saved.routed = RoutedRows(layer_lo=chunk.num_layers_run, ids_LTK=routed.ids_LTK[:0].clone(), prompt_T=routed.prompt_T)
        return routed

    @torch.inference_mode()
    def rows(self, chunk: CapturedChunk) -> RowState:
        """After the layers that have run, for reading; what the next chunk's layers may write over."""
        if chunk.saved is not None:
            return chunk.saved.rows
        return RowState(self._x_RD[: chunk.num_rows], self._residual_RD[: chunk.num_rows])

    @torch.inference_mode()
    def leave_logits(self, chunk: CapturedChunk) -> LastLogits:
        """Of each sequence's last row, after the last layer; what the next chunk may write over."""
        self._take(chunk)
        self.graphs.run(("logits", chunk.bucket), partial(self._logits, chunk.bucket))
        return self._last

    def knows_all_routed(self, chunk: CapturedChunk) -> bool:
        """Whether the experts of all layers are there: nothing is kept of those that somebody has asked for."""
        return chunk.num_layers_run == self.decoder.config.num_layers and not chunk.num_layers_told

    @torch.inference_mode()
    def fetch_use(self, chunk: CapturedChunk) -> PendingUse:
        """Count what the rows of a chunk were routed to of which all is known; queue the copy to the host. May be asked again."""
        assert self.knows_all_routed(chunk), (chunk.num_layers_run, chunk.num_layers_told)
        self._take(chunk)
        self.graphs.run(("count", chunk.bucket), partial(self._count, chunk.bucket))
        return self._counts.fetch(len(chunk.batch.slices))

    def _take(self, chunk: CapturedChunk) -> None:
        """Make the shared tensors this chunk's."""
        owner = None if self._owner is None else self._owner()
        if owner is chunk:
            return
        if owner is not None:  # dead ones need nothing any more
            rows, routed = self.rows(owner), self._routed(owner)
            assert rows.residual_TD is not None
            copied = RowState(rows.x_TD.clone(), rows.residual_TD.clone())
            owner.saved = SavedRows(copied, replace(routed, ids_LTK=routed.ids_LTK.clone()))
        self._owner = weakref.ref(chunk)
        self._page.place(chunk.batch, chunk.bucket)
        saved, chunk.saved = chunk.saved, None
        if saved is None:
            self.graphs.run(("embed", chunk.bucket), partial(self._embed, chunk.bucket))
            return
        assert saved.rows.residual_TD is not None
        for shared_RD, own_TD in ((self._x_RD, saved.rows.x_TD), (self._residual_RD, saved.rows.residual_TD)):
            shared_RD[: chunk.num_rows].copy_(own_TD)
            shared_RD[chunk.num_rows : chunk.bucket].zero_()  # another's: a NaN there would pass through cuDNN's weights of zero
        self._ids_LRK[saved.routed.layer_lo : chunk.num_layers_run, : chunk.num_rows].copy_(saved.routed.ids_LTK)

    def _routed(self, chunk: CapturedChunk) -> RoutedRows:
        """Of the layers that nobody has asked for yet."""
        if chunk.saved is not None:
            return chunk.saved.routed
        ids_LTK = self._ids_LRK[chunk.num_layers_told : chunk.num_layers_run, : chunk.num_rows]
        return RoutedRows(layer_lo=chunk.num_layers_told, ids_LTK=ids_LTK, prompt_T=self._page.sequence_R[: chunk.num_rows].long())

    def _ways_of(self, bucket: int) -> tuple[Way, ...]:
        dims = self._x_RD.new_empty(0, 1, self.decoder.config.head_dim)
        # of fewer rows attention is a small part
        has_library = bucket >= ALONE_MIN_ROWS and takes(dims) and not self.decoder.is_deterministic
        return ("alone", "under") if has_library else ("under",)

    def _capture(self, key: tuple[str, int], body: partial[None]) -> None:
        body()
        self.graphs.capture(key, body)

    # what graphs hold; only launches

    def _embed(self, bucket: int) -> None:
        """Rows before the first layer: the residual, and nothing to add to it, so that all layers are alike."""
        self.decoder.embed(self._page.token_R[:bucket].long(), out_TD=self._residual_RD[:bucket])
        self._x_RD[:bucket].zero_()

    def _layer(self, bucket: int, way: Way, layer_idx: int) -> None:
        page, pool = self._page, self.cache.layer(layer_idx)
        rows = RowState(self._x_RD[:bucket], self._residual_RD[:bucket])
        place = KvPlace(slot_T=page.slot_R[:bucket], position_T=page.position_R[:bucket], num_valid=page.num_valid, wants_packed=True)
        ids_RK = self.decoder.layer(layer_idx, rows, place, pool, self._attend(bucket, way, pool), out_TD=rows.x_TD)
        self._ids_LRK[layer_idx, :bucket].copy_(ids_RK)

    def _attend(self, bucket: int, way: Way, pool: Tensor) -> Attend:
        page = self._page
        if way == "alone":
            return attend_alone(self.decoder, page.cu_seqlens_S1[:2], bucket)
        return attend_under(self.decoder, page.cu_seqlens_S1, CachedPrefix(pool=pool, block_table_SB=page.table_SW, lengths_S=page.start_S))

    def _logits(self, bucket: int) -> None:
        last = RowState(self._x_RD[:bucket], self._residual_RD[:bucket]).select(self._page.last_row_S.long())
        self.decoder.logits(last, out=self._last.logits_SV)

    def _count(self, bucket: int) -> None:
        self._counts.count(self._ids_LRK[:, :bucket], self._page.sequence_R[:bucket], self._page.num_valid)
