"""Owns the forward of a wave of prompts on one GPU, unit by unit: embeddings, layers lo..hi of its chunks, logits. Knows no sampling.

The verbs of duomo.engine.runner; here a chunk is laid out by one upload, and nothing waits for the device until its numbers are asked for.
Short chunks replay captured layers (gpu_captured_layers.py), where capture() was called; their launches would take the host longer than
the GPU. Long ones are launched kernel by kernel, beside the GPU's work. Which of the two goes by the chunk's size alone, so that layers
run in one piece or in many give the same bits.

Legend: T rows, S sequences, L layers, E experts, K experts a token, V vocabulary.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from duomo.engine.batch import StepBatch
from duomo.engine.expert_counts import ExpertCounts, ExpertUse, PendingUse
from duomo.engine.gpu_captured_layers import CapturedChunk, CapturedLimits, GpuCapturedLayers
from duomo.engine.gpu_first_tokens import GpuFirstTokens, LastLogits
from duomo.engine.gpu_kv_cache import GpuKvCache
from duomo.engine.gpu_wave import GpuWave, upload_rows, upload_wave
from duomo.engine.gpu_wave_attention import attend_over
from duomo.engine.wave_chunks import GridWalk, RowChunk, cut_rows
from duomo.models.gpu_decoder import GpuDecoder, KvPlace, RowState

COUNTED_TOGETHER = 1 << 20  # routed ids of several layers by one launch: of all layers of a long chunk they would take much memory


@dataclass(slots=True)
class LaunchedChunk:
    """A chunk whose kernels are launched one by one: its places on the device, and its rows as they lie between two pieces."""

    wave: GpuWave
    rows: RowState


@dataclass(slots=True)
class GpuBoundaryState:
    """A wave between two units. Belongs to the prefill: others only hand it back and read what it ran and counted.

    begun: the chunks that have run, or run next, in order. What lies on the device between two pieces is theirs: two rows of the model's
    width for each token. captured: where some of them run, and what is not counted of them yet lies. routed_LTK: where they were asked
    for, the experts' ids of all rows.
    """

    batch: StepBatch
    chunks: tuple[RowChunk, ...]
    walk: GridWalk
    counts: ExpertCounts
    captured: GpuCapturedLayers | None = None
    routed_LTK: Tensor | None = None
    begun: list[LaunchedChunk | CapturedChunk] = field(default_factory=list)

    @property
    def next_layer(self) -> int:
        return self.walk.next_layer

    @property
    def num_chunks(self) -> int:
        return len(self.chunks)

    @property
    def routed_ids(self) -> list[Tensor]:
        """The experts' ids int32 [T, K] of each layer that has run."""
        assert self.routed_LTK is not None, "begin(keeps_routed=True) keeps them"
        return list(self.routed_LTK[: self.next_layer].unbind(0))

    @property
    def expert_counts(self) -> Tensor:
        """Routed tokens, int32 [S, L, E] on the host, which waits for them; layers not yet run count zero."""
        return self.expert_use().counts_SLE

    @property
    def expert_bytes(self) -> int:
        """Bytes of expert weights that were read: of every layer and chunk those of its distinct experts. The host waits."""
        return self.expert_use().bytes_read

    def expert_use(self) -> ExpertUse:
        """Both, by one copy, which the host waits for."""
        return self.fetch_use().wait()

    def fetch_use(self) -> PendingUse:
        """Queue that copy."""
        only = self.captured_whole
        if only is not None and self.captured is not None and self.captured.knows_all_routed(only):
            return self.captured.fetch_use(only)
        for place, at in enumerate(self.begun):
            if isinstance(at, CapturedChunk):
                self.count_captured(place, at)
        return self.counts.fetch()

    @property
    def captured_whole(self) -> CapturedChunk | None:
        """The wave's only chunk, where it runs from graphs."""
        only = self.begun[0]
        return only if self.num_chunks == 1 and isinstance(only, CapturedChunk) else None

    def count_captured(self, place: int, at: CapturedChunk) -> None:
        """What its replays have routed and is not counted."""
        assert self.captured is not None
        if at.num_layers_told < at.num_layers_run:
            routed = self.captured.tell_routed(at)
            self.counts.add(routed.layer_lo, routed.ids_LTK, self.chunks[place], routed.prompt_T)
            _keep_routed(self, place, routed.layer_lo, routed.ids_LTK)


class GpuPrefill:
    """A decoder over a pool of KV. One stream, one thread at a time; several waves may be under way between units."""

    def __init__(self, decoder: GpuDecoder, cache: GpuKvCache) -> None:
        self.decoder = decoder
        self.cache = cache
        self.captured: GpuCapturedLayers | None = None
        self.capture_s = 0.0
        self._expert_bytes_L = [layer.expert_bytes for layer in decoder.weights.layers]

    def capture(self, limits: CapturedLimits, first_tokens: GpuFirstTokens | None = None, *, progress: bool = False) -> None:
        """Capture what short chunks run: from here on they replay. Touches no KV. first_tokens: who samples what they leave."""
        started_s = time.monotonic()
        self.captured = GpuCapturedLayers(self.decoder, self.cache, limits)
        self.captured.capture(first_tokens, progress=progress)
        self.capture_s = time.monotonic() - started_s

    @property
    def num_graphs(self) -> int:
        return 0 if self.captured is None else len(self.captured.graphs)

    @property
    def graph_bytes(self) -> int:
        """What the device lost to the graphs of short chunks."""
        return 0 if self.captured is None else self.captured.graphs.pool_bytes

    def capture_line(self) -> str:
        """For people: what capture() made, and what it took."""
        rows = 0 if self.captured is None else self.captured.buckets[-1]
        return f"{self.num_graphs} graphs of waves up to {rows} rows: {self.graph_bytes / 1e9:.2f} GB, {self.capture_s:.1f} s"

    @torch.inference_mode()
    def begin(self, batch: StepBatch, chunk_tokens: int | None = None, *, keeps_routed: bool = False) -> GpuBoundaryState:
        """Cut the wave and lay its first chunk out. Token ids must be below the vocabulary, positions below the context limit.

        chunk_tokens: rows that cross a layer together (None: all). keeps_routed: the state keeps every row's experts of all layers.
        """
        config, device = self.decoder.config, self.cache.device
        assert all(part.end <= config.max_position_tokens for part in batch.slices), f"past {config.max_position_tokens} positions"
        chunks, routed = cut_rows(batch, chunk_tokens), None
        if keeps_routed:
            routed = torch.empty(config.num_layers, batch.num_rows, config.top_k, dtype=torch.int32, device=device)
        counts = ExpertCounts(len(batch.slices), config.num_experts, self._expert_bytes_L, device)
        state = GpuBoundaryState(batch, chunks, GridWalk(len(chunks), config.num_layers), counts, self.captured, routed)
        self._begun(state, 0)
        return state

    @torch.inference_mode()
    def run_layers(self, lo: int, hi: int, state: GpuBoundaryState, chunks: tuple[int, int] | None = None) -> GpuBoundaryState:
        """Layers lo..hi-1, in order after those already run, of chunks [first, end) (None: all), one chunk through all of them after the
        other: writes their KV, attends over it and what lies in the pool before it."""
        first, end = (0, state.num_chunks) if chunks is None else chunks
        state.walk.check((lo, hi), (first, end))
        for place in range(first, end):
            at = self._begun(state, place)
            if isinstance(at, CapturedChunk):
                self._replay(lo, hi, state, at, place)
            else:
                self._launch(lo, hi, state, at, place)
            state.walk.advance((lo, hi), place)
        return state

    @torch.inference_mode()
    def logits(self, state: GpuBoundaryState, rows: list[int]) -> Tensor:
        """float32 [len(rows), V] of these rows, in ascending order where there are several chunks, after the last layer, on the device."""
        assert state.walk.is_over, state.walk.next_layers
        assert state.num_chunks == 1 or rows == sorted(rows), rows
        last = state.batch.last_rows
        if set(rows) <= set(last) and (left := self.leave_logits(state)) is not None:
            places = [last.index(row) for row in rows]
            is_all = places == list(range(len(last)))
            return left.logits_SV[: len(last)].clone() if is_all else left.logits_SV[upload_rows(places, self.cache.device)]
        picked, only = [], state.begun[0]
        for chunk, at in zip(state.chunks, state.begun, strict=True):
            mine = [row - chunk.row_lo for row in rows if chunk.row_lo <= row < chunk.row_hi]
            if mine or state.num_chunks == 1:
                picked.append(_rows_of(state, at).select(upload_rows(mine, self.cache.device)))
        return self.decoder.logits(_joined(picked) if picked else _rows_of(state, only).select(upload_rows([], self.cache.device)))

    def leave_logits(self, state: GpuBoundaryState) -> LastLogits | None:
        """Queue the logits of every prompt's last row, in order, to where graphs leave them: for what is launched on this stream before the
        next wave. None: the wave did not run from graphs as one chunk."""
        only = state.captured_whole
        if only is None:
            return None
        assert state.walk.is_over and state.captured is not None, state.walk.next_layers
        return state.captured.leave_logits(only)

    def run(self, batch: StepBatch, chunk_tokens: int | None = None) -> tuple[GpuBoundaryState, Tensor]:
        """The whole wave: state and the logits [sequences, V] of each slice's last token."""
        state = self.run_layers(0, self.decoder.config.num_layers, self.begin(batch, chunk_tokens))
        return state, self.logits(state, batch.last_rows)

    @torch.inference_mode()
    def launch_layer(self, layer_idx: int, at: LaunchedChunk) -> Tensor:
        """One layer of a chunk kernel by kernel, whatever was captured: run_layers without its books. Returns the experts' ids [T, K]."""
        place = KvPlace(slot_T=at.wave.slot_T, position_T=at.wave.position_T, wants_packed=True)
        pool = self.cache.layer(layer_idx)
        return self.decoder.layer(layer_idx, at.rows, place, pool, attend_over(self.decoder, at.wave, pool))

    def _launch(self, lo: int, hi: int, state: GpuBoundaryState, at: LaunchedChunk, place: int) -> None:
        uncounted: list[Tensor] = []
        for layer_idx in range(lo, hi):
            uncounted.append(self.launch_layer(layer_idx, at))
            if layer_idx + 1 == hi or len(uncounted) * uncounted[0].numel() >= COUNTED_TOGETHER:
                layer_lo, ids_LTK = layer_idx + 1 - len(uncounted), torch.stack(uncounted)
                state.counts.add(layer_lo, ids_LTK, state.chunks[place], at.wave.sequence_T)
                _keep_routed(state, place, layer_lo, ids_LTK)
                uncounted = []

    def _replay(self, lo: int, hi: int, state: GpuBoundaryState, at: CapturedChunk, place: int) -> None:
        assert state.captured is not None
        state.captured.run(lo, hi, at)
        if state.num_chunks > 1 or state.routed_LTK is not None:  # ids of all chunks and layers of a long prompt would take much memory
            state.count_captured(place, at)

    def _begun(self, state: GpuBoundaryState, place: int) -> LaunchedChunk | CapturedChunk:
        """The chunk, laid out when it is first asked for: one after the other, so that a long prompt's first does not wait for its last."""
        if place == len(state.begun):
            batch = state.chunks[place].batch
            if state.captured is not None and state.captured.bucket_of(batch) is not None:
                state.begun.append(state.captured.begin(batch))
            else:
                wave = upload_wave(batch, self.cache.spec.block_tokens, self.cache.device)
                state.begun.append(LaunchedChunk(wave, RowState(self.decoder.embed(wave.token_id_T))))
        return state.begun[place]


def _keep_routed(state: GpuBoundaryState, place: int, lo: int, ids_LTK: Tensor) -> None:
    """What a chunk's rows were routed to in the layers from lo on, where it was asked for."""
    chunk = state.chunks[place]
    if state.routed_LTK is not None:
        state.routed_LTK[lo : lo + ids_LTK.shape[0], chunk.row_lo : chunk.row_hi] = ids_LTK


def _rows_of(state: GpuBoundaryState, at: LaunchedChunk | CapturedChunk) -> RowState:
    if isinstance(at, LaunchedChunk):
        return at.rows
    assert state.captured is not None
    return state.captured.rows(at)


def _joined(parts: list[RowState]) -> RowState:
    """Rows after at least one layer, side by side."""
    if len(parts) == 1:
        return parts[0]
    residuals = [part.residual_TD for part in parts if part.residual_TD is not None]
    return RowState(torch.cat([part.x_TD for part in parts]), torch.cat(residuals))
