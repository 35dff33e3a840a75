"""Owns the plan of a decode step on its way to the device: one packed array, one copy. Knows no model and no sampling.

    a row of the bucket, int32 [4 + W]: where its token comes from (a row of the step before, or -1: the id beside it), token id, position,
    lives (0 or 1), block table; as duomo_kernels.decode_inputs reads it

Tables are as wide as the longest sequence may be: a captured step's sizes never change. Entries past a row's length are not read.

Legend: R rows of a bucket, W blocks of a table.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from duomo.engine.decode_step import DecodeRow, DecodeStep, Joining
from duomo.engine.gpu_host_ring import HostRing
from duomo_kernels.decode_inputs import PLAN_COLUMNS


class GpuStepPlan:
    """The device's copy, which captured steps read, and the way there. The host keeps an image: little of it changes."""

    def __init__(self, max_rows: int, table_width: int, block_tokens: int, device: torch.device) -> None:
        self.table_width = table_width
        self._block_tokens = block_tokens
        self._image_RW = np.zeros((max_rows, PLAN_COLUMNS + table_width), np.int32)
        self._words = torch.zeros(self._image_RW.size, dtype=torch.int32, device=device)
        self._ring = HostRing(self._image_RW.size, device)

    def rows(self, bucket: int) -> Tensor:
        """int32 [R, 4 + W], as decode_inputs reads it."""
        return self._words[: self._end(bucket)].view(bucket, -1)

    def clear(self) -> None:
        """Every row dead."""
        self._words.zero_()

    def upload(self, step: DecodeStep, bucket: int) -> None:
        """Queue the step's plan on the current stream, behind whatever reads the one before."""
        self._write(step.rows)
        if len(step.rows) < bucket:
            self._image_RW[len(step.rows) : bucket, :PLAN_COLUMNS] = (-1, 0, 0, 0)
        buffer = self._ring.take()
        buffer.array[: self._end(bucket)] = self._image_RW[:bucket].reshape(-1)
        buffer.upload(self._words[: self._end(bucket)])

    def _write(self, rows: tuple[DecodeRow, ...]) -> None:
        """Few calls for rows that come: their first step waits for this one, and runs what has not been run for a while."""
        sources = [row.source if isinstance(row.source, int) else -1 for row in rows]
        if max(sources) >= 0:
            self._go_on(rows, sources)
        for at, row in enumerate(rows):
            if isinstance(row.source, Joining):
                num_blocks = row.position // self._block_tokens + 1
                assert num_blocks <= self.table_width, f"position {row.position} lies past {self.table_width} blocks"
                self._image_RW[at, :PLAN_COLUMNS] = (-1, row.source.token_id, row.position, 1)
                self._image_RW[at, PLAN_COLUMNS : PLAN_COLUMNS + num_blocks] = row.table[:num_blocks]

    def _go_on(self, rows: tuple[DecodeRow, ...], sources: list[int]) -> None:
        """Those that were in the step before: where they moved to, and the one block that may be another; what it writes of others is
        written again."""
        num_rows, image_RW = len(rows), self._image_RW
        position_R = np.array([row.position for row in rows])
        if any(source not in (at, -1) for at, source in enumerate(sources)):
            image_RW[:num_rows] = image_RW[sources]
        goes_on_R = np.array(sources) >= 0
        assert (position_R == image_RW[:num_rows, 2] + 1)[goes_on_R].all(), "a row that goes on is fed at the next position"
        last_R = position_R // self._block_tokens
        assert last_R.max() < self.table_width, f"position {position_R.max()} lies past {self.table_width} blocks"
        image_RW[:num_rows, 0], image_RW[:num_rows, 2], image_RW[:num_rows, 3] = sources, position_R, 1
        image_RW[np.arange(num_rows), PLAN_COLUMNS + last_R] = [row.table[last] for row, last in zip(rows, last_R.tolist(), strict=True)]

    def _end(self, bucket: int) -> int:
        return bucket * (PLAN_COLUMNS + self.table_width)
