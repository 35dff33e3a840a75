"""The plan of a step against the same cut made tile by tile in Python, over garbage: any lengths, with late runs, in chunks."""

from __future__ import annotations

import pytest
import torch

from duomo_kernels._decode_pieces import DecodeConfig, DecodePlan, DecodeShape, allocate_plan
from duomo_kernels.decode_plan import decode_plan, decode_plan_reference, run_cuts

TILE = 32
GARBAGE = -(2**30)
ENOUGH_FOR_LATE_RUNS = [1024, 0, 700, 33]
LENGTHS = [[1], [0, 0, 0], [257], [31, 32, 33, 0, 1], [700, 5, 0, 300, 64, 1, 1], [1] * 17, ENOUGH_FOR_LATE_RUNS]


def make(lengths: list[int], device: torch.device, block_tokens: int, late: int, chunk_tokens: int | None) -> tuple[DecodePlan, DecodePlan]:
    """The plan and what it must be. Entries of the table past a length hold garbage."""
    max_blocks = 1024 // block_tokens
    shape = DecodeShape(
        num_sequences=len(lengths), num_heads=4, num_kv_heads=2, head_dim=16, block_tokens=block_tokens, max_blocks=max_blocks,
        chunk_tokens=chunk_tokens,
    )  # fmt: skip
    config = DecodeConfig(block_keys=TILE, num_stages=1, num_warps=1, programs_per_sm=2, merge="ticket", late=late, late_runs=2)
    lengths_S = torch.tensor(lengths, dtype=torch.int32, device=device)
    table_SB = torch.randperm(len(lengths) * max_blocks, device=device).to(torch.int32).view(len(lengths), max_blocks)
    used_SB = torch.arange(max_blocks, device=device)[None] * block_tokens < lengths_S[:, None]
    table_SB = torch.where(used_SB, table_SB, GARBAGE)
    plan = allocate_plan(shape, device, config)
    for part in (plan.words_T, plan.tiles_T, plan.blocks_TB, plan.runs_C8, plan.merges_S2):
        part.fill_(GARBAGE)
    return decode_plan(lengths_S, table_SB, plan), decode_plan_reference(lengths_S, table_SB, shape, config)


@pytest.mark.parametrize("chunk_tokens", [None, 3 * TILE])
@pytest.mark.parametrize(("block_tokens", "late"), [(16, 0), (64, 0), (32, 2)])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_the_plan_is_the_reference(
    device: torch.device, lengths: list[int], block_tokens: int, late: int, chunk_tokens: int | None
) -> None:
    plan, right = make(lengths, device, block_tokens, late, chunk_tokens)
    tiles = sum(max(1, -(-length // TILE)) for length in lengths)
    if late and lengths is ENOUGH_FOR_LATE_RUNS and chunk_tokens is None and device.type == "cpu":
        main = plan.shape.num_main_runs(plan.config, device)
        assert (plan.runs_C8[main:, 1] > plan.runs_C8[main:, 0]).any(), "no late run: the case tests nothing"
    assert torch.equal(plan.merges_S2, right.merges_S2)
    assert torch.equal(plan.runs_C8, right.runs_C8)
    assert torch.equal(plan.words_T[:tiles], right.words_T[:tiles])
    assert torch.equal(plan.tiles_T[:tiles], right.tiles_T[:tiles])
    assert torch.equal(plan.blocks_TB[:tiles], right.blocks_TB[:tiles])
    assert (plan.words_T[tiles:] == GARBAGE).all() and (plan.blocks_TB[tiles:] == GARBAGE).all(), "written past the last tile"


@pytest.mark.parametrize("late", [0, 2, 16])
@pytest.mark.parametrize("total", [1, 7, 8, 500, 4097])
def test_runs_hold_every_tile_once_and_none_is_longer_than_it_must_be(total: int, late: int) -> None:
    cuts = run_cuts(total, 8, late, 2)
    sizes = [b - a for a, b in zip(cuts, cuts[1:], strict=False)]
    assert cuts[0] == 0 and cuts[-1] == total and min(sizes) >= 0 and len(sizes) == (24 if late else 8)
    assert max(sizes) <= -(-total // 8)
    assert not late or max(sizes[8:]) <= max(sizes[:8])


def test_slots_are_nobody_elses(device: torch.device) -> None:
    for chunk_tokens in (None, TILE):
        plan, _ = make(ENOUGH_FOR_LATE_RUNS, device, 16, 2, chunk_tokens)
        slots = [slot + i for slot, count in plan.merges_S2.tolist() for i in range(count)]
        assert len(set(slots)) == len(slots) and max(slots) < plan.shape.num_slots(plan.config, device)


def test_wrong_arguments_are_refused(device: torch.device) -> None:
    plan, _ = make([40, 2], device, 16, 0, None)
    table_SB = torch.zeros(2, 64, dtype=torch.int32, device=device)
    with pytest.raises(AssertionError, match="lengths"):
        decode_plan(torch.zeros(3, dtype=torch.int32, device=device), table_SB, plan)
    with pytest.raises(AssertionError, match="block_table"):
        decode_plan(torch.zeros(2, dtype=torch.int32, device=device), table_SB[:, :9].contiguous(), plan)
    with pytest.raises(AssertionError, match="chunk_tokens"):
        make([40], device, 16, 0, TILE + 1)
