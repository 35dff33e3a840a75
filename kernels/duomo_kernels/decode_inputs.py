"""Owns the first node of a captured decode step: from the host's plan and the last step's tokens to what the layers read. Knows no layer.

A row of the plan, int32 [4 + W]: source, token id, position, live, then W entries of the block table.

    token id       last_token[source] where source >= 0 (0 where that row sampled none: -1), else the plan's
    position       the plan's, of the token that is fed;    next_position = position + 1, of the token to be sampled
    slot           table[position // S] * S + position % S
    length         position + 1: the keys that attention reads
    num_valid      the number of live rows; the host keeps them in front

A row that does not live gets token 0, positions 0, slot -1 (no key is written), length 0 (none is read); its source and token may be
anything. Every tensor of the answer is written whole, so that a graph replayed on them needs nothing of the step before.

Legend: R rows, W entries of a block table, S block tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from duomo_kernels._launch import check, pdl_options, start_next, wait_for_previous

PLAN_COLUMNS = 4
SOURCE, TOKEN, POSITION, LIVE = (tl.constexpr(column) for column in range(4))
TABLE = tl.constexpr(PLAN_COLUMNS)
_COPIED = 1024  # table entries a step of the copy


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeInputs:
    """Static tensors of a captured step."""

    token_id_R: Tensor
    position_R: Tensor
    next_position_R: Tensor
    slot_R: Tensor
    length_R: Tensor
    table_RW: Tensor
    num_valid: Tensor


def empty_decode_inputs(num_rows: int, table_width: int, device: torch.device) -> DecodeInputs:
    """token_id, slot int64; the others int32; num_valid [1]."""

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    return DecodeInputs(
        token_id_R=empty(num_rows, dtype=torch.int64),
        position_R=empty(num_rows),
        next_position_R=empty(num_rows),
        slot_R=empty(num_rows, dtype=torch.int64),
        length_R=empty(num_rows),
        table_RW=empty(num_rows, table_width),
        num_valid=empty(1),
    )


def decode_inputs_reference(plan_RW: Tensor, last_token_R: Tensor, block_tokens: int) -> DecodeInputs:
    """Row by row, as the formulas stand."""
    num_rows, table_width = plan_RW.shape[0], plan_RW.shape[1] - PLAN_COLUMNS
    out = empty_decode_inputs(num_rows, table_width, plan_RW.device)
    last_token, num_valid = last_token_R.tolist(), 0
    for row, (source, token, position, live, *table) in enumerate(plan_RW.tolist()):
        is_live = live != 0
        num_valid += is_live
        out.token_id_R[row] = (max(last_token[source], 0) if source >= 0 else token) if is_live else 0
        out.position_R[row] = position if is_live else 0
        out.next_position_R[row] = out.length_R[row] = position + 1 if is_live else 0
        out.slot_R[row] = table[position // block_tokens] * block_tokens + position % block_tokens if is_live else -1
        out.table_RW[row] = torch.tensor(table, dtype=torch.int32)
    out.num_valid[0] = num_valid
    return out


@triton.jit
def _decode_inputs(
    plan_ptr, last_token_ptr, token_ptr, position_ptr, next_ptr, slot_ptr, length_ptr, table_ptr, valid_ptr, num_rows,
    W: tl.constexpr, S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Program: one row; the first counts those that live, too."""
    row = tl.program_id(0).to(tl.int64)
    plan_row = plan_ptr + row * (W + TABLE)
    wait_for_previous(USE_PDL)
    source, token = tl.load(plan_row + SOURCE), tl.load(plan_row + TOKEN)
    position, is_live = tl.load(plan_row + POSITION), tl.load(plan_row + LIVE) != 0
    sampled = tl.load(last_token_ptr + source, mask=is_live & (source >= 0), other=0)
    block = tl.load(plan_row + TABLE + position // S, mask=is_live, other=0).to(tl.int64)
    start_next(USE_PDL)
    token = tl.where(source >= 0, tl.maximum(sampled, 0), token)
    tl.store(token_ptr + row, tl.where(is_live, token, 0).to(tl.int64))
    tl.store(position_ptr + row, tl.where(is_live, position, 0))
    tl.store(next_ptr + row, tl.where(is_live, position + 1, 0))
    tl.store(length_ptr + row, tl.where(is_live, position + 1, 0))
    tl.store(slot_ptr + row, tl.where(is_live, block * S + position % S, -1))
    for first in tl.static_range(0, W, BLOCK_W):
        entry_W = first + tl.arange(0, BLOCK_W)
        table_W = tl.load(plan_row + TABLE + entry_W, mask=entry_W < W, other=0)
        tl.store(table_ptr + row * W + entry_W, table_W, mask=entry_W < W)
    if row == 0:
        row_R = tl.arange(0, BLOCK_R).to(tl.int64)
        live_R = tl.load(plan_ptr + row_R * (W + TABLE) + LIVE, mask=row_R < num_rows, other=0)
        tl.store(valid_ptr, tl.sum((live_R != 0).to(tl.int32), axis=0))


def decode_inputs(plan_RW: Tensor, last_token_R: Tensor, block_tokens: int, *, out: DecodeInputs) -> DecodeInputs:
    """plan [R, 4 + W] int32, last_token [any] int32 -> out, as empty_decode_inputs makes it for R rows and W entries.

    Live rows: 0 <= position < W * block_tokens, source below last_token's size.
    """
    num_rows, width, device = plan_RW.shape[0], plan_RW.shape[1] - PLAN_COLUMNS, plan_RW.device
    assert width >= 1 and block_tokens >= 1, (width, block_tokens)
    check("plan_RW", plan_RW, torch.int32, num_rows, width + PLAN_COLUMNS)
    check("last_token_R", last_token_R, torch.int32, None, device=device)
    for name in ("token_id_R", "slot_R"):
        check(name, getattr(out, name), torch.int64, num_rows, device=device)
    for name in ("position_R", "next_position_R", "length_R"):
        check(name, getattr(out, name), torch.int32, num_rows, device=device)
    check("table_RW", out.table_RW, torch.int32, num_rows, width, device=device)
    check("num_valid", out.num_valid, torch.int32, 1, device=device)
    if num_rows == 0:
        out.num_valid.zero_()
        return out
    _decode_inputs[(num_rows,)](
        plan_RW, last_token_R, out.token_id_R, out.position_R, out.next_position_R, out.slot_R, out.length_R, out.table_RW, out.num_valid,
        num_rows, W=width, S=block_tokens, BLOCK_R=triton.next_power_of_2(num_rows), BLOCK_W=min(_COPIED, triton.next_power_of_2(width)),
        num_warps=1 if max(num_rows, width) <= 256 else 4, **pdl_options(device),
    )  # fmt: skip
    return out
