"""Owns the tensors that every layer of a step shares: positions, KV places, gathers and masks. Knows no weights."""

from __future__ import annotations

import torch
from torch import Tensor

from duomo.engine.batch import PromptSlice, StepBatch
from duomo.models.layers.attention import AttentionPlan, RowGroup, write_index
from duomo_kernels.paged_attention import ChunkRows, DecodeRows, KvShape, gather_index, length_mask

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
    is_whole = not groups and len(buckets) == 1
    for members in buckets.values():
        index = None if is_whole else torch.tensor([at for at, _ in members], dtype=torch.int64)
        groups.append(RowGroup(0, row, index, _decode_rows([part for _, part in members], shape)))
    return tuple(groups)


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
