"""Counts by a graph's body against those that are launched, whatever stands in rows of padding; who waits too late is told."""

from __future__ import annotations

import pytest
import torch

from duomo.engine.batch import PromptSlice, StepBatch
from duomo.engine.expert_counts import ExpertCounts
from duomo.engine.gpu_captured_counts import GpuCapturedCounts
from duomo.engine.gpu_host_ring import DEPTH
from duomo.engine.wave_chunks import cut_rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYERS, ROWS, SEQUENCES, TOP_K = 3, 64, 4, 2
BYTES = (5, 7, 11)  # of an expert of each layer


def counts(num_experts: int) -> GpuCapturedCounts:
    return GpuCapturedCounts(ROWS, SEQUENCES, num_experts, BYTES, DEVICE)


@pytest.mark.parametrize("num_experts", [1, 5, 32])
@pytest.mark.parametrize(("lengths", "bucket"), [((16,), 16), ((1,), 16), ((20, 1, 3, 9), 64), ((30, 34), 64), ((2, 2), 64)])
def test_what_rows_were_routed_to_and_nothing_of_padding(num_experts: int, lengths: tuple[int, ...], bucket: int) -> None:
    made = torch.Generator().manual_seed(sum(lengths))
    num_rows = sum(lengths)
    ids_LRK = torch.randint(num_experts, (LAYERS, bucket, TOP_K), generator=made, dtype=torch.int32)
    ids_LRK[:, num_rows:] = torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32)  # nobody wrote there
    sequence_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    sequence_R = torch.cat((sequence_T, torch.zeros(bucket - num_rows, dtype=torch.int64))).int()

    batch = StepBatch(slices=tuple(PromptSlice(token_ids=(1,) * length, start=0, block_table=(0,)) for length in lengths))
    launched = ExpertCounts(len(lengths), num_experts, BYTES, DEVICE)
    launched.add(0, ids_LRK[:, :num_rows].to(DEVICE), cut_rows(batch, None)[0], sequence_T.to(DEVICE))
    expected = launched.fetch().wait()

    captured = counts(num_experts)
    for _ in range(2):  # nothing of one wave is left in the next
        captured.count(ids_LRK.to(DEVICE), sequence_R.to(DEVICE), torch.tensor([num_rows], dtype=torch.int32, device=DEVICE))
        found = captured.fetch(len(lengths)).wait()
        assert torch.equal(found.counts_SLE, expected.counts_SLE) and found.counts_SLE.is_contiguous()
        assert found.counts_SLE.dtype == torch.int32 and found.bytes_read == expected.bytes_read > 0
    assert found.counts_SLE.sum(-1).tolist() == [[length * TOP_K] * LAYERS for length in lengths]


def test_a_wave_without_rows_counts_nothing() -> None:
    captured = counts(5)
    nothing_LRK, nothing_R = (torch.zeros(shape, dtype=torch.int32, device=DEVICE) for shape in ((LAYERS, 16, TOP_K), (16,)))
    captured.count(nothing_LRK, nothing_R, nothing_R[:1])
    found = captured.fetch(SEQUENCES).wait()
    assert not found.counts_SLE.any() and not found.bytes_read


def test_what_was_fetched_stays_and_whoever_waits_too_late_is_told() -> None:
    captured, rows = counts(5), torch.ones(1, dtype=torch.int32, device=DEVICE)
    pending = []
    for expert in range(DEPTH):
        ids_LRK = torch.full((LAYERS, 16, TOP_K), expert, dtype=torch.int32, device=DEVICE)
        captured.count(ids_LRK, torch.zeros(16, dtype=torch.int32, device=DEVICE), rows)
        pending.append(captured.fetch(1))
    found = [each.wait().counts_SLE for each in pending]
    captured.fetch(1)
    assert [int(counts_SLE[0, 0].argmax()) for counts_SLE in found] == list(range(DEPTH))
    with pytest.raises(AssertionError, match="waited for too late"):
        pending[0].wait()
