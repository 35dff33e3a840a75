"""Owns the count of what a wave's rows were routed to, on the device that routes them. Knows no weights, and of a chunk only its prompts.

Routed ids are counted as soon as a chunk has crossed some layers and then dropped: those of a long prompt through all layers would take
much memory. A layer reads an expert once a chunk, whoever of its rows asks: distinct experts of every layer and chunk, times the bytes
of one, are what the wave read. Nothing waits for the device before PendingUse.wait().

Legend: S prompts, L layers, E experts, T rows, K experts a token, X = S * E.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from duomo.engine.wave_chunks import RowChunk


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertUse:
    """counts_SLE: routed tokens, int32, contiguous, on the host; layers not yet run count zero. bytes_read: expert weights, of the wave."""

    counts_SLE: Tensor
    bytes_read: int


class ExpertCounts:
    """Of one wave. expert_bytes_L: what one expert of each layer weighs. Takes no memory of the device before something is added."""

    def __init__(self, num_prompts: int, num_experts: int, expert_bytes_L: Sequence[int], device: torch.device) -> None:
        self._expert_bytes_L = expert_bytes_L
        self._shape = (num_prompts, len(expert_bytes_L), num_experts)
        self._device = device
        self._words: Tensor | None = None

    @torch.inference_mode()
    def add(self, layer_lo: int, ids_LTK: Tensor, chunk: RowChunk, prompt_T: Tensor) -> None:
        """Layers from layer_lo on of one chunk: the experts of its rows, and for each row the place of its prompt in the chunk (int64)."""
        num_layers, num_prompts, num_experts = ids_LTK.shape[0], len(chunk.batch.slices), self._shape[2]
        expert_LX = (prompt_T[:, None] * num_experts + ids_LTK).flatten(1)
        found_LX = torch.zeros(num_layers, num_prompts * num_experts, dtype=torch.int32, device=expert_LX.device)
        one = torch.ones((), dtype=torch.int32, device=expert_LX.device)
        found_LSE = found_LX.scatter_add_(1, expert_LX, one.expand(expert_LX.shape)).view(num_layers, num_prompts, num_experts)
        if self._words is None:
            self._words = self._zeros(self._device)
        layers, all_layers = slice(layer_lo, layer_lo + num_layers), self._shape[1]
        counts_SLE, distinct_L = self._words[all_layers:].view(self._shape), self._words[:all_layers]
        counts_SLE[chunk.prompts, layers].add_(found_LSE.transpose(0, 1))  # not +=, which would copy the result onto itself
        distinct_L[layers].add_((found_LSE.amax(1) > 0).sum(1, dtype=torch.int32))

    def fetch(self) -> PendingUse:
        """Queue one copy to the host."""
        end: torch.cuda.Event | None = None
        if self._words is None:
            words = self._zeros(torch.device("cpu"))
        else:
            is_cuda = self._words.device.type == "cuda"
            words = torch.empty(self._words.shape, dtype=torch.int32, pin_memory=is_cuda).copy_(self._words, non_blocking=True)
            end = torch.cuda.Event(blocking=True) if is_cuda else None  # type: ignore[no-untyped-call]  # torch ships no types for it
        if end is not None:
            end.record()
        return PendingUse(landed=partial(_landed, words, end), shape=self._shape, expert_bytes_L=self._expert_bytes_L)

    def _zeros(self, device: torch.device) -> Tensor:
        """Distinct experts of every layer, then the counts."""
        num_prompts, num_layers, num_experts = self._shape
        return torch.zeros(num_layers * (1 + num_prompts * num_experts), dtype=torch.int32, device=device)


@dataclass(frozen=True, kw_only=True, slots=True)
class PendingUse:
    """Counts on their way to the host. shape: S, L, E. landed: waits for them; int32 [L + S * L * E], nobody else's: distinct experts of
    every layer, then the counts."""

    landed: Callable[[], Tensor]
    shape: tuple[int, int, int]
    expert_bytes_L: Sequence[int]

    def wait(self) -> ExpertUse:
        """When the copy is over; in any thread."""
        words, num_layers = self.landed(), len(self.expert_bytes_L)
        num_bytes = sum(distinct * each for distinct, each in zip(words[:num_layers].tolist(), self.expert_bytes_L, strict=True))
        return ExpertUse(counts_SLE=words[num_layers:].view(self.shape), bytes_read=num_bytes)


def _landed(words: Tensor, end: torch.cuda.Event | None) -> Tensor:
    if end is not None:
        end.synchronize()
    return words
