"""Owns the count of what a captured chunk's rows were routed to, in tensors of fixed places, and its way to the host. Knows no graph.

The sums of expert_counts.py, of all layers at once: some ten small launches, which a graph holds, and one copy of the prompts that a wave
has, into pinned memory that was there before. Whoever waits takes it from there, before a third further wave is fetched.

Legend: R rows of a bucket, S sequences, L layers, E experts, K experts a token, X = S * E and one more for the rows of padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from duomo.engine.expert_counts import PendingUse
from duomo.engine.gpu_host_ring import HostBuffer, HostRing


class GpuCapturedCounts:
    """Of one wave at a time. expert_bytes_L: what one expert of each layer weighs."""

    def __init__(self, max_rows: int, max_sequences: int, num_experts: int, expert_bytes_L: Sequence[int], device: torch.device) -> None:
        num_layers = len(expert_bytes_L)
        self._expert_bytes_L = expert_bytes_L
        self._words = torch.zeros(num_layers * (1 + max_sequences * num_experts), dtype=torch.int32, device=device)
        self._distinct_L = self._words[:num_layers]
        self._counts_SLE = self._words[num_layers:].view(max_sequences, num_layers, num_experts)
        self._row_R = torch.arange(max_rows, dtype=torch.int32, device=device)
        self._one = torch.ones((), dtype=torch.int32, device=device)
        self._ring = HostRing(self._words.numel(), device)

    def count(self, ids_LRK: Tensor, sequence_R: Tensor, num_valid: Tensor) -> None:
        """Only launches. ids int32 of all layers; sequence int32: each row's prompt; rows from num_valid [1] int32 on count nothing,
        whatever stands there."""
        num_sequences, num_layers, num_experts = self._counts_SLE.shape
        is_padding_R = self._row_R[: sequence_R.shape[0]] >= num_valid
        expert_LRK = (ids_LRK + (sequence_R * num_experts)[:, None]).masked_fill_(is_padding_R[:, None], num_sequences * num_experts)
        expert_LX = expert_LRK.flatten(1).long()
        found_LX = torch.zeros(num_layers, num_sequences * num_experts + 1, dtype=torch.int32, device=ids_LRK.device)
        found_LX.scatter_add_(1, expert_LX, self._one.expand(expert_LX.shape))
        found_LSE = found_LX[:, :-1].view(num_layers, num_sequences, num_experts)
        self._counts_SLE.copy_(found_LSE.transpose(0, 1))
        self._distinct_L.copy_((found_LSE.amax(1) > 0).sum(1, dtype=torch.int32))

    def fetch(self, num_prompts: int) -> PendingUse:
        """Queue one copy to the host, of the first prompts."""
        _, num_layers, num_experts = self._counts_SLE.shape
        buffer, num_words = self._ring.take(), num_layers * (1 + num_prompts * num_experts)
        buffer.download(self._words[:num_words])
        buffer.mark()
        return PendingUse(
            landed=partial(_landed, buffer, buffer.turn, num_words),
            shape=(num_prompts, num_layers, num_experts),
            expert_bytes_L=self._expert_bytes_L,
        )


def _landed(buffer: HostBuffer, turn: int, num_words: int) -> Tensor:
    buffer.wait()
    words = buffer.words[:num_words].clone()
    assert buffer.turn == turn, "waited for too late: a later wave took this one's buffer"
    return words
