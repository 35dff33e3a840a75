"""Owns the forward of one step, unit by unit: embeddings, layers lo..hi of its chunks, logits. Knows no request, policy or sampling.

Identical bytes for a token's KV and logits whatever else is in the batch and whether it comes by prefill or by decode, in whatever chunks,
where `ModelRunner.is_row_exact` (design: docs/decisions, "identical").

Legend: T rows, D model, K experts a token, V vocabulary, S sequences, L layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from duomo.engine.batch import StepBatch
from duomo.engine.expert_counts import ExpertCounts, ExpertUse
from duomo.engine.kv_cache import KvCache
from duomo.engine.plan import plan_attention
from duomo.engine.wave_chunks import GridWalk, RowChunk, cut_rows
from duomo.models.layers.attention import AttentionPlan
from duomo.models.qwen3_moe import Model

CPU = torch.device("cpu")


@dataclass(slots=True)
class BoundaryState:
    """A step between two units. Belongs to the runner: others only hand it back and read what it ran and counted.

    hidden_TD are all rows; everything else that a layer needs is one chunk's: `plan` is that of chunk plan_of, the last that ran.
    routed_ids: where they were asked for, the experts' ids [T, K] of each layer.
    """

    batch: StepBatch
    chunks: tuple[RowChunk, ...]
    walk: GridWalk
    hidden_TD: Tensor
    counts: ExpertCounts
    plan: AttentionPlan | None = None
    plan_of: int = -1
    routed_LTK: Tensor | None = None

    @property
    def next_layer(self) -> int:
        return self.walk.next_layer

    @property
    def num_chunks(self) -> int:
        return len(self.chunks)

    @property
    def routed_ids(self) -> list[Tensor]:
        assert self.routed_LTK is not None, "begin(keeps_routed=True) keeps them"
        return list(self.routed_LTK[: self.next_layer].unbind(0))

    @property
    def expert_counts(self) -> Tensor:
        """Routed tokens, int32 [S, L, E]; layers not yet run count zero."""
        return self.expert_use().counts_SLE

    @property
    def expert_bytes(self) -> int:
        """Bytes of expert weights that were read: of every layer and chunk those of its distinct experts."""
        return self.expert_use().bytes_read

    def expert_use(self) -> ExpertUse:
        """Both at once."""
        return self.counts.fetch().wait()


class ModelRunner:
    """A model over a pool of KV. Synchronous; used by one thread at a time."""

    def __init__(self, model: Model, cache: KvCache) -> None:
        self.model = model
        self.cache = cache
        self._shape = model.kv_shape(cache.spec.block_tokens)
        self._expert_bytes_L = [layer.experts.expert_bytes for layer in model.layers]

    @property
    def is_row_exact(self) -> bool:
        """Whether results are proven to be free of the batch on this machine."""
        return self.model.is_row_exact

    @torch.inference_mode()
    def begin(self, batch: StepBatch, chunk_tokens: int | None = None, *, keeps_routed: bool = False) -> BoundaryState:
        """Embed the tokens. token ids must be below the vocabulary, positions below the context limit.

        chunk_tokens: rows that cross a layer together (None: all). keeps_routed: the state keeps every row's experts of all layers.
        """
        config = self.model.config
        token_ids = [token for part in batch.slices for token in part.token_ids]
        chunks = cut_rows(batch, chunk_tokens)
        return BoundaryState(
            batch=batch,
            chunks=chunks,
            walk=GridWalk(len(chunks), config.num_layers),
            hidden_TD=self.model.embed(torch.tensor(token_ids, dtype=torch.int64)),
            counts=ExpertCounts(len(batch.slices), config.num_experts, self._expert_bytes_L, CPU),
            routed_LTK=torch.empty(config.num_layers, len(token_ids), config.top_k, dtype=torch.int64) if keeps_routed else None,
        )

    @torch.inference_mode()
    def run_layers(self, lo: int, hi: int, state: BoundaryState, chunks: tuple[int, int] | None = None) -> BoundaryState:
        """Layers lo..hi-1, in order after those already run, of chunks [first, end) (None: all), one chunk through all of them after the
        other: writes their KV and attends over the block tables."""
        first, end = (0, state.num_chunks) if chunks is None else chunks
        state.walk.check((lo, hi), (first, end))
        for place in range(first, end):
            ids_LTK = self._run_chunk(lo, hi, state, place)
            chunk = state.chunks[place]
            sizes = torch.tensor([len(part.token_ids) for part in chunk.batch.slices])
            state.counts.add(lo, ids_LTK, chunk, torch.repeat_interleave(torch.arange(sizes.numel()), sizes))
            if state.routed_LTK is not None:
                state.routed_LTK[lo:hi, chunk.row_lo : chunk.row_hi] = ids_LTK
            state.walk.advance((lo, hi), place)
        return state

    def _run_chunk(self, lo: int, hi: int, state: BoundaryState, place: int) -> Tensor:
        """Layers lo..hi-1 of one chunk; its rows of hidden_TD become theirs. Returns the experts' ids [hi - lo, T, K]."""
        chunk = state.chunks[place]
        num_rows, is_one_row = chunk.num_rows, chunk.num_rows == 1
        if state.plan is None or state.plan_of != place:
            # a product of one row takes another path: run it twice
            batch = StepBatch(slices=chunk.batch.slices * 2) if is_one_row else chunk.batch
            state.plan, state.plan_of = plan_attention(batch, self._shape, self.model.cos_PC, self.model.sin_PC), place
        rows_TD = state.hidden_TD[chunk.row_lo : chunk.row_hi]
        x_TD, routed = rows_TD.repeat(2, 1) if is_one_row else rows_TD, []
        for layer_idx in range(lo, hi):
            x_TD, ids_TK = self.model.layer(layer_idx, x_TD, self.cache.layer(layer_idx), state.plan, self._shape)
            routed.append(ids_TK[:num_rows])
        if x_TD is not rows_TD:
            rows_TD.copy_(x_TD[:num_rows])
        return torch.stack(routed)

    @torch.inference_mode()
    def logits(self, state: BoundaryState, rows: list[int]) -> Tensor:
        """float32 [len(rows), V] of these rows, after the last layer."""
        assert state.walk.is_over, state.walk.next_layers
        if not rows:
            return torch.empty(0, self.model.config.vocab)
        wanted = rows if len(rows) > 1 else rows * 2
        if wanted == list(range(state.hidden_TD.shape[0])):
            return self.model.logits(state.hidden_TD)[: len(rows)]
        return self.model.logits(state.hidden_TD.index_select(0, torch.tensor(wanted)))[: len(rows)]

    def run(self, batch: StepBatch, *, keeps_routed: bool = False) -> tuple[BoundaryState, Tensor]:
        """The whole step: state and the logits [sequences, V] of each slice's last token."""
        state = self.run_layers(0, self.model.config.num_layers, self.begin(batch, keeps_routed=keeps_routed))
        return state, self.logits(state, batch.last_rows)
