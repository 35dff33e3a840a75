"""Owns the forward of one step, unit by unit: embeddings, layers lo..hi, logits. Knows no request, policy or sampling.

Identical bytes for a token's KV and logits whatever else is in the batch and whether it comes by prefill or by decode, where
`ModelRunner.is_row_exact` (design: docs/decisions, "identical").

Legend: T rows, D model, K experts a token, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from duomo.engine.batch import StepBatch
from duomo.engine.kv_cache import KvCache
from duomo.engine.plan import plan_attention
from duomo.models.layers.attention import AttentionPlan
from duomo.models.qwen3_moe import Model


@dataclass(slots=True)
class BoundaryState:
    """A step between two units. Belongs to the runner: others only hand it back, read next_layer and expert_counts."""

    batch: StepBatch
    hidden_TD: Tensor
    plan: AttentionPlan
    next_layer: int
    num_experts: int
    num_layers: int
    routed_ids: list[Tensor] = field(default_factory=list)

    @property
    def expert_counts(self) -> Tensor:
        """Routed tokens, int64 [sequences, layers, experts]; layers not yet run count zero."""
        num_sequences = len(self.batch.slices)
        counts = torch.zeros(num_sequences, self.num_layers, self.num_experts, dtype=torch.int64)
        sizes = torch.tensor([len(part.token_ids) for part in self.batch.slices])
        sequence_T = torch.repeat_interleave(torch.arange(num_sequences), sizes)
        for layer_idx, ids_TK in enumerate(self.routed_ids):
            flat = sequence_T[:, None] * self.num_experts + ids_TK[: sequence_T.numel()]
            counts[:, layer_idx] = torch.bincount(flat.flatten(), minlength=num_sequences * self.num_experts).view(num_sequences, -1)
        return counts


class ModelRunner:
    """A model over a pool of KV. Synchronous; used by one thread at a time."""

    def __init__(self, model: Model, cache: KvCache) -> None:
        self.model = model
        self.cache = cache
        self._shape = model.kv_shape(cache.spec.block_tokens)

    @property
    def is_row_exact(self) -> bool:
        """Whether results are proven to be free of the batch on this machine."""
        return self.model.is_row_exact

    @torch.inference_mode()
    def begin(self, batch: StepBatch) -> BoundaryState:
        """Embed the tokens and lay out the step. token ids must be below the vocabulary, positions below the context limit."""
        run = batch if batch.num_rows > 1 else StepBatch(slices=batch.slices * 2)  # a product of one row takes another path: run it twice
        token_ids = [token for part in run.slices for token in part.token_ids]
        plan = plan_attention(run, self._shape, self.model.cos_PC, self.model.sin_PC)
        hidden_TD = self.model.embed(torch.tensor(token_ids, dtype=torch.int64))
        config = self.model.config
        return BoundaryState(batch, hidden_TD, plan, 0, config.num_experts, config.num_layers)

    @torch.inference_mode()
    def run_layers(self, lo: int, hi: int, state: BoundaryState) -> BoundaryState:
        """Layers lo..hi-1, in order after those already run: writes the batch's KV and attends over the block tables."""
        assert lo == state.next_layer and lo < hi <= state.num_layers, (lo, hi, state.next_layer)
        for layer_idx in range(lo, hi):
            state.hidden_TD, ids_TK = self.model.layer(layer_idx, state.hidden_TD, self.cache.layer(layer_idx), state.plan, self._shape)
            state.routed_ids.append(ids_TK)
        state.next_layer = hi
        return state

    @torch.inference_mode()
    def logits(self, state: BoundaryState, rows: list[int]) -> Tensor:
        """float32 [len(rows), V] of these rows, after the last layer."""
        assert state.next_layer == state.num_layers, state.next_layer
        if not rows:
            return torch.empty(0, self.model.config.vocab)
        wanted = rows if len(rows) > 1 else rows * 2
        if wanted == list(range(state.hidden_TD.shape[0])):
            return self.model.logits(state.hidden_TD)[: len(rows)]
        return self.model.logits(state.hidden_TD.index_select(0, torch.tensor(wanted)))[: len(rows)]

    def run(self, batch: StepBatch) -> tuple[BoundaryState, Tensor]:
        """The whole step: state and the logits [sequences, V] of each slice's last token."""
        state = self.run_layers(0, self.model.config.num_layers, self.begin(batch))
        return state, self.logits(state, batch.last_rows)
