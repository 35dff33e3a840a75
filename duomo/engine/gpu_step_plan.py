"""Owns the plan of a decode step on its way to the device: one packed array, one copy. Knows no model and no sampling.

    a row of the bucket, int32 [4 + W]: where its token comes from (a row of the step before, or -1: the id beside it), token id, position,
    lives (0 or 1), block table; as duomo_kernels.decode_inputs reads it

Tables are as wide as the longest sequence may be: a captured step's sizes never change. Entries past a row's length are not read.

Legend: R rows of a bucket, W blocks of a table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from duomo.engine.decode_step import DecodeRow, DecodeStep
from duomo.engine.gpu_host_ring import HostRing
from duomo_kernels.decode_inputs import PLAN_COLUMNS


class GpuStepPlan:
    """The device's copy, which captured steps read, and the way there."""

    def __init__(self, max_rows: int, table_width: int, block_tokens: int, device: torch.device) -> None:
        self.table_width = table_width
        self._block_tokens = block_tokens
        num_words = max_rows * (PLAN_COLUMNS + table_width)
        self._words = torch.zeros(num_words, dtype=torch.int32, device=device)
        self._ring = HostRing(num_words, device)

    def rows(self, bucket: int) -> Tensor:
        """int32 [R, 4 + W], as decode_inputs reads it."""
        return self._words[: self._end(bucket)].view(bucket, -1)

    def clear(self) -> None:
        """Every row dead."""
        self._words.zero_()

    def upload(self, step: DecodeStep, bucket: int) -> None:
        """Queue the step's plan on the current stream, behind whatever reads the one before."""
        buffer, num_rows = self._ring.take(), len(step.rows)
        plan_RW = buffer.array[: self._end(bucket)].reshape(bucket, -1)
        plan_RW[:num_rows, :PLAN_COLUMNS] = [_columns(row) for row in step.rows]
        plan_RW[num_rows:, :PLAN_COLUMNS] = (-1, 0, 0, 0)
        for blocks_W, row in zip(plan_RW[:, PLAN_COLUMNS:], step.rows, strict=False):
            num_blocks = row.position // self._block_tokens + 1
            assert num_blocks <= min(len(row.table), self.table_width), (
                f"position {row.position} lies past a table of {len(row.table)} blocks"
            )
            blocks_W[:num_blocks] = row.table[:num_blocks]
        buffer.upload(self._words[: self._end(bucket)])

    def _end(self, bucket: int) -> int:
        return bucket * (PLAN_COLUMNS + self.table_width)


def _columns(row: DecodeRow) -> tuple[int, int, int, int]:
    if isinstance(row.source, int):
        return row.source, 0, row.position, 1
    return -1, row.source.token_id, row.position, 1
