"""Owns what blocks look like in a message, and a CPU's packing and landing of them. Knows no ring, no handle and no hash.

    model      [layer][block][k, v][kv head][block token][head dim] in the pool's dtype, byte for byte
    fp8_e4m3   the same rows of head dim numbers, in the same order, as kv_rows_fp8.py packs them: all codes, then an exponent for each row

A side that lands fp8_e4m3 writes it in its own pool's dtype; nothing else of it ever knows that KV came so.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from duomo.config import KvDtype
from duomo.engine.kv_cache import KvCache, KvSpec
from duomo_kernels.kv_rows_fp8 import kv_rows_fp8, kv_rows_of_fp8, packed_bytes


def message_block_bytes(spec: KvSpec, kv_dtype: KvDtype, heads: range | None = None) -> int:
    """Bytes of one block of one layer in a message. Both sides cut messages by it. heads: those of the spec's that go; None: all."""
    if kv_dtype == "fp8_e4m3":
        return packed_bytes(block_rows(spec, heads), spec.head_dim)
    return block_rows(spec, heads) * spec.head_dim * spec.dtype.itemsize


class KvMessages:
    """Payloads of messages out of a pool and into it. No state of its own, so of any thread that may read, or write, these blocks."""

    def __init__(self, cache: KvCache, kv_dtype: KvDtype) -> None:
        self._cache = cache
        self._kv_dtype = kv_dtype

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of one layer in a message."""
        return message_block_bytes(self._cache.spec, self._kv_dtype)

    def pack(self, layers: range, blocks: Sequence[int], out: memoryview, heads: range | None = None) -> int:
        """Write the payload of these blocks (of these kv heads, None: all) to the beginning of `out`; returns its bytes."""
        if self._kv_dtype == "model":
            return self._cache.pack(layers, blocks, out, heads)
        num_bytes = len(layers) * len(blocks) * message_block_bytes(self._cache.spec, self._kv_dtype, heads)
        assert out.nbytes >= num_bytes, (out.nbytes, num_bytes)
        x_RD = self._rows(len(layers) * len(blocks), heads, self._cache.spec.dtype)
        if x_RD.numel():
            self._cache.pack(layers, blocks, _bytes_of(x_RD), heads)
            kv_rows_fp8(x_RD, torch.frombuffer(out, dtype=torch.uint8, count=num_bytes))
        return num_bytes

    def scatter(self, layers: range, blocks: Sequence[int], data: memoryview, heads: range | None = None) -> None:
        """The inverse of pack: `data` holds exactly these layers, (distinct) blocks and heads; other heads are left alone."""
        if self._kv_dtype == "model":
            self._cache.scatter(layers, blocks, data, heads)
            return
        num_bytes = len(layers) * len(blocks) * message_block_bytes(self._cache.spec, self._kv_dtype, heads)
        assert data.nbytes == num_bytes, (data.nbytes, num_bytes)
        x_RD = self._rows(len(layers) * len(blocks), heads, torch.float32)
        if x_RD.numel():
            writable = memoryview(bytearray(data)) if data.readonly else data  # torch wraps no read-only memory
            kv_rows_of_fp8(torch.frombuffer(writable, dtype=torch.uint8), x_RD)
            self._cache.scatter(layers, blocks, _bytes_of(x_RD.to(self._cache.spec.dtype)), heads)

    def _rows(self, num_blocks: int, heads: range | None, dtype: torch.dtype) -> Tensor:
        spec = self._cache.spec
        return torch.empty(num_blocks * block_rows(spec, heads), spec.head_dim, dtype=dtype)


def block_rows(spec: KvSpec, heads: range | None = None) -> int:
    """Rows of head dim numbers of one block of one layer: k and v of each head (None: all) and token."""
    return 2 * (spec.num_kv_heads if heads is None else len(heads)) * spec.block_tokens


def _bytes_of(x_RD: Tensor) -> memoryview:
    """The tensor's own memory."""
    return x_RD.view(-1).view(torch.uint8).numpy().data
