"""Where a step's rows write and read."""

from __future__ import annotations

import torch

from duomo.engine.batch import PromptSlice, StepBatch
from duomo.engine.plan import plan_attention
from duomo_kernels.norm_rope import rope_tables
from duomo_kernels.paged_attention import ChunkRows, DecodeRows, KvShape

SHAPE = KvShape(4, 2, 8, 16)
COS, SIN = rope_tables(2048, 8, 1e4)


def test_writes_and_positions() -> None:
    batch = StepBatch(slices=(PromptSlice(token_ids=[1, 2], start=15, block_table=[7, 3]),))
    plan = plan_attention(batch, SHAPE, COS, SIN)
    assert torch.equal(plan.cos_T1C[:, 0], COS[15:17])
    # pool row = ((block * 2 + side) * heads + head) * block tokens + offset
    expected = [((7 * 2 + side) * 2 + head) * 16 + 15 for side in (0, 1) for head in (0, 1)]
    expected += [((3 * 2 + side) * 2 + head) * 16 for side in (0, 1) for head in (0, 1)]
    assert plan.write.tolist() == expected


def test_decode_rows_are_grouped_by_length_and_chunks_stand_alone() -> None:
    lengths = [0, 40, 255, 256, 700, 1500]
    parts = [PromptSlice(token_ids=[1], start=length, block_table=list(range(100))) for length in lengths]
    parts.insert(2, PromptSlice(token_ids=[1, 2, 3], start=8, block_table=[0]))
    plan = plan_attention(StepBatch(slices=tuple(parts)), SHAPE, COS, SIN)
    chunks = [group for group in plan.groups if isinstance(group.rows, ChunkRows)]
    assert [(group.lo, group.hi) for group in chunks] == [(2, 5)]
    buckets = [group for group in plan.groups if isinstance(group.rows, DecodeRows)]
    rows = [(group.lo, group.hi) if group.index is None else group.index.tolist() for group in buckets]
    assert rows == [
        [0, 1, 5],
        (6, 7),
        (7, 8),
        (8, 9),
    ]


def test_one_bucket_of_decode_rows_needs_no_index() -> None:
    parts = tuple(PromptSlice(token_ids=[1], start=length, block_table=list(range(100))) for length in (3, 90))
    (group,) = plan_attention(StepBatch(slices=parts), SHAPE, COS, SIN).groups
    assert group.index is None and isinstance(group.rows, DecodeRows)
    mask = group.rows.mask_S1L
    assert mask.shape == (2, 1, 96) and (mask[0, 0] == 0).sum() == 4 and (mask[1, 0] == 0).sum() == 91


def test_a_call_gathers_a_bounded_number_of_bytes() -> None:
    shape = KvShape(4, 2, 64, 16)
    parts = tuple(PromptSlice(token_ids=[1], start=150, block_table=list(range(10))) for _ in range(10))
    groups = plan_attention(StepBatch(slices=parts), shape, *rope_tables(200, 64, 1e4)).groups
    assert [(group.lo, group.hi) for group in groups] == [(0, 4), (4, 8), (8, 10)] and all(group.index is None for group in groups)
