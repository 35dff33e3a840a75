"""What goes up for a wave: rows, positions, slots and borders, slice after slice."""

from __future__ import annotations

import pytest
import torch

from duomo.engine.batch import PromptSlice, StepBatch
from duomo.engine.gpu_wave import ALIGN, upload_rows, upload_wave


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_rows_of_mixed_slices(device: torch.device) -> None:
    slices = (
        PromptSlice(token_ids=[7, 8, 9], start=0, block_table=[5]),
        PromptSlice(token_ids=[4], start=33, block_table=[2, 9, 6, 1]),
        PromptSlice(token_ids=(3, 1), start=15, block_table=[8, 0]),
    )
    wave = upload_wave(StepBatch(slices=slices), 16, device)
    assert wave.token_id_T.tolist() == [7, 8, 9, 4, 3, 1]
    assert wave.position_T.tolist() == [0, 1, 2, 33, 15, 16]
    assert wave.slot_T.tolist() == [80, 81, 82, 97, 143, 0]
    assert wave.sequence_T.tolist() == [0, 0, 0, 1, 2, 2]
    assert wave.cu_seqlens_S1.tolist() == [0, 3, 4, 6]
    assert wave.start_S.tolist() == [0, 33, 15]
    assert [row[:3] for row in wave.table_SW.tolist()] == [[5, 0, 0], [2, 9, 6], [8, 0, 0]]
    assert (wave.has_prefix, wave.tokens_each, wave.num_sequences) == (True, None, 3)
    dtypes = {name: getattr(wave, name).dtype for name in ("token_id_T", "position_T", "slot_T", "cu_seqlens_S1", "start_S", "table_SW")}
    assert [dtypes.pop(name) for name in ("token_id_T", "slot_T")] == [torch.int64] * 2
    assert set(dtypes.values()) == {torch.int32}
    for tensor in (wave.cu_seqlens_S1, wave.start_S, wave.table_SW, wave.position_T, wave.slot_T):
        assert tensor.is_contiguous() and tensor.data_ptr() % 16 == 0, "else Triton compiles anew"
    assert wave.table_SW.shape[1] % ALIGN == 0


def test_equal_lengths_and_no_prefix_are_host_facts(device: torch.device) -> None:
    slices = tuple(PromptSlice(token_ids=[1, 2], start=0, block_table=[at]) for at in range(3))
    wave = upload_wave(StepBatch(slices=slices), 16, device)
    assert (wave.has_prefix, wave.tokens_each) == (False, 2)


@pytest.mark.parametrize("token_ids", [[], [1] * 17])
def test_slices_without_tokens_or_blocks_are_refused(token_ids: list[int], device: torch.device) -> None:
    with pytest.raises(AssertionError, match="without"):
        upload_wave(StepBatch(slices=(PromptSlice(token_ids=token_ids, start=0, block_table=[3]),)), 16, device)


def test_row_numbers(device: torch.device) -> None:
    assert upload_rows([3, 1], device).tolist() == [3, 1] and upload_rows([], device).dtype == torch.int64
