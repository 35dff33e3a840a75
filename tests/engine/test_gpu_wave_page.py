"""What captured layers read of a wave: the same as what a launched wave computes on the device, and nothing of the wave before."""

from __future__ import annotations

import torch

from duomo.engine.batch import PromptSlice, StepBatch
from duomo.engine.gpu_wave import upload_wave
from duomo.engine.gpu_wave_page import GpuWavePage

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK_TOKENS = 16


def wave(*lengths: tuple[int, int]) -> StepBatch:
    """A slice for each (tokens, tokens cached before them)."""
    slices = [
        PromptSlice(token_ids=[7 * at + row for row in range(length)], start=start, block_table=[40 + 9 * at - block for block in range(9)])
        for at, (length, start) in enumerate(lengths)
    ]
    return StepBatch(slices=tuple(slices))


def page() -> GpuWavePage:
    return GpuWavePage(64, 4, 9 * BLOCK_TOKENS, BLOCK_TOKENS, DEVICE)


def assert_says(page: GpuWavePage, batch: StepBatch, bucket: int) -> None:
    expected, num, rows = upload_wave(batch, BLOCK_TOKENS, DEVICE), len(batch.slices), batch.num_rows
    assert page.num_valid.tolist() == [rows] and page.num_sequences.tolist() == [num]
    assert page.cu_seqlens_S1.tolist() == [*expected.cu_seqlens_S1.tolist(), *[rows] * (4 - num)]
    assert page.start_S.tolist() == [*expected.start_S.tolist(), *[0] * (4 - num)]
    assert page.end_S.tolist() == [*(part.end for part in batch.slices), *[0] * (4 - num)]
    assert page.last_row_S.tolist() == [*batch.last_rows, *[rows - 1] * (4 - num)]
    for found_R, expected_T, padding in (
        (page.token_R, expected.token_id_T, 0),
        (page.position_R, expected.position_T, 0),
        (page.sequence_R, expected.sequence_T, 0),
        (page.slot_R, expected.slot_T, -1),
    ):
        assert found_R[:rows].tolist() == expected_T.tolist()
        assert found_R[rows:bucket].tolist() == [padding] * (bucket - rows)
    for at, part in enumerate(batch.slices):
        used = -(-part.end // BLOCK_TOKENS)
        assert page.table_SW[at, :used].tolist() == list(part.block_table[:used])


def test_waves_one_after_the_other() -> None:
    one = page()
    for batch, bucket in (
        (wave((64, 0)), 64),
        (wave((5, 0), (20, 33), (1, 143), (9, 16)), 64),
        (wave((1, 0)), 16),
        (wave((16, 128), (3, 1)), 64),
        (wave((17, 0), (17, 0)), 64),
    ):
        assert one.holds(batch)
        one.place(batch, bucket)
        assert_says(one, batch, bucket)


def test_what_it_has_no_room_for() -> None:
    one = page()
    assert not one.holds(wave((65, 0)))
    assert not one.holds(wave((1, 0), (1, 0), (1, 0), (1, 0), (1, 0)))
    long = PromptSlice(token_ids=[1], start=16 * BLOCK_TOKENS, block_table=range(17))
    assert not one.holds(StepBatch(slices=(long,)))  # tables are made wider than asked for, to a multiple of 16


def test_a_clear_page_has_no_rows() -> None:
    one = page()
    one.place(wave((30, 2)), 64)
    one.clear()
    assert not one.num_sequences.any()
    assert one.slot_R.tolist() == [-1] * 64 and not one.num_valid.any() and not one.cu_seqlens_S1.any() and not one.token_R.any()
