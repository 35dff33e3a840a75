"""Owns the gather of KV blocks into one run of bytes and back. Knows nothing of rings, handles or sequences.

    packed = [block ids[0]] [block ids[1]] ...     each block whole: [k, v][kv head][block token][head dim]

For some heads of each block the pool is viewed as its halves, k and v, cut to those heads: B halves, W words of the heads in one.
Rows may lie apart in memory, the words of one may not.

Legend: B blocks of the pool, W words of a block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def kv_pack_reference(pool_BW: Tensor, block_ids: Sequence[int], out_W: Tensor) -> None:
    """Block by block."""
    width = pool_BW.shape[1]
    for place, block in enumerate(block_ids):
        out_W[place * width : (place + 1) * width] = pool_BW[block]


def kv_pack(pool_BW: Tensor, block_ids: Tensor, out_W: Tensor) -> None:
    """Gather blocks (ids int64 [n]) of pool [B, W] into out [n * W]. Elements of 4 or 8 bytes: bytes are ten times slower in torch."""
    assert pool_BW.element_size() >= 4 and pool_BW.stride(1) == 1 and out_W.numel() == block_ids.numel() * pool_BW.shape[1]
    torch.index_select(pool_BW, 0, block_ids, out=out_W.view(-1, pool_BW.shape[1]))


def kv_unpack(pool_BW: Tensor, block_ids: Tensor, data_W: Tensor) -> None:
    """Scatter data [n * W] into the blocks; the inverse of kv_pack. Ids are distinct."""
    assert pool_BW.element_size() >= 4 and pool_BW.stride(1) == 1 and data_W.numel() == block_ids.numel() * pool_BW.shape[1]
    pool_BW.index_copy_(0, block_ids, data_W.view(-1, pool_BW.shape[1]))
