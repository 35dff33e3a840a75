"""QK norm, rope and the write of K and V against float64: every norm, odd sizes, padded rows, untouched slots, rows that stand alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor

from duomo_kernels._bounds import bound, error
from duomo_kernels.norm_rope import rope_tables
from duomo_kernels.qk_rope_write import QkNorm, RopeTables, qk_rope_write, qk_rope_write_reference

BF16 = torch.bfloat16
POSITIONS = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Heads, kv heads, head dim, tokens; norm is none, head or whole."""

    heads: int
    kv_heads: int
    dim: int
    tokens: int
    norm: str
    dtype: torch.dtype = BF16
    block_tokens: int = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What one call reads; pool is poisoned."""

    qkv_TC: Tensor
    pool: Tensor
    slot_T: Tensor
    position_T: Tensor
    tables: RopeTables
    norm: QkNorm | None


def _inputs(case: Case, device: torch.device) -> Inputs:
    make = torch.Generator().manual_seed(case.tokens * 1009 + case.dim)
    num_blocks = case.tokens // case.block_tokens + 3
    slot_T = torch.randperm(num_blocks * case.block_tokens, generator=make)[: case.tokens]
    slot_T[case.tokens // 2 :: 5] = -1
    position_T = torch.randint(0, POSITIONS, (case.tokens,), generator=make, dtype=torch.int32)
    position_T[slot_T < 0] = -(1 << 30)  # a padded row's position may be anything

    def weight(heads: int) -> Tensor:
        return torch.randn(case.dim * (1 if case.norm == "head" else heads), generator=make).to(device, case.dtype)

    norm = None if case.norm == "none" else QkNorm(q_weight=weight(case.heads), k_weight=weight(case.kv_heads), eps=1e-6)
    cos_PD, sin_PD = rope_tables(POSITIONS, case.dim, 1e4)
    # each head of another size, so that a norm over the wrong heads shows
    sizes = torch.linspace(0.5, 3.0, case.heads + 2 * case.kv_heads).repeat_interleave(case.dim)
    columns = (case.heads + 2 * case.kv_heads) * case.dim
    return Inputs(
        qkv_TC=(torch.randn(case.tokens, columns, generator=make) * sizes).to(device, case.dtype),
        pool=torch.full((num_blocks, 2, case.kv_heads, case.block_tokens, case.dim), float("nan"), dtype=case.dtype, device=device),
        slot_T=slot_T.to(device),
        position_T=position_T.to(device),
        tables=RopeTables(cos_PD=cos_PD.to(device), sin_PD=sin_PD.to(device)),
        norm=norm,
    )


def _run(case: Case, given: Inputs, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """(q, pool) of a launch on poisoned outputs."""
    pool = given.pool.clone()
    qkv_TC = given.qkv_TC[rows].contiguous()
    q_THD = torch.full((qkv_TC.shape[0], case.heads, case.dim), float("nan"), dtype=case.dtype, device=pool.device)
    slot_T, position_T = given.slot_T[rows].contiguous(), given.position_T[rows].contiguous()
    qk_rope_write(qkv_TC, case.heads, pool, slot_T, position_T, given.tables, given.norm, out_THD=q_THD)
    return q_THD, pool


def _reference(case: Case, given: Inputs) -> tuple[Tensor, Tensor]:
    return qk_rope_write_reference(given.qkv_TC, case.heads, given.pool, given.slot_T, given.position_T, given.tables, given.norm)


def _wrong(out: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> float:
    """The larger error of q and of the slots that were to be written; infinite where another slot is no longer poisoned."""
    (q, pool), (q_ref, pool_ref) = out, expected
    is_written = ~pool_ref.isnan()
    if not torch.equal(pool.isnan(), pool_ref.isnan()):
        return float("inf")
    dim = pool.shape[-1]
    return max(error(q, q_ref), error(pool[is_written].view(-1, dim), pool_ref[is_written].view(-1, dim)))


CASES = [
    Case(heads=4, kv_heads=2, dim=64, tokens=1, norm="head"),
    Case(heads=8, kv_heads=1, dim=128, tokens=17, norm="head"),
    Case(heads=5, kv_heads=3, dim=64, tokens=63, norm="none"),
    Case(heads=4, kv_heads=4, dim=64, tokens=9, norm="whole"),
    Case(heads=33, kv_heads=3, dim=128, tokens=3, norm="whole"),
    Case(heads=3, kv_heads=1, dim=6, tokens=257, norm="head", block_tokens=3),
    Case(heads=3, kv_heads=2, dim=90, tokens=7, norm="whole", block_tokens=5),
    Case(heads=2, kv_heads=2, dim=64, tokens=9, norm="head", dtype=torch.float32),
    Case(heads=2, kv_heads=2, dim=64, tokens=9, norm="whole", dtype=torch.float32),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_q_and_pool(case: Case, device: torch.device) -> None:
    given = _inputs(case, device)
    assert _wrong(_run(case, given), _reference(case, given)) <= bound(case.dtype)


def test_values_are_copied_bit_by_bit(device: torch.device) -> None:
    case = Case(heads=4, kv_heads=2, dim=64, tokens=33, norm="head")
    given = _inputs(case, device)
    _, pool = _run(case, given)
    values_TND = given.qkv_TC.view(case.tokens, -1, case.dim)[:, case.heads + case.kv_heads :]
    for token, slot in enumerate(given.slot_T.tolist()):
        if slot >= 0:
            assert torch.equal(pool[slot // case.block_tokens, 1, :, slot % case.block_tokens], values_TND[token])


def test_only_padded_rows_write_nothing_but_q(device: torch.device) -> None:
    case = Case(heads=2, kv_heads=1, dim=64, tokens=5, norm="head")
    given = _inputs(case, device)
    given = replace(given, slot_T=torch.full_like(given.slot_T, -1))
    q_THD, pool = _run(case, given)
    assert bool(pool.isnan().all()) and bool(q_THD.isfinite().all())


@pytest.mark.parametrize("norm", ["none", "head", "whole"])
def test_packed_keys_are_those_of_the_pool(norm: str, device: torch.device) -> None:
    case = Case(heads=5, kv_heads=3, dim=64, tokens=13, norm=norm)
    given = _inputs(case, device)
    q_THD, pool = _run(case, given)
    again, k_TND = given.pool.clone(), torch.full((case.tokens, case.kv_heads, case.dim), float("nan"), dtype=BF16, device=device)
    rest = (given.slot_T, given.position_T, given.tables, given.norm)
    q_again = qk_rope_write(given.qkv_TC, case.heads, again, *rest, k_out_TND=k_TND)
    assert torch.equal(q_THD, q_again) and torch.equal(pool.nan_to_num(7.0), again.nan_to_num(7.0))
    assert bool(k_TND.isfinite().all())  # padded rows too
    for token, slot in enumerate(given.slot_T.tolist()):
        if slot >= 0:
            assert torch.equal(k_TND[token], pool[slot // case.block_tokens, 0, :, slot % case.block_tokens])


@pytest.mark.parametrize("norm", ["none", "head", "whole"])
def test_a_row_has_the_same_bits_in_every_batch(norm: str, device: torch.device) -> None:
    case = Case(heads=3, kv_heads=2, dim=64, tokens=13, norm=norm)
    given = _inputs(case, device)
    whole_q, whole_pool = _run(case, given)
    for rows in (slice(0, 1), slice(11, 12), slice(6, 13)):
        q_THD, pool = _run(case, given, rows)
        assert torch.equal(q_THD, whole_q[rows])
        for slot in given.slot_T[rows].tolist():
            if slot >= 0:
                block, offset = divmod(slot, case.block_tokens)
                assert torch.equal(pool[block, :, :, offset], whole_pool[block, :, :, offset])


def _broken(case: Case, given: Inputs) -> list[Inputs]:
    """Inputs with one mistake each."""
    step = replace(given, position_T=given.position_T + 1)
    swapped_sign = replace(given, tables=replace(given.tables, sin_PD=-given.tables.sin_PD))
    shifted = replace(given, slot_T=torch.where(given.slot_T < 0, -1, given.slot_T ^ 1))
    neighbour = replace(given, qkv_TC=given.qkv_TC.roll(case.dim, 1))
    if given.norm is None:
        return [step, swapped_sign, shifted, neighbour]
    rolled = replace(given, norm=replace(given.norm, k_weight=given.norm.k_weight.roll(1)))
    scaled = replace(given, norm=replace(given.norm, q_weight=given.norm.q_weight * 1.02))
    return [step, swapped_sign, shifted, neighbour, rolled, scaled, replace(given, norm=None)]


@pytest.mark.parametrize("norm", ["none", "head", "whole"])
def test_a_broken_launch_fails(norm: str, device: torch.device) -> None:
    case = Case(heads=4, kv_heads=2, dim=64, tokens=5, norm=norm)
    given = _inputs(case, device)
    given = replace(given, position_T=given.position_T.clamp(0, POSITIONS - 2))
    expected = _reference(case, given)
    assert _wrong(_run(case, given), expected) <= bound(BF16)
    for at, wrong in enumerate(_broken(case, given)):
        assert _wrong(_run(case, wrong), expected) > bound(BF16), at


def test_a_whole_norm_is_not_a_norm_per_head(device: torch.device) -> None:
    case = Case(heads=4, kv_heads=4, dim=64, tokens=5, norm="whole")
    given = _inputs(case, device)
    ones = torch.ones(4 * 64, dtype=BF16, device=device)
    whole = replace(given, norm=QkNorm(q_weight=ones, k_weight=ones, eps=1e-6))
    per_head = replace(given, norm=QkNorm(q_weight=ones[:64].clone(), k_weight=ones[:64].clone(), eps=1e-6))
    assert _wrong(_run(case, per_head), _reference(case, whole)) > bound(BF16)


def test_wrong_arguments_are_refused(device: torch.device) -> None:
    case = Case(heads=2, kv_heads=1, dim=64, tokens=4, norm="head")
    given = _inputs(case, device)
    assert given.norm
    call = partial(qk_rope_write, given.qkv_TC, 2, given.pool, given.slot_T, given.position_T, given.tables)
    wrong = [
        partial(qk_rope_write, given.qkv_TC, 3, given.pool, given.slot_T, given.position_T, given.tables),
        partial(qk_rope_write, given.qkv_TC, 2, given.pool, given.slot_T.int(), given.position_T, given.tables),
        partial(qk_rope_write, given.qkv_TC, 2, given.pool, given.slot_T, given.position_T.long(), given.tables),
        partial(call, replace(given.norm, k_weight=given.norm.k_weight[:32])),
        partial(call, out_THD=torch.empty(4, 1, 64, dtype=BF16, device=device)),
        partial(call, k_out_TND=torch.empty(4, 2, 64, dtype=BF16, device=device)),
    ]
    for each in wrong:
        with pytest.raises(AssertionError):
            each()
    assert call(given.norm).shape == (4, 2, 64)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        Case(heads=16, kv_heads=16, dim=128, tokens=2049, norm="whole"),
        Case(heads=32, kv_heads=4, dim=128, tokens=1024, norm="head"),
        Case(heads=32, kv_heads=8, dim=128, tokens=257, norm="none"),
        Case(heads=64, kv_heads=8, dim=128, tokens=63, norm="whole"),
    ],
    ids=str,
)
def test_real_shapes(case: Case, device: torch.device) -> None:
    given = _inputs(case, device)
    out = _run(case, given)
    assert _wrong(out, _reference(case, given)) <= bound(BF16)
    again = _run(case, given)
    assert torch.equal(out[0], again[0]) and torch.equal(out[1].nan_to_num(), again[1].nan_to_num())
