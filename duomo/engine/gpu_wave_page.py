"""Owns what captured layers read of a wave's rows: tokens, positions, places of keys, borders, by one copy into tensors of fixed places.

The host computes it all, in numpy: launches of small kernels would take it longer than the sums, and the GPU would wait. Knows no graph.

Legend: R rows of the largest bucket, S sequences, W width of the block tables.
"""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray

from duomo.engine.batch import StepBatch
from duomo.engine.gpu_host_ring import HostRing
from duomo.engine.gpu_wave import ALIGN, aligned, int32_words

LONG_WORDS = 2  # of an int64, which slots are


class GpuWavePage:
    """int32: num_valid and num_sequences [1], cu_seqlens [S + 1], start, end and last_row [S], sequence, position and token [R], table
    [S, W]. int64: slot [R].

    end: the position behind a sequence's last row; last_row: of every sequence. Rows past a wave's own up to its bucket have no slot (-1),
    position, sequence and token 0; sequences past its own end where it ends, without a row or a prefix, and have an end of 0.
    """

    def __init__(self, max_rows: int, max_sequences: int, max_sequence_tokens: int, block_tokens: int, device: torch.device) -> None:
        self._block_tokens = block_tokens
        width = aligned(-(-max_sequence_tokens // block_tokens))
        each, rows = max_sequences, max_rows
        sizes = (1, 1, each + 1, each, each, each, rows, rows, rows, LONG_WORDS * rows)
        self._starts = list(accumulate((aligned(size) for size in (*sizes, max_sequences * width)), initial=0))
        self._width = width
        words = torch.zeros(self._starts[-1], dtype=torch.int32, device=device)
        valid, num, cu, start, end, last, sequence, position, token, slot = (
            words[at : at + size] for at, size in zip(self._starts, sizes, strict=False)
        )
        self.num_valid, self.num_sequences = valid, num
        self.cu_seqlens_S1, self.start_S, self.end_S, self.last_row_S = cu, start, end, last
        self.sequence_R, self.position_R, self.token_R, self.slot_R = sequence, position, token, slot.view(torch.int64)
        self.table_SW = words[self._starts[-2] : self._starts[-2] + max_sequences * width].view(max_sequences, width)
        self._words = words
        self._ring = HostRing(words.numel(), device)
        assert ALIGN * 4 % 8 == 0, "slots start where an int64 may"

    def holds(self, batch: StepBatch) -> bool:
        """Whether it has room for the wave."""
        longest = max(part.end for part in batch.slices)
        is_narrow = len(batch.slices) <= self.start_S.shape[0] and -(-longest // self._block_tokens) <= self._width
        return is_narrow and batch.num_rows <= self.token_R.shape[0]

    def clear(self) -> None:
        """No wave: no row has a slot."""
        self._words.zero_()
        self.slot_R.fill_(-1)

    def place(self, batch: StepBatch, bucket: int) -> None:
        """Queue the copy of a wave that it holds, for layers of so many rows."""
        up = self._ring.take()
        num_words = self._fill(up.array, batch, bucket)
        up.upload(self._words[:num_words])

    def _fill(self, words: NDArray[np.int32], batch: StepBatch, bucket: int) -> int:
        """Returns how many words, from the first on, say it."""
        at, slices, num_rows = self._starts, batch.slices, batch.num_rows
        num, most = len(slices), self.start_S.shape[0]
        lengths = np.array([len(part.token_ids) for part in slices])
        starts, ends = np.array([part.start for part in slices]), np.cumsum(lengths)
        words[at[0]], words[at[1]] = num_rows, num
        cu = words[at[2] : at[2] + most + 1]
        start, end, last = (words[place : place + most] for place in at[3:6])
        cu[0], cu[1 : num + 1], cu[num + 1 :] = 0, ends, num_rows
        start[:num], start[num:] = starts, 0
        end[:num], end[num:] = starts + lengths, 0
        last[:num], last[num:] = ends - 1, num_rows - 1
        sequence, position, token = (words[place : place + bucket] for place in at[6:9])
        sequence_T = np.repeat(np.arange(num), lengths)
        position_T = np.arange(num_rows) - np.repeat(ends - lengths - starts, lengths)
        token_T = int32_words([part.token_ids for part in slices])
        for row_R, row_T in ((sequence, sequence_T), (position, position_T), (token, token_T)):
            row_R[:num_rows], row_R[num_rows:] = row_T, 0
        table_SW = words[at[10] : at[10] + num * self._width].reshape(num, self._width)
        for row, part in zip(table_SW, slices, strict=True):
            used = -(-part.end // self._block_tokens)
            row[:used] = part.block_table[:used]
        slot = words[at[9] : at[9] + LONG_WORDS * bucket].view(np.int64)
        block_T = table_SW[sequence_T, position_T // self._block_tokens].astype(np.int64)
        slot[:num_rows], slot[num_rows:] = block_T * self._block_tokens + position_T % self._block_tokens, -1
        return at[10] + num * self._width
