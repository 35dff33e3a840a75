"""A step's inputs against the formulas: sources and given tokens, dead rows, tables of odd widths, one count of those who live."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from duomo_kernels.decode_inputs import DecodeInputs, decode_inputs, decode_inputs_reference, empty_decode_inputs

NOTHING = -(1 << 30)


def _plan(num_rows: int, width: int, block_tokens: int, num_live: int) -> tuple[Tensor, Tensor]:
    """(plan, last tokens) on the CPU; what a dead row must not use is far out of range."""
    make = torch.Generator().manual_seed(num_rows * 1009 + width)
    last_token_R = torch.randint(0, 1 << 17, (num_rows + 3,), generator=make, dtype=torch.int32)
    plan_RW = torch.randint(0, 1 << 20, (num_rows, 4 + width), generator=make, dtype=torch.int32)
    plan_RW[:, 0] = torch.randint(-1, num_rows + 3, (num_rows,), generator=make)
    plan_RW[:, 2] = torch.randint(0, width * block_tokens, (num_rows,), generator=make)
    plan_RW[:, 3] = 0
    plan_RW[:num_live, 3] = 1
    plan_RW[num_live:, :3] = NOTHING if num_live % 2 else -NOTHING
    return plan_RW, last_token_R


def _run(plan_RW: Tensor, last_token_R: Tensor, block_tokens: int, device: torch.device) -> DecodeInputs:
    """A launch on poisoned outputs."""
    out = empty_decode_inputs(plan_RW.shape[0], plan_RW.shape[1] - 4, device)
    for field in fields(out):
        getattr(out, field.name).fill_(NOTHING)
    assert decode_inputs(plan_RW.to(device), last_token_R.to(device), block_tokens, out=out) is out
    return out


def _same(out: DecodeInputs, expected: DecodeInputs) -> bool:
    return all(torch.equal(getattr(out, field.name).cpu(), getattr(expected, field.name)) for field in fields(out))


@pytest.mark.parametrize(
    ("num_rows", "width", "block_tokens", "num_live"),
    [(1, 1, 64, 1), (1, 7, 16, 0), (8, 5, 64, 8), (17, 63, 3, 11), (5, 1500, 16, 4), (63, 2, 64, 62)],
)
def test_every_tensor(num_rows: int, width: int, block_tokens: int, num_live: int, device: torch.device) -> None:
    plan_RW, last_token_R = _plan(num_rows, width, block_tokens, num_live)
    out = _run(plan_RW, last_token_R, block_tokens, device)
    assert _same(out, decode_inputs_reference(plan_RW, last_token_R, block_tokens))
    assert out.num_valid.tolist() == [num_live]


def test_the_first_and_last_token_of_a_block(device: torch.device) -> None:
    plan_RW = torch.tensor([[-1, 7, 63, 1, 5, 9], [1, 0, 64, 1, 5, 9], [0, 0, 127, 1, 5, 9]], dtype=torch.int32)
    out = _run(plan_RW, torch.tensor([11, 12], dtype=torch.int32), 64, device)
    assert out.slot_R.tolist() == [5 * 64 + 63, 9 * 64, 9 * 64 + 63]
    assert out.token_id_R.tolist() == [7, 12, 11]
    assert out.length_R.tolist() == out.next_position_R.tolist() == [64, 65, 128]


def test_slots_beyond_32_bits(device: torch.device) -> None:
    plan_RW = torch.tensor([[-1, 7, 1, 1, (1 << 31) - 1]], dtype=torch.int32)
    out = _run(plan_RW, torch.zeros(1, dtype=torch.int32), 64, device)
    assert out.slot_R.tolist() == [((1 << 31) - 1) * 64 + 1]


def test_no_rows(device: torch.device) -> None:
    out = _run(torch.zeros(0, 6, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), 64, device)
    assert out.num_valid.tolist() == [0]


def test_wrong_arguments_are_refused(device: torch.device) -> None:
    plan_RW, last_token_R = (each.to(device) for each in _plan(4, 3, 16, 4))
    out = empty_decode_inputs(4, 3, device)
    for wrong in ((plan_RW.long(), last_token_R), (plan_RW, last_token_R.long()), (plan_RW[:3].contiguous(), last_token_R)):
        with pytest.raises(AssertionError):
            decode_inputs(*wrong, 16, out=out)


@pytest.mark.gpu
def test_a_captured_step_feeds_itself(device: torch.device) -> None:
    """The graph reads what the host copied into the plan and what the step before left, at each replay anew."""
    plans = [_plan(256, 130, 64, live) for live in (256, 200, 3)]
    plan_RW, last_token_R = plans[0][0].to(device), plans[0][1].to(device)
    out = empty_decode_inputs(256, 130, device)
    decode_inputs(plan_RW, last_token_R, 64, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode_inputs(plan_RW, last_token_R, 64, out=out)
    for plan, last_token in plans:
        plan_RW.copy_(plan)
        last_token_R.copy_(last_token)
        graph.replay()
        assert _same(out, decode_inputs_reference(plan, last_token, 64))
