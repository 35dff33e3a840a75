"""Owns the tensors that every layer of a wave shares, on one GPU: tokens, positions, places of keys, borders. Knows no weights.

Token ids, borders, starts and block tables go up in one copy from pinned memory; the rest is computed from them there. Nothing waits.

Legend: T rows, S sequences, W width of the block tables.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from duomo.engine.batch import StepBatch

# Every part of the upload, and every row of the tables, starts at a multiple of 16 bytes and is as wide: Triton compiles a kernel anew for
# pointers and sizes that are and those that are not.
ALIGN = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuWave:
    """token_id_T, slot_T, sequence_T int64; position_T, cu_seqlens_S1, start_S, table_SW int32. start_S: keys in the pool before the rows.

    Host facts: has_prefix says whether any start is above zero; tokens_each is the length of all sequences, where it is one.
    """

    token_id_T: Tensor
    position_T: Tensor
    slot_T: Tensor
    sequence_T: Tensor
    cu_seqlens_S1: Tensor
    start_S: Tensor
    table_SW: Tensor
    has_prefix: bool
    tokens_each: int | None

    @property
    def num_rows(self) -> int:
        return self.token_id_T.shape[0]

    @property
    def num_sequences(self) -> int:
        return self.start_S.shape[0]


def upload_wave(batch: StepBatch, block_tokens: int, device: torch.device) -> GpuWave:
    """Lay the batch out on the device. Each slice has tokens, and a block table that covers its end."""
    slices = batch.slices
    assert all(part.token_ids and len(part.block_table) * block_tokens >= part.end for part in slices), "a slice without tokens or blocks"
    lengths = [len(part.token_ids) for part in slices]
    tables = [part.block_table[: -(-part.end // block_tokens)] for part in slices]
    width = aligned(max((len(table) for table in tables), default=1))
    token_id_T, cu_seqlens_S1, start_S, tables_X = _uploaded(
        (
            [part.token_ids for part in slices],
            [list(accumulate(lengths, initial=0))],
            [[part.start for part in slices]],
            [[*table, *(0 for _ in range(width - len(table)))] for table in tables],
        ),
        device,
    )
    row_T = torch.arange(token_id_T.shape[0], dtype=torch.int32, device=device)
    sequence_T = torch.searchsorted(cu_seqlens_S1[1:], row_T, right=True)
    position_T = row_T + (start_S - cu_seqlens_S1[:-1])[sequence_T]
    block_T = tables_X[sequence_T * width + position_T // block_tokens].long()
    return GpuWave(
        token_id_T=token_id_T.long(),
        position_T=position_T,
        slot_T=block_T * block_tokens + position_T % block_tokens,
        sequence_T=sequence_T,
        cu_seqlens_S1=cu_seqlens_S1,
        start_S=start_S,
        table_SW=tables_X.view(len(slices), width),
        has_prefix=any(part.start for part in slices),
        tokens_each=lengths[0] if len(set(lengths)) == 1 else None,
    )


def upload_rows(rows: list[int], device: torch.device) -> Tensor:
    """Row numbers, int64."""
    return torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def int32_words(runs: Sequence[Sequence[int]]) -> NDArray[np.int32]:
    """The runs one behind the other. By struct, which reads lists faster than array or numpy: a wave's first kernel waits for this."""
    return np.frombuffer(b"".join(struct.pack(f"{len(run)}i", *run) for run in runs), dtype=np.int32)


def _uploaded(parts: tuple[Sequence[Sequence[int]], ...], device: torch.device) -> list[Tensor]:
    """Each part's runs as one int32 tensor on the device, all by one copy."""
    words = [int32_words(part) for part in parts]
    starts = list(accumulate((aligned(len(each)) for each in words), initial=0))
    packed = torch.empty(starts[-1], dtype=torch.int32, pin_memory=device.type == "cuda")
    host = packed.numpy()
    for start, each in zip(starts, words, strict=False):
        host[start : start + len(each)] = each
    landed = packed.to(device, non_blocking=True)
    return [landed[start : start + len(each)] for start, each in zip(starts, words, strict=False)]


def aligned(size: int) -> int:
    """The least multiple of ALIGN that is not below."""
    return -(-size // ALIGN) * ALIGN
