"""Owns the tensor that holds every block's keys and values. Knows no sequence and no reader count (blocks.py does).

Layout [layers, blocks, 2 (k, v), kv heads, block tokens, head dim]: a head slice of a block is contiguous, a block of one layer too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from duomo.models.config import ModelConfig
from duomo_kernels.kv_pack import kv_pack, kv_unpack


@dataclass(frozen=True, kw_only=True, slots=True)
class KvSpec:
    """What one block holds."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_tokens: int = 16
    dtype: torch.dtype = torch.float32

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of one layer, keys and values."""
        return 2 * self.num_kv_heads * self.block_tokens * self.head_dim * self.dtype.itemsize


def kv_spec(config: ModelConfig, block_tokens: int = 16) -> KvSpec:
    """The spec that a model needs."""
    return KvSpec(num_layers=config.num_layers, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim, block_tokens=block_tokens)


class KvCache:
    """The pool. Zeroed at the start, so that a masked key is always finite. Used by one thread at a time."""

    def __init__(self, spec: KvSpec, num_blocks: int) -> None:
        self.spec = spec
        self.num_blocks = num_blocks
        self.tensor = torch.zeros(spec.num_layers, num_blocks, 2, spec.num_kv_heads, spec.block_tokens, spec.head_dim, dtype=spec.dtype)
        self._rows_LBW = self.tensor.view(spec.num_layers, num_blocks, -1)

    def layer(self, layer_idx: int) -> Tensor:
        """The pool of one layer, [blocks, 2, kv heads, block tokens, head dim]."""
        return self.tensor[layer_idx]

    def pack(self, layers: range, blocks: Sequence[int], out: memoryview, heads: range | None = None) -> int:
        """Copy the blocks of the layers into `out` as [layer][block][k, v][kv head][block token][head dim]; returns the bytes written.

        heads: those of this cache's kv heads that go; None: all.
        """
        rows_LRW, row_ids = self._rows(blocks, heads)
        num_bytes = self._num_bytes(layers, rows_LRW, row_ids)
        assert out.nbytes >= num_bytes, (out.nbytes, num_bytes)
        if not num_bytes:
            return 0
        words_LW = self._words(out, num_bytes).view(len(layers), -1)
        for place, layer_idx in enumerate(layers):
            kv_pack(rows_LRW[layer_idx], row_ids, words_LW[place])
        return num_bytes

    def scatter(self, layers: range, blocks: Sequence[int], data: memoryview, heads: range | None = None) -> None:
        """The inverse of pack: `data` holds exactly these layers, (distinct) blocks and heads; other heads are left alone."""
        rows_LRW, row_ids = self._rows(blocks, heads)
        num_bytes = self._num_bytes(layers, rows_LRW, row_ids)
        assert data.nbytes == num_bytes, (data.nbytes, num_bytes)
        if not num_bytes:
            return
        writable = memoryview(bytearray(data)) if data.readonly else data  # torch wraps no read-only memory
        words_LW = self._words(writable, num_bytes).view(len(layers), -1)
        for place, layer_idx in enumerate(layers):
            kv_unpack(rows_LRW[layer_idx], row_ids, words_LW[place])

    def copy_block(self, src: int, dst: int) -> None:
        """All layers of block `src` into block `dst`."""
        self.tensor[:, dst] = self.tensor[:, src]

    def _rows(self, blocks: Sequence[int], heads: range | None) -> tuple[Tensor, Tensor]:
        """The pool as rows, [layers, rows, words], and whose they are: blocks whole, or where some heads are meant each block's k and v."""
        ids = torch.tensor(blocks, dtype=torch.int64)
        num_heads, head_words = self.spec.num_kv_heads, self.spec.block_tokens * self.spec.head_dim
        if heads is None or heads == range(num_heads):
            return self._rows_LBW, ids
        assert heads.step == 1 and 0 <= heads.start < heads.stop <= num_heads, (heads, num_heads)
        halves_LRW = self.tensor.view(self.spec.num_layers, 2 * self.num_blocks, num_heads * head_words)
        return halves_LRW[:, :, heads.start * head_words : heads.stop * head_words], (2 * ids[:, None] + torch.arange(2)).flatten()

    def _num_bytes(self, layers: range, rows_LRW: Tensor, row_ids: Tensor) -> int:
        return len(layers) * len(row_ids) * rows_LRW.shape[2] * self.spec.dtype.itemsize

    def _words(self, data: memoryview, num_bytes: int) -> Tensor:
        return torch.frombuffer(data, dtype=self.spec.dtype, count=num_bytes // self.spec.dtype.itemsize)
