"""Owns the tensors that every layer of a step shares: positions, KV places, gathers and masks. Knows no weights."""

from __future__ import annotations

import torch
from torch import Tensor

from duomo.engine.batch import PromptSlice, StepBatch
from duomo.models.layers.attention import AttentionPlan, RowGroup, write_index
from duomo_kernels.paged_attention import ChunkRows, DecodeRows, KvShape, gather_index, length_mask

GATHER_BYTES = 768 * 1024  # keys and values of one call stay in a 2 MiB L2 between gather and products: 4% of a step of 16 x 160 tokens
MIN_BUCKET_BLOCKS = 16  # decode rows whose contexts differ up to here share one gather: a second call costs about as much as 256 idle keys


def plan_attention(batch: StepBatch, shape: KvShape, cos_PC: Tensor, sin_PC: Tensor) -> AttentionPlan:
    """Tables of a step. Rows are grouped: single-token slices by context length, longer slices one by one."""
    positions, blocks, offsets = [], [], []
    for part in batch.slices:
        for position in range(part.start, part.end):
            positions.append(position)
            block, offset = divmod(position, shape.block_tokens)
            blocks.append(part.block_table[block])
            offsets.append(offset)
    positions_T = torch.tensor(positions, dtype=torch.int64)
    write = write_index(
        torch.tensor(blocks, dtype=torch.int64), torch.tensor(offsets, dtype=torch.int64), shape.num_kv_heads, shape.block_tokens
    )
    return AttentionPlan(
        cos_T1C=cos_PC.index_select(0, positions_T).unsqueeze(1),
        sin_T1C=sin_PC.index_select(0, positions_T).unsqueeze(1),
        write=write,
        groups=_groups(batch, shape),
    )


def _groups(batch: StepBatch, shape: KvShape) -> tuple[RowGroup, ...]:
    groups: list[RowGroup] = []
    buckets: dict[int, list[tuple[int, PromptSlice]]] = {}
    row = 0
    for part in batch.slices:
        num_rows = len(part.token_ids)
        if num_rows == 1:
            buckets.setdefault(_bucket_blocks(part.end, shape.block_tokens), []).append((row, part))
        else:
            table_SB = torch.tensor([part.block_table[: _num_blocks(part.end, shape.block_tokens)]], dtype=torch.int64)
            rows = ChunkRows(gather_index(table_SB, shape.num_kv_heads), part.start, num_rows)
            groups.append(RowGroup(row, row + num_rows, None, rows))
        row += num_rows
    for members in buckets.values():
        groups += _decode_groups(members, shape)
    return tuple(groups)


def _decode_groups(members: list[tuple[int, PromptSlice]], shape: KvShape) -> list[RowGroup]:
    """Members (row, slice) in calls of at most GATHER_BYTES each; rows that lie side by side need no index."""
    width = max(_num_blocks(part.end, shape.block_tokens) for _, part in members)
    sequence_bytes = width * shape.block_tokens * 2 * shape.num_kv_heads * shape.head_dim * 4
    per_call = max(1, GATHER_BYTES // sequence_bytes)
    groups = []
    for first in range(0, len(members), per_call):
        chosen = members[first : first + per_call]
        lo, hi = chosen[0][0], chosen[-1][0] + 1
        index = None if hi - lo == len(chosen) else torch.tensor([row for row, _ in chosen], dtype=torch.int64)
        groups.append(RowGroup(lo, hi, index, _decode_rows([part for _, part in chosen], shape)))
    return groups


def _decode_rows(parts: list[PromptSlice], shape: KvShape) -> DecodeRows:
    width = max(_num_blocks(part.end, shape.block_tokens) for part in parts)
    tables = []
    for part in parts:
        table = list(part.block_table[: _num_blocks(part.end, shape.block_tokens)])
        tables.append(table + table[:1] * (width - len(table)))  # idle places read a block of their own: finite, and masked
    table_SB = torch.tensor(tables, dtype=torch.int64)
    mask = length_mask([part.end for part in parts], width * shape.block_tokens)
    return DecodeRows(gather_index(table_SB, shape.num_kv_heads), mask, len(parts))


def _num_blocks(num_tokens: int, block_tokens: int) -> int:
    return -(-num_tokens // block_tokens)


def _bucket_blocks(num_tokens: int, block_tokens: int) -> int:
    """Contexts of one bucket differ at most by a factor of two above MIN_BUCKET_BLOCKS."""
    bucket = MIN_BUCKET_BLOCKS
    while bucket < _num_blocks(num_tokens, block_tokens):
        bucket *= 2
    return bucket
