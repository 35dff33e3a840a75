"""Owns what one step computes: which tokens of which sequences, where their KV lies. Knows no tensors and no request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptSlice:
    """Successive tokens of one sequence: `token_ids` stand at positions start, start + 1, ...; KV of 0..start-1 is in the blocks.

    block_table covers start + len(token_ids) tokens at least; the step writes the new KV into it.
    """

    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]

    @property
    def end(self) -> int:
        """Tokens in KV once the step ran."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBatch:
    """The slices of one step, in any mix: one row for each token, slice after slice. No sequence twice, none without tokens."""

    slices: tuple[PromptSlice, ...]

    @property
    def num_rows(self) -> int:
        return sum(len(part.token_ids) for part in self.slices)

    @property
    def last_rows(self) -> list[int]:
        """The row of each slice's last token: what is sampled from."""
        rows, row = [], -1
        for part in self.slices:
            row += len(part.token_ids)
            rows.append(row)
        return rows
