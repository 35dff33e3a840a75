"""Dense products against float64: every way and dtype, odd sizes, poisoned outputs and neighbours, rows whose bits stand alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor

from duomo_kernels._bounds import BOUNDS, bound, error
from duomo_kernels._linear_direct import DirectTile
from duomo_kernels._linear_split import SplitTile, tickets
from duomo_kernels._linear_tiles import LinearTile, widen
from duomo_kernels.linear import LinearPlan, linear, linear_plan, linear_reference

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Rows, outputs, inputs and what is asked for."""

    rows: int
    outputs: int
    inputs: int
    plan: LinearPlan
    is_fp8: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """One call's tensors."""

    x_TK: Tensor
    weight_NK: Tensor
    scale_nk: Tensor | None

    def rows(self, rows: slice) -> Inputs:
        return replace(self, x_TK=self.x_TK[rows].contiguous())


def _inputs(rows: int, outputs: int, inputs: int, dtype: torch.dtype, device: torch.device, *, is_fp8: bool = False) -> Inputs:
    make = torch.Generator().manual_seed(rows * 1009 + outputs + inputs)
    x_TK = torch.randn(rows, inputs, generator=make).to(device, dtype)
    weight_NK = torch.randn(outputs, inputs, generator=make)
    if not is_fp8:
        return Inputs(x_TK=x_TK, weight_NK=weight_NK.to(device, dtype), scale_nk=None)
    # blocks of very different sizes, so that a wrong one shows
    scale_nk = torch.exp(torch.randn(-(-outputs // 128), -(-inputs // 128), generator=make)).to(device)
    return Inputs(x_TK=x_TK, weight_NK=(weight_NK * 60).to(FP8).to(device), scale_nk=scale_nk)


def _run(given: Inputs, plan: LinearPlan | None, *, out_dtype: torch.dtype | None = None, is_deterministic: bool = False) -> Tensor:
    """A call on a poisoned output that lies between poisoned rows, which must stay."""
    rows, outputs = given.x_TK.shape[0], given.weight_NK.shape[0]
    room = torch.full((rows + 2, outputs), float("nan"), dtype=out_dtype or given.x_TK.dtype, device=given.x_TK.device)
    y_TN = linear(given.x_TK, given.weight_NK, given.scale_nk, out=room[1:-1], is_deterministic=is_deterministic, plan=plan)
    assert y_TN.data_ptr() == room[1:-1].data_ptr() and bool(room[[0, -1]].isnan().all())
    return y_TN


def _wrong(given: Inputs, out: Tensor) -> float:
    return error(out, linear_reference(given.x_TK, given.weight_NK, given.scale_nk))


SMALL, TALL = LinearTile(block_m=16, block_n=16, block_k=64), LinearTile(block_m=64, block_n=32, block_k=32, num_stages=2)
BY_BLOCK = replace(SMALL, block_k=128)
SPLIT = SplitTile(block_m=16, block_n=32, slice_k=256)
CASES = [
    Case(rows=1, outputs=63, inputs=256, plan=DirectTile(block_n=4)),
    Case(rows=3, outputs=17, inputs=72, plan=DirectTile(block_n=16, num_warps=1)),
    Case(rows=9, outputs=63, inputs=8, plan=DirectTile(block_n=1)),
    Case(rows=2, outputs=257, inputs=264, plan=DirectTile(block_n=8), is_fp8=True),
    Case(rows=1, outputs=63, inputs=256, plan=SMALL),
    Case(rows=17, outputs=33, inputs=72, plan=replace(SMALL, is_swapped=True)),
    Case(rows=63, outputs=65, inputs=128, plan=replace(SMALL, use_tma=True, block_n=32)),
    Case(rows=17, outputs=40, inputs=136, plan=replace(SMALL, use_tma=True, is_swapped=True)),
    Case(rows=1, outputs=65, inputs=64, plan=TALL),
    Case(rows=257, outputs=65, inputs=40, plan=TALL),
    Case(rows=300, outputs=17, inputs=16, plan=SMALL),  # more tiles of rows than a band has
    Case(rows=3, outputs=257, inputs=264, plan=replace(BY_BLOCK, block_k=256), is_fp8=True),
    Case(rows=17, outputs=129, inputs=384, plan=replace(BY_BLOCK, use_tma=True, block_n=64), is_fp8=True),
    Case(rows=17, outputs=33, inputs=136, plan=replace(BY_BLOCK, is_swapped=True), is_fp8=True),
    Case(rows=70, outputs=130, inputs=256, plan=replace(BY_BLOCK, is_swapped=True, use_tma=True, block_m=64, block_n=128), is_fp8=True),
    Case(rows=1, outputs=65, inputs=1024, plan=SPLIT, is_fp8=True),
    Case(rows=17, outputs=129, inputs=264, plan=replace(SPLIT, slice_k=128), is_fp8=True),  # a slice of eight columns
    Case(rows=3, outputs=257, inputs=768, plan=replace(SPLIT, is_swapped=False, use_tma=True, block_n=128), is_fp8=True),
    Case(rows=40, outputs=33, inputs=400, plan=replace(SPLIT, use_tma=True), is_fp8=True),
    Case(rows=5, outputs=70, inputs=512, plan=replace(SPLIT, prefetches=True, block_n=64), is_fp8=True),
    Case(rows=9, outputs=40, inputs=136, plan=replace(SPLIT, prefetches=True, slice_k=512), is_fp8=True),  # one slice: nothing to add
    Case(rows=63, outputs=65, inputs=264, plan="library"),
    Case(rows=63, outputs=257, inputs=264, plan="library", is_fp8=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_reference(case: Case, half: torch.dtype, device: torch.device) -> None:
    given = _inputs(case.rows, case.outputs, case.inputs, half, device, is_fp8=case.is_fp8)
    assert _wrong(given, _run(given, case.plan)) <= bound(half)


@pytest.mark.parametrize("plan", [DirectTile(block_n=4), SMALL, "library"], ids=str)
def test_wide_outputs_and_wide_operands(plan: LinearPlan, half: torch.dtype, device: torch.device) -> None:
    wide = _inputs(5, 33, 264, half, device)
    assert _wrong(wide, _run(wide, plan, out_dtype=torch.float32)) <= BOUNDS[torch.float32]
    full = _inputs(5, 33, 264, torch.float32, device)
    assert _wrong(full, _run(full, plan)) <= BOUNDS[torch.float32]


@pytest.mark.parametrize("case", CASES[:13:3], ids=str)
def test_rows_of_nan_stay_alone(case: Case, half: torch.dtype, device: torch.device) -> None:
    """Dead rows of a captured step hold anything."""
    given = _inputs(case.rows + 2, case.outputs, case.inputs, half, device, is_fp8=case.is_fp8)
    given.x_TK[0] = given.x_TK[-1] = float("nan")
    out = _run(given, case.plan)
    assert _wrong(given.rows(slice(1, -1)), out[1:-1]) <= bound(half)


@pytest.mark.parametrize("is_fp8", [False, True])
def test_deterministic_rows_have_the_same_bits_in_every_batch(is_fp8: bool, half: torch.dtype, device: torch.device) -> None:
    given = _inputs(130, 65, 136, half, device, is_fp8=is_fp8)
    whole = _run(given, None, is_deterministic=True)
    assert _wrong(given, whole) <= bound(half)
    for rows in (slice(0, 1), slice(128, 130), slice(60, 77)):
        assert torch.equal(_run(given.rows(rows), None, is_deterministic=True), whole[rows])


@pytest.mark.parametrize("plan", [SPLIT, replace(SPLIT, use_tma=True, slice_k=128), replace(SPLIT, prefetches=True)], ids=str)
def test_split_sums_have_the_same_bits_in_every_run(plan: SplitTile, half: torch.dtype, device: torch.device) -> None:
    """Whoever comes last adds, in one order; and every ticket it drew stands at zero again."""
    given = _inputs(21, 130, 512, half, device, is_fp8=True)
    runs = [_run(given, plan) for _ in range(5)]
    assert all(torch.equal(run, runs[0]) for run in runs[1:])
    assert not tickets(device).slab.any()


def test_every_launch_draws_tickets_at_an_aligned_address(half: torch.dtype, device: torch.device) -> None:
    """Or the same shape would be another kernel in another graph: one that no launch before the capture has compiled."""
    for outputs in (65, 40, 97):  # three sums, two, four
        _run(_inputs(3, outputs, 512, half, device, is_fp8=True), SPLIT)
    drawn = tickets(device)
    assert drawn.eager and all(taken.data_ptr() % 16 == 0 for taken in drawn.eager.values())


def test_a_broken_product_fails(half: torch.dtype, device: torch.device) -> None:
    given = _inputs(5, 257, 264, half, device, is_fp8=True)
    assert given.scale_nk is not None
    out = _run(given, BY_BLOCK)
    broken = [
        replace(given, scale_nk=given.scale_nk.roll(1, 0)),
        replace(given, scale_nk=given.scale_nk.roll(1, 1)),
        replace(given, x_TK=given.x_TK.roll(1, 0)),
        replace(given, x_TK=given.x_TK.roll(8, 1)),
        replace(given, weight_NK=given.weight_NK.view(torch.uint8).roll(1, 0).view(FP8)),
    ]
    assert _wrong(given, out) <= bound(half)
    assert all(_wrong(wrong, out) > bound(half) for wrong in broken)


def test_widened_weights(device: torch.device) -> None:
    given = _inputs(1, 257, 264, torch.float32, device, is_fp8=True)
    assert given.scale_nk is not None
    eye = torch.eye(264, device=device)
    assert error(widen(given.weight_NK, given.scale_nk, torch.float32), linear_reference(eye, given.weight_NK, given.scale_nk).T) < 1e-6


def test_no_rows_and_no_output_given(half: torch.dtype, device: torch.device) -> None:
    given = _inputs(2, 33, 64, half, device)
    assert linear(given.x_TK[:0], given.weight_NK).shape == (0, 33)
    y_TN = linear(given.x_TK, given.weight_NK, out_dtype=torch.float32)
    assert y_TN.dtype == torch.float32 and _wrong(given, y_TN) <= BOUNDS[torch.float32]


@pytest.mark.parametrize("num_rows", [1, 2, 3, 16, 17, 32, 33, 64, 65, 128, 129, 4096])
@pytest.mark.parametrize("is_fp8", [False, True])
def test_every_shape_has_a_plan(num_rows: int, is_fp8: bool) -> None:
    for outputs, inputs in ((4, 2048), (2048, 2048), (6144, 4096), (151936, 2048), (40, 65536)):
        weight_NK = torch.empty(outputs, inputs, dtype=FP8 if is_fp8 else torch.bfloat16, device="meta")
        is_router = outputs <= 256 and inputs <= 2048
        assert num_rows <= (128 if is_router else 64) or linear_plan(num_rows, weight_NK) == "library"
        assert isinstance(linear_plan(num_rows, weight_NK, is_deterministic=True), LinearTile)


def test_wrong_arguments_are_refused(half: torch.dtype, device: torch.device) -> None:
    given, fp8 = _inputs(2, 33, 64, half, device), _inputs(2, 33, 64, half, device, is_fp8=True)
    wrong = [
        partial(linear, given.x_TK[:, :32].contiguous(), given.weight_NK),
        partial(linear, given.x_TK.double(), given.weight_NK),
        partial(linear, given.x_TK, fp8.weight_NK),
        partial(linear, given.x_TK, given.weight_NK, fp8.scale_nk),
        partial(linear, given.x_TK, given.weight_NK, out_dtype=torch.float64),
        partial(linear, given.x_TK, given.weight_NK, out=torch.empty(33, 2, dtype=half, device=device)),
        partial(linear, given.x_TK[:, :60].contiguous(), given.weight_NK[:, :60].contiguous()),
        partial(linear, given.x_TK, given.weight_NK.t().contiguous().t()),
        partial(linear, fp8.x_TK, fp8.weight_NK, fp8.scale_nk, plan=SMALL),
        partial(linear, given.x_TK, given.weight_NK.new_ones(64, 64), out=given.x_TK),
    ]
    for each in wrong:
        with pytest.raises(AssertionError):
            each()


@pytest.mark.gpu
@pytest.mark.parametrize("is_fp8", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(6144, 2048), (2048, 4096), (128, 2048), (50304, 2048)])
def test_real_shapes(outputs: int, inputs: int, is_fp8: bool, device: torch.device) -> None:
    """Every plan is right, gives the same bits twice, and the deterministic ones the same bits as each other."""
    most = _inputs(700, outputs, inputs, torch.bfloat16, device, is_fp8=is_fp8)
    fixed = _run(most, None, out_dtype=torch.float32, is_deterministic=True)
    for num_rows in (1, 2, 5, 16, 31, 64, 100, 257):
        given = most.rows(slice(0, num_rows))
        out = _run(given, None, out_dtype=torch.float32)
        is_widened = is_fp8 and linear_plan(num_rows, given.weight_NK) == "library"
        assert _wrong(given, out) <= bound(torch.bfloat16 if is_widened else torch.float32), num_rows
        assert torch.equal(out, _run(given, None, out_dtype=torch.float32)), num_rows
        assert torch.equal(_run(given, None, out_dtype=torch.float32, is_deterministic=True), fixed[:num_rows]), num_rows


@pytest.mark.gpu
def test_a_chain_under_capture(device: torch.device) -> None:
    """Products that read each other's outputs: weights are read early, rows are not."""
    first, second = (_inputs(2, 2048, 2048, torch.bfloat16, device) for _ in range(2))
    weights = [first.weight_NK * 0.02, second.weight_NK * 0.02]

    def chain(x_TK: Tensor) -> Tensor:
        for _ in range(20):
            for weight_NK in weights:
                x_TK = linear(x_TK, weight_NK)
        return x_TK

    expected = chain(first.x_TK)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(first.x_TK)
    for _ in range(5):
        graph.replay()
        assert torch.equal(captured, expected)
