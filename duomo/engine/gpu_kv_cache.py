"""Owns the tensor that holds every block's keys and values on one GPU. Knows no sequence, no reader count (blocks.py) and no handoff.

Layout [layers, blocks, 2 (k, v), kv heads, block tokens, head dim], as on a CPU. Blocks are larger: attention reads a tile of 64 keys from
one place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from duomo.engine.kv_cache import KvSpec
from duomo.engine.memory_plan import GPU_BLOCK_TOKENS
from duomo.models.config import ModelConfig


def gpu_kv_spec(config: ModelConfig, *, block_tokens: int = GPU_BLOCK_TOKENS, dtype: torch.dtype = torch.bfloat16) -> KvSpec:
    """The spec that a model needs; dtype is that of its activations."""
    return KvSpec(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        block_tokens=block_tokens,
        dtype=dtype,
    )


class GpuKvCache:
    """The pool, zeroed at the start. Whoever works on it does so on one stream, or orders streams by events."""

    def __init__(self, spec: KvSpec, num_blocks: int, device: torch.device) -> None:
        self.spec = spec
        self.num_blocks = num_blocks
        shape = (spec.num_layers, num_blocks, 2, spec.num_kv_heads, spec.block_tokens, spec.head_dim)
        self.tensor = torch.zeros(shape, dtype=spec.dtype, device=device)

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def layer(self, layer_idx: int) -> Tensor:
        """The pool of one layer, [blocks, 2, kv heads, block tokens, head dim]."""
        return self.tensor[layer_idx]

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """All layers of each source block into its destination, (source, destination); no destination is a source or comes twice."""
        if not pairs:
            return
        columns = [[source for source, _ in pairs], [destination for _, destination in pairs]]
        index_2N = torch.tensor(columns, dtype=torch.int64, pin_memory=self.device.type == "cuda").to(self.device, non_blocking=True)
        self.tensor.index_copy_(1, index_2N[1], self.tensor.index_select(1, index_2N[0]))
