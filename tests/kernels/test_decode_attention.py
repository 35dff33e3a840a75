"""Decode attention against its formula in float64: any lengths, any cut, nothing read beyond a length, bits that company cannot change."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from duomo_kernels._bounds import bound, error
from duomo_kernels._decode_pieces import (
    MOST_PROGRAMS_PER_SM,
    DecodeConfig,
    DecodePlan,
    DecodeShape,
    DecodeWorkspace,
    Merge,
    allocate_plan,
    decode_workspace,
)
from duomo_kernels.decode_attention import decode_attention, decode_attention_reference
from duomo_kernels.decode_plan import decode_plan

TILE = 32
MERGES = pytest.mark.parametrize("merge", ["ticket", "kernel"])
CHUNKS = pytest.mark.parametrize("chunk_tokens", [None, 2 * TILE])
LENGTHS = [[1], [0, 0, 0], [63], [257], [31, 32, 33, 0, 1]]
OUT_OF_RANGE = 2**30  # a block that no pool has: reading it is a fault on the GPU and a wrong address on the CPU


@dataclass(frozen=True)
class Case:
    """Inputs of one call. Every slot and table entry that must not be read is poisoned; `clean` is the pool with zeros there."""

    q_SHD: Tensor
    pool: Tensor
    clean: Tensor
    table_SB: Tensor
    lengths_S: Tensor
    scale: float

    def reference(self) -> Tensor:
        return decode_attention_reference(self.q_SHD, self.clean, self.table_SB, self.lengths_S, self.scale)


def dtype_of(device: torch.device) -> torch.dtype:
    """The interpreter of Triton 3.6 multiplies no bfloat16."""
    return torch.bfloat16 if device.type == "cuda" else torch.float16


def make_case(device: torch.device, lengths: list[int], heads: tuple[int, int], dim: int, block_tokens: int, seed: int = 0) -> Case:
    made = torch.Generator(device).manual_seed(seed)
    dtype, (num_heads, num_n) = dtype_of(device), heads
    width = max(1, -(-max(lengths) // block_tokens)) + 1
    num_blocks = len(lengths) * width + 3
    pool = torch.randn(num_blocks, 2, num_n, block_tokens, dim, generator=made, device=device).to(dtype)
    clean = pool.clone()
    order = torch.randperm(num_blocks, generator=made, device=device).to(torch.int32)
    table_SB = order[: len(lengths) * width].view(len(lengths), width).contiguous()
    for s, length in enumerate(lengths):
        used = -(-length // block_tokens)
        if length % block_tokens:
            last = int(table_SB[s, used - 1])
            pool[last, :, :, length % block_tokens :] = torch.nan
            clean[last, :, :, length % block_tokens :] = 0
        table_SB[s, used:] = OUT_OF_RANGE
    q_SHD = torch.randn(len(lengths), num_heads, dim, generator=made, device=device).to(dtype)
    return Case(q_SHD, pool, clean, table_SB, torch.tensor(lengths, dtype=torch.int32, device=device), dim**-0.5)


def small_config(merge: Merge, late: int = 0) -> DecodeConfig:
    return DecodeConfig(block_keys=TILE, num_stages=2, num_warps=2, programs_per_sm=2, merge=merge, late=late)


def shape_of(case: Case, chunk_tokens: int | None) -> DecodeShape:
    (num_sequences, num_heads, dim), pool = case.q_SHD.shape, case.pool
    return DecodeShape(
        num_sequences=num_sequences,
        num_heads=num_heads,
        num_kv_heads=pool.shape[2],
        head_dim=dim,
        block_tokens=pool.shape[3],
        max_blocks=case.table_SB.shape[1],
        chunk_tokens=chunk_tokens,
    )


def plan_of(case: Case, config: DecodeConfig | None, chunk_tokens: int | None) -> DecodePlan:
    """Made over garbage: what it does not write, nobody may read."""
    plan = allocate_plan(shape_of(case, chunk_tokens), case.pool.device, config)
    for part in (plan.words_T, plan.tiles_T, plan.blocks_TB, plan.runs_C8, plan.merges_S2):
        part.fill_(OUT_OF_RANGE)
    return decode_plan(case.lengths_S, case.table_SB, plan)


def room(case: Case, config: DecodeConfig | None, chunk_tokens: int | None) -> DecodeWorkspace:
    workspace = decode_workspace(shape_of(case, chunk_tokens), case.pool.device, config)
    for piece in (workspace.acc_UNGD, workspace.max_UNG, workspace.sum_UNG):
        piece.fill_(torch.nan)
    return workspace


def attend(
    case: Case,
    config: DecodeConfig | None = None,
    chunk_tokens: int | None = None,
    workspace: DecodeWorkspace | None = None,
    *,
    is_settled: bool = False,
) -> Tensor:
    workspace = workspace or room(case, config, chunk_tokens)
    out = torch.full_like(case.q_SHD, torch.nan)
    plan = plan_of(case, config, chunk_tokens)
    if is_settled and case.pool.device.type == "cuda":
        torch.cuda.synchronize()
    decode_attention(case.q_SHD, case.pool, plan, scale=case.scale, workspace=workspace, is_settled=is_settled, out=out)
    assert not workspace.tickets_SN.any(), "tickets must be set back"
    return out


@MERGES
@CHUNKS
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_any_lengths_any_cut(device: torch.device, lengths: list[int], chunk_tokens: int | None, merge: Merge) -> None:
    case = make_case(device, lengths, (2, 1), 32, 16)
    assert error(attend(case, small_config(merge), chunk_tokens), case.reference()) <= bound(case.pool.dtype)


@pytest.mark.parametrize(("lengths", "merge"), [([900], "kernel"), ([500, 0, 17, 400], "ticket")], ids=str)
def test_late_runs(device: torch.device, lengths: list[int], merge: Merge) -> None:
    case = make_case(device, lengths, (2, 2), 16, 16)
    assert error(attend(case, small_config(merge, late=2)), case.reference()) <= bound(case.pool.dtype)


@pytest.mark.parametrize(("heads", "dim"), [((32, 4), 128), ((32, 8), 64), ((3, 3), 128), ((6, 2), 64), ((16, 1), 16)], ids=str)
def test_heads_and_dims(device: torch.device, heads: tuple[int, int], dim: int) -> None:
    case = make_case(device, [70, 0, 5], heads, dim, 16)
    assert error(attend(case, small_config("ticket")), case.reference()) <= bound(case.pool.dtype)


def test_blocks_smaller_and_larger_than_a_tile(device: torch.device) -> None:
    for block_tokens, warps in ((16, 2), (16, 1), (32, 2), (64, 2)):
        case = make_case(device, [129, 31], (2, 1), 32, block_tokens)
        config = replace(small_config("kernel"), num_warps=warps, touch=2)
        assert error(attend(case, config, is_settled=True), case.reference()) <= bound(case.pool.dtype)


@MERGES
def test_chunks_make_bits_independent_of_company(device: torch.device, merge: Merge) -> None:
    config, chunk = small_config(merge), 2 * TILE
    long = make_case(device, [161], (2, 1), 32, 16, seed=5)
    alone = attend(long, config, chunk)
    for others in ([1], [300, 0, 17]):
        beside = make_case(device, [*others, 161], (2, 1), 32, 16, seed=6)
        together = _joined(beside, long)
        assert torch.equal(attend(together, config, chunk)[-1], alone[0])


def _joined(beside: Case, last: Case) -> Case:
    """`beside` with its last sequence replaced by `last`'s only one."""
    table_SB = torch.full_like(beside.table_SB, OUT_OF_RANGE)
    table_SB[:-1] = beside.table_SB[:-1]
    used = last.table_SB[0] < OUT_OF_RANGE
    table_SB[-1, : int(used.sum())] = last.table_SB[0, used] + beside.pool.shape[0]
    return replace(
        beside,
        q_SHD=torch.cat([beside.q_SHD[:-1], last.q_SHD]),
        pool=torch.cat([beside.pool, last.pool]),
        clean=torch.cat([beside.clean, last.clean]),
        table_SB=table_SB,
    )


def test_a_workspace_without_a_configuration_serves_any(device: torch.device) -> None:
    """A table may give fewer sequences more programs than the shape that the workspace was made for."""
    many, one = make_case(device, [3] * 9, (2, 1), 32, 16), make_case(device, [300], (2, 1), 32, 16)
    config = replace(small_config("kernel"), programs_per_sm=MOST_PROGRAMS_PER_SM, late=3, late_runs=4)
    assert error(attend(one, config, workspace=room(many, None, None)), one.reference()) <= bound(one.pool.dtype)


@MERGES
@CHUNKS
def test_a_workspace_serves_call_after_call_with_the_same_bits(device: torch.device, chunk_tokens: int | None, merge: Merge) -> None:
    config = small_config(merge)
    case, other = make_case(device, [200, 3, 0, 90], (2, 1), 32, 16), make_case(device, [5, 0, 180, 20], (2, 1), 32, 16, seed=1)
    workspace = room(case, config, chunk_tokens)
    first = attend(case, config, chunk_tokens, workspace)
    assert error(attend(other, config, chunk_tokens, workspace), other.reference()) <= bound(case.pool.dtype)
    assert torch.equal(attend(case, config, chunk_tokens, workspace), first)


def test_a_broken_kernel_fails_the_bound(device: torch.device) -> None:
    case = make_case(device, [40, 17], (4, 2), 64, 16)
    out, limit = attend(case, small_config("ticket")), bound(case.pool.dtype)
    expected = case.reference()
    assert error(out, expected) <= limit
    assert error(out, replace(case, lengths_S=case.lengths_S - 1).reference()) > limit, "one key less"
    assert error(out, replace(case, scale=case.scale * 1.1).reference()) > limit, "another scale"
    wrong_head = expected.clone()
    wrong_head[0, 1] = expected[0, 2]
    assert error(out, wrong_head) > limit, "one head in the other group"
    assert error(torch.full_like(out, torch.nan), expected) > limit, "not written"


def test_wrong_arguments_are_refused(device: torch.device) -> None:
    case = make_case(device, [40], (4, 2), 64, 16)
    with pytest.raises(AssertionError, match="lengths"):
        attend(replace(case, lengths_S=case.lengths_S.long()))
    with pytest.raises(AssertionError, match="keys a warp"):
        replace(small_config("ticket"), num_warps=4)
    with pytest.raises(AssertionError, match="late=1"):
        small_config("ticket", late=1)
    with pytest.raises(AssertionError, match="workspace holds"):
        small = room(case, None, None)
        attend(case, workspace=replace(small, max_UNG=small.max_UNG[:1]))
    with pytest.raises(AssertionError, match="chunk_tokens"):
        attend(case, small_config("ticket"), TILE + 1, room(case, None, None))
    with pytest.raises(AssertionError, match="pool"):
        attend(replace(case, pool=case.pool.float()))


@pytest.mark.gpu
@pytest.mark.parametrize("chunk_tokens", [None, 1024])
@pytest.mark.parametrize("merge", ["ticket", "kernel", None])
@pytest.mark.parametrize("block_tokens", [16, 64, 128])
@pytest.mark.parametrize(("heads", "dim"), [((32, 4), 128), ((16, 16), 128), ((32, 8), 64)], ids=str)
def test_real_shapes(heads: tuple[int, int], dim: int, block_tokens: int, merge: Merge | None, chunk_tokens: int | None) -> None:
    device = torch.device("cuda")
    case = make_case(device, [8191, *[1000 + 7 * i for i in range(14)], 0, 1], heads, dim, block_tokens)
    config = None
    if merge is not None:
        config = DecodeConfig(block_keys=64, num_stages=5, num_warps=4, programs_per_sm=2, merge=merge, late=16, touch=4)
    workspace, expected = room(case, config, chunk_tokens), case.reference()
    first = attend(case, config, chunk_tokens, workspace)
    assert error(first, expected) <= bound(case.pool.dtype)
    assert torch.equal(attend(case, config, chunk_tokens, workspace, is_settled=True), first)


@pytest.mark.gpu
def test_a_captured_graph_follows_new_lengths() -> None:
    case = make_case(torch.device("cuda"), [1500, 40, 0, 700], (32, 4), 128, 64)
    workspace, out, other = room(case, None, None), torch.full_like(case.q_SHD, torch.nan), torch.empty_like(case.q_SHD)
    plan = plan_of(case, None, None)

    def call() -> None:
        """A step of two layers."""
        decode_plan(case.lengths_S, case.table_SB, plan)
        decode_attention(case.q_SHD, case.pool, plan, scale=case.scale, workspace=workspace, out=other)
        decode_attention(case.q_SHD, case.pool, plan, scale=case.scale, workspace=workspace, is_settled=True, out=out)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for lengths in ([1500, 40, 0, 700], [3, 0, 0, 1], [1024, 33, 0, 699]):
        case.lengths_S.copy_(torch.tensor(lengths, dtype=torch.int32))
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, other)
        assert error(out, case.reference()) <= bound(case.pool.dtype)
