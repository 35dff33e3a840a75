"""Rows of a step."""

from __future__ import annotations

from duomo.engine.batch import PromptSlice, StepBatch


def test_rows() -> None:
    parts = (
        PromptSlice(token_ids=[5, 6, 7], start=4, block_table=[0]),
        PromptSlice(token_ids=[8], start=0, block_table=[1]),
    )
    batch = StepBatch(slices=parts)
    assert batch.num_rows == 4 and batch.last_rows == [2, 3] and parts[0].end == 7
    assert StepBatch(slices=()).num_rows == 0 and StepBatch(slices=()).last_rows == []
