"""Owns the experts' two products for many rows on Hopper, each warp in one role. Knows no other size or device (expert_gemm.py is the op).

The maths, tensors and order of tiles are expert_gemm.py's; this file says when each byte moves. A program stays on its multiprocessor and
takes every num_programs-th cell (a tile of 128 places x a column of 256 weight rows) of one list that all its warps walk alike:

    gather   2 warps   up: x rows by token, 16 bytes a thread, cp.async        down: no such role, act's rows are successive
    weights  1 warp    weight tiles (down: act's tiles too) by TMA
    consume  2 x 4     64 rows x 256 columns of float32 each: wgmma, epilogue, TMA stores

They meet at a ring of STAGES stages of shared memory, [128, 64] of x and [256, 64] of weights (up: 128 rows of gate above 128 of up, so
that a thread holds both halves of what it activates). Use u of the ring is stage u % STAGES in round u // STAGES. A stage has 2 mbarriers:

    full   completes once a round: 1 arrival (weights, with the bytes to expect) + 1 of every gather thread, when its own copies have landed
    empty  completes once a round: 1 arrival of each consumer, when its products over the stage have ended

Why nobody waits for ever: every role walks the same cells (the list depends on tiles_M5 and num_tiles alone) and makes exactly
ceil(K / 64) uses of the ring a cell, whatever the cell's rows are: a consumer whose 64 rows are all empty still waits for full and arrives
at empty. Use u waits for round u // STAGES of full, which producers complete after round u // STAGES - 1 of empty, which consumers complete
after use u - STAGES: use 0 waits for nothing, use u for uses below u alone. No role can be two rounds ahead of another at one barrier, so
that a parity bit tells rounds apart. With skew, the second consumer's first use waits for an early use of the first, which needs no stage
twice and so waits for no consumer, as skew < STAGES. No tiles: no uses, everybody leaves.

cp.async writes through the generic proxy what wgmma reads through the async one: each consumer fences between its wait and its product.

Legend: T tokens, K experts a token (in kernels: the summed axis), R routed places, E experts, D model, F expert hidden, M tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental import gluon as triton_gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.extra import libdevice
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from duomo_kernels._launch import check, num_sms, pdl_options, start_next, wait_for_previous
from duomo_kernels._routing import Routing
from duomo_kernels._weights import ExpertWeights

# Triton 3.9 renamed these three.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
TILE_ROWS = 128  # places of a tile: two consumers' 64, the height of one wgmma
TILE_COLS = 256  # weight rows of a tile: the widest wgmma, so that shared memory is read least
BLOCK_K = gl.constexpr(64)  # 128 bytes of bf16: one row of the widest swizzle
HALF_M = gl.constexpr(64)
WEIGHT_ROWS = gl.constexpr(TILE_COLS)
GATHER_WARPS = gl.constexpr(2)
# Registers a thread. 12 warps share 64 Ki: 168 each, 504 for three warpgroups. 88 for the producers leave each consumer 208 (128 of sums).
PRODUCER_REGS = gl.constexpr(88)
CONSUMER_REGS = gl.constexpr(208)
SWIZZLED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
ACCUMULATOR = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE_COLS, 16]))
GATHER = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [GATHER_WARPS.value, 1], [1, 0]))


@dataclass(frozen=True, kw_only=True, slots=True)
class WsTile:
    """What may be tuned: stages of the ring; skew, the uses by which the second consumer lags, so that one's epilogue meets the other's
    products; whether full tiles leave through shared memory and TMA or straight from registers."""

    num_stages: int = 4
    skew: int = 0
    tma_store: bool = True

    def __post_init__(self) -> None:
        assert 2 <= self.num_stages <= 4 and 0 <= self.skew < self.num_stages, self


@triton_gluon.jit
def _cell(work, first_tile, group_tiles, num_columns):
    """Place of a cell in its group: (tile, column). Columns run outer, so that a group's tiles share a column's weights through L2."""
    local = work - first_tile * num_columns
    return first_tile + local % group_tiles, local // group_tiles


@triton_gluon.jit
def _load_group(tiles, work, num_work, num_columns):
    """(first tile, tiles) of a cell's group: all cells of a group are successive, so tile work // num_columns belongs to it."""
    at = tiles + (work // num_columns) * 5
    return gl.load(at + 3, mask=work < num_work, other=0), gl.load(at + 4, mask=work < num_work, other=1)


@triton_gluon.jit
def _load_tile(tiles, work, num_work, first_tile, group_tiles, num_columns):
    """(expert, first place, rows, column) of a cell; rows 0 behind the last one."""
    tile, column = _cell(work, first_tile, group_tiles, num_columns)
    at = tiles + tile * 5
    is_work = work < num_work
    return gl.load(at, mask=is_work, other=0), gl.load(at + 1, mask=is_work, other=0), gl.load(at + 2, mask=is_work, other=0), column


@triton_gluon.jit
def _halves(value):
    """[M, 2N] -> left and right [M, N], without a move: both lie in the same thread."""
    M: gl.constexpr = value.shape[0]
    N: gl.constexpr = value.shape[1] // 2
    return value.reshape((M, 2, N)).permute((0, 2, 1)).split()


@triton_gluon.jit
def _store_tma(value_MN, staging, desc, row, col):
    """[64, 128] by two boxes of [64, 64], each through its own buffer: a buffer is written once the store before the last has read it."""
    left_MN, right_MN = _halves(value_MN)
    tma.store_wait(1)
    staging.index(0).store(left_MN)
    fence_async_shared()
    tma_store(desc, [row, col], staging.index(0))
    tma.store_wait(1)
    staging.index(1).store(right_MN)
    fence_async_shared()
    tma_store(desc, [row, col + 64], staging.index(1))


@triton_gluon.jit
def _store_masked(value_MN, out, row, rows, col, N: gl.constexpr):
    layout: gl.constexpr = value_MN.type.layout
    row_M = gl.arange(0, value_MN.shape[0], gl.SliceLayout(1, layout))
    col_N = col + gl.arange(0, value_MN.shape[1], gl.SliceLayout(0, layout))
    at_MN = out + (row + row_M).to(gl.int64)[:, None] * N + col_N[None, :]
    gl.store(at_MN, value_MN, mask=(row_M < rows)[:, None] & (col_N < N)[None, :])


@triton_gluon.jit
def _epilogue(acc_MN, staging, desc, out, row, rows, column, IS_UP: gl.constexpr, N: gl.constexpr, TMA_STORE: gl.constexpr):
    """Rows past `rows` are other experts' places: a box of TMA goes out only where all 64 are ours (columns past N it clips itself)."""
    left_MN, right_MN = _halves(acc_MN)
    if IS_UP:
        act_MN = (libdevice.fast_dividef(left_MN, 1.0 + libdevice.fast_expf(-left_MN)) * right_MN).to(gl.bfloat16)
        if TMA_STORE and rows >= 64:
            _store_tma(act_MN, staging, desc, row, column * 128)
        else:
            _store_masked(act_MN, out, row, rows, column * 128, N)
    else:
        if TMA_STORE and rows >= 64:
            _store_tma(left_MN.to(gl.bfloat16), staging, desc, row, column * 256)
            _store_tma(right_MN.to(gl.bfloat16), staging, desc, row, column * 256 + 128)
        else:
            _store_masked(left_MN.to(gl.bfloat16), out, row, rows, column * 256, N)
            _store_masked(right_MN.to(gl.bfloat16), out, row, rows, column * 256 + 128, N)


@triton_gluon.jit
def _consume(
    ring, skewed, staging, desc, out, tiles, num_work, num_columns: gl.constexpr,
    PART: gl.constexpr, IS_UP: gl.constexpr, K: gl.constexpr, N: gl.constexpr, SKEW: gl.constexpr, TMA_STORE: gl.constexpr,
):  # fmt: skip
    """Rows 64 PART .. 64 PART + 63 of every cell's tile. `out` [R, N]."""
    x, w, full, empty = ring
    STAGES: gl.constexpr = w.shape[0]
    NUM_K: gl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    step = gl.num_programs(0)
    work0 = gl.program_id(0)
    group, group_tiles = _load_group(tiles, work0, num_work, num_columns)
    _, first, rows, column = _load_tile(tiles, work0, num_work, group, group_tiles, num_columns)
    group, group_tiles = _load_group(tiles, work0 + step, num_work, num_columns)
    if SKEW > 0 and PART == 1:
        mbarrier.wait(skewed, 0, pred=work0 < num_work)
    use = 0
    for work in range(work0, num_work, step):
        # Loaded now, needed a cell later: nobody waits for them.
        _, next_first, next_rows, next_column = _load_tile(tiles, work + step, num_work, group, group_tiles, num_columns)
        group, group_tiles = _load_group(tiles, work + 2 * step, num_work, num_columns)
        if rows > HALF_M * PART:
            acc_MN = gl.zeros((HALF_M, WEIGHT_ROWS), gl.float32, ACCUMULATOR)
            for k in range(NUM_K):
                stage = use % STAGES
                mbarrier.wait(full.index(stage), (use // STAGES) & 1)
                if IS_UP:
                    fence_async_shared()
                acc_MN = warpgroup_mma(x.index(2 * stage + PART), w.index(stage).permute((1, 0)), acc_MN, use_acc=k > 0, is_async=True)
                acc_MN = warpgroup_mma_wait(1, deps=(acc_MN,))  # the product before this one has ended, so its stage is free
                mbarrier.arrive(empty.index((use + STAGES - 1) % STAGES), pred=k > 0)
                if SKEW > 0 and PART == 0:
                    mbarrier.arrive(skewed, pred=use == (SKEW if NUM_K > SKEW else NUM_K - 1))
                use += 1
            acc_MN = warpgroup_mma_wait(0, deps=(acc_MN,))
            mbarrier.arrive(empty.index((use + STAGES - 1) % STAGES))
            _epilogue(acc_MN, staging, desc, out, first + HALF_M * PART, rows - HALF_M * PART, column, IS_UP, N, TMA_STORE)
        else:
            for _k in range(NUM_K):
                stage = use % STAGES
                mbarrier.wait(full.index(stage), (use // STAGES) & 1)
                mbarrier.arrive(empty.index(stage))
                use += 1
        first, rows, column = next_first, next_rows, next_column
    tma.store_wait(0)


@triton_gluon.jit
def _gather(ring, x, routed, tiles, num_work, num_columns: gl.constexpr, TOP_K: gl.constexpr, K: gl.constexpr):
    """x rows of every cell's places. A place past the tile's rows gets the row of its last: read from L2, and never stored."""
    x_ring, w_ring, full, empty = ring
    STAGES: gl.constexpr = w_ring.shape[0]
    NUM_K: gl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    row_M = gl.arange(0, HALF_M, gl.SliceLayout(1, GATHER))
    k_K = gl.arange(0, BLOCK_K, gl.SliceLayout(0, GATHER))
    step = gl.num_programs(0)
    work0 = gl.program_id(0)
    group, group_tiles = _load_group(tiles, work0, num_work, num_columns)
    _, first, rows, _column = _load_tile(tiles, work0, num_work, group, group_tiles, num_columns)
    low_M = gl.load(routed + first + gl.minimum(row_M, rows - 1), mask=row_M * 0 < rows, other=0)
    high_M = gl.load(routed + first + gl.minimum(row_M + HALF_M, rows - 1), mask=row_M * 0 < rows, other=0)
    group, group_tiles = _load_group(tiles, work0 + step, num_work, num_columns)
    _, next_first, next_rows, _column = _load_tile(tiles, work0 + step, num_work, group, group_tiles, num_columns)
    group, group_tiles = _load_group(tiles, work0 + 2 * step, num_work, num_columns)
    use = 0
    for work in range(work0, num_work, step):
        low_MK = x + (low_M // TOP_K).to(gl.int64)[:, None] * K + k_K[None, :]
        high_MK = x + (high_M // TOP_K).to(gl.int64)[:, None] * K + k_K[None, :]
        has_high = rows > HALF_M
        low_M = gl.load(routed + next_first + gl.minimum(row_M, next_rows - 1), mask=row_M * 0 < next_rows, other=0)
        high_M = gl.load(routed + next_first + gl.minimum(row_M + HALF_M, next_rows - 1), mask=row_M * 0 < next_rows, other=0)
        rows = next_rows
        _, next_first, next_rows, _column = _load_tile(tiles, work + 2 * step, num_work, group, group_tiles, num_columns)
        group, group_tiles = _load_group(tiles, work + 3 * step, num_work, num_columns)
        for k in range(NUM_K):
            stage = use % STAGES
            mbarrier.wait(empty.index(stage), ((use // STAGES) & 1) ^ 1)
            if K % BLOCK_K == 0:
                copy_async(x_ring.index(2 * stage), low_MK + k * BLOCK_K)
                if has_high:
                    copy_async(x_ring.index(2 * stage + 1), high_MK + k * BLOCK_K)
            else:
                is_k_MK = (row_M[:, None] * 0 + k_K[None, :]) < K - k * BLOCK_K
                copy_async(x_ring.index(2 * stage), low_MK + k * BLOCK_K, mask=is_k_MK)
                if has_high:
                    copy_async(x_ring.index(2 * stage + 1), high_MK + k * BLOCK_K, mask=is_k_MK)
            async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
            use += 1


@triton_gluon.jit
def _load_weights(
    ring, w_desc, act_desc, tiles, num_work, num_columns: gl.constexpr, IS_UP: gl.constexpr, K: gl.constexpr, N: gl.constexpr
):
    """Weight rows of every cell (N columns of output an expert); down: act's rows too, its second half where the tile has one."""
    x, w, full, empty = ring
    STAGES: gl.constexpr = w.shape[0]
    NUM_K: gl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    step = gl.num_programs(0)
    work0 = gl.program_id(0)
    group, group_tiles = _load_group(tiles, work0, num_work, num_columns)
    expert, first, rows, column = _load_tile(tiles, work0, num_work, group, group_tiles, num_columns)
    group, group_tiles = _load_group(tiles, work0 + step, num_work, num_columns)
    use = 0
    for work in range(work0, num_work, step):
        w_row = expert * (2 * N) + column * 128 if IS_UP else expert * N + column * 256
        place = first
        has_high = rows > HALF_M
        expert, first, rows, column = _load_tile(tiles, work + step, num_work, group, group_tiles, num_columns)
        group, group_tiles = _load_group(tiles, work + 2 * step, num_work, num_columns)
        for k in range(NUM_K):
            stage = use % STAGES
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), ((use // STAGES) & 1) ^ 1)
            if IS_UP:
                mbarrier.expect(bar, WEIGHT_ROWS * BLOCK_K * 2)
                tma_load(w_desc, [w_row, k * BLOCK_K], bar, w.index(stage).slice(0, WEIGHT_ROWS // 2))
                tma_load(w_desc, [w_row + N, k * BLOCK_K], bar, w.index(stage).slice(WEIGHT_ROWS // 2, WEIGHT_ROWS // 2))
            else:
                if has_high:
                    mbarrier.expect(bar, (WEIGHT_ROWS + 2 * HALF_M) * BLOCK_K * 2)
                else:
                    mbarrier.expect(bar, (WEIGHT_ROWS + HALF_M) * BLOCK_K * 2)
                tma_load(w_desc, [w_row, k * BLOCK_K], bar, w.index(stage))
                tma_load(act_desc, [place, k * BLOCK_K], bar, x.index(2 * stage))
                tma_load(act_desc, [place + HALF_M, k * BLOCK_K], bar, x.index(2 * stage + 1), pred=has_high)
            use += 1


@triton_gluon.jit
def _make_ring(STAGES: gl.constexpr, FULL_ARRIVALS: gl.constexpr):
    x = gl.allocate_shared_memory(gl.bfloat16, [2 * STAGES, HALF_M, BLOCK_K], SWIZZLED)
    w = gl.allocate_shared_memory(gl.bfloat16, [STAGES, WEIGHT_ROWS, BLOCK_K], SWIZZLED)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    skewed = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=FULL_ARRIVALS)
        mbarrier.init(empty.index(i), count=2)
    mbarrier.init(skewed, count=1)
    return (x, w, full, empty), skewed


@triton_gluon.jit
def _up_kernel(
    x, w_desc, act_desc, act, routed, tiles, num_tiles,
    TOP_K: gl.constexpr, K: gl.constexpr, N: gl.constexpr,
    STAGES: gl.constexpr, SKEW: gl.constexpr, TMA_STORE: gl.constexpr, USE_PDL: gl.constexpr,
):  # fmt: skip
    ring, skewed = _make_ring(STAGES, 1 + 32 * GATHER_WARPS)
    staging_0 = gl.allocate_shared_memory(gl.bfloat16, [2, HALF_M, 64], SWIZZLED)
    staging_1 = gl.allocate_shared_memory(gl.bfloat16, [2, HALF_M, 64], SWIZZLED)
    fence_async_shared()
    wait_for_previous(USE_PDL)
    start_next(USE_PDL)
    num_columns: gl.constexpr = (N + WEIGHT_ROWS // 2 - 1) // (WEIGHT_ROWS // 2)
    num_work = gl.load(num_tiles) * num_columns
    gl.warp_specialize([
        (_consume, (ring, skewed, staging_0, act_desc, act, tiles, num_work, num_columns, 0, True, K, N, SKEW, TMA_STORE)),
        (_consume, (ring, skewed, staging_1, act_desc, act, tiles, num_work, num_columns, 1, True, K, N, SKEW, TMA_STORE)),
        (_gather, (ring, x, routed, tiles, num_work, num_columns, TOP_K, K)),
        (_load_weights, (ring, w_desc, act_desc, tiles, num_work, num_columns, True, K, N)),
    ], [4, GATHER_WARPS, 1], [CONSUMER_REGS, PRODUCER_REGS, PRODUCER_REGS])  # fmt: skip


@triton_gluon.jit
def _down_kernel(
    act_desc, w_desc, out_desc, out, tiles, num_tiles,
    K: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, SKEW: gl.constexpr, TMA_STORE: gl.constexpr, USE_PDL: gl.constexpr,
):  # fmt: skip
    ring, skewed = _make_ring(STAGES, 1)
    staging_0 = gl.allocate_shared_memory(gl.bfloat16, [2, HALF_M, 64], SWIZZLED)
    staging_1 = gl.allocate_shared_memory(gl.bfloat16, [2, HALF_M, 64], SWIZZLED)
    fence_async_shared()
    wait_for_previous(USE_PDL)
    start_next(USE_PDL)
    num_columns: gl.constexpr = (N + WEIGHT_ROWS - 1) // WEIGHT_ROWS
    num_work = gl.load(num_tiles) * num_columns
    gl.warp_specialize([
        (_consume, (ring, skewed, staging_0, out_desc, out, tiles, num_work, num_columns, 0, False, K, N, SKEW, TMA_STORE)),
        (_consume, (ring, skewed, staging_1, out_desc, out, tiles, num_work, num_columns, 1, False, K, N, SKEW, TMA_STORE)),
        (_load_weights, (ring, w_desc, act_desc, tiles, num_work, num_columns, False, K, N)),
    ], [4, 1], [CONSUMER_REGS, PRODUCER_REGS])  # fmt: skip


def has_ws(x_TD: Tensor, weights: ExpertWeights) -> bool:
    """Whether these kernels can compute this: Hopper (wgmma is its own), bf16, rows that TMA can address."""
    is_hopper = x_TD.device.type == "cuda" and torch.cuda.get_device_capability(x_TD.device)[0] == 9
    return is_hopper and x_TD.dtype == weights.down_EDF.dtype == torch.bfloat16 and weights.dim % 8 == 0 and weights.hidden % 8 == 0


def up_ws(x_TD: Tensor, routing: Routing, weights: ExpertWeights, tile: WsTile, out: Tensor | None = None) -> Tensor:
    """x [T, D] -> act [R, F] bf16, at sorted places; places that hold nothing are not written. routing.tile_rows is 128."""
    num_f, num_routed = weights.hidden, routing.routed_R.shape[0]
    check("x_TD", x_TD, torch.bfloat16, None, weights.dim)
    check("gate_up_EFD", weights.gate_up_EFD, torch.bfloat16, routing.num_experts, 2 * num_f, weights.dim, device=x_TD.device)
    assert routing.tile_rows == TILE_ROWS, f"the routing was made for tiles of {routing.tile_rows} rows"
    act_RF = x_TD.new_empty(num_routed, num_f) if out is None else out
    check("out", act_RF, torch.bfloat16, num_routed, num_f, device=x_TD.device)
    _up_kernel[(num_sms(x_TD.device),)](
        x_TD, _descriptor(weights.gate_up_EFD, TILE_COLS // 2), _descriptor(act_RF, 64), act_RF, routing.routed_R, routing.tiles_M5,
        routing.num_tiles, TOP_K=routing.top_k, K=weights.dim, N=num_f,
        STAGES=tile.num_stages, SKEW=tile.skew, TMA_STORE=tile.tma_store, num_warps=4, **pdl_options(x_TD.device),
    )  # fmt: skip
    return act_RF


def down_ws(act_RF: Tensor, routing: Routing, weights: ExpertWeights, tile: WsTile, out: Tensor | None = None) -> Tensor:
    """act [R, F] -> rows [R, D] bf16, at sorted places; places that hold nothing are not written. routing.tile_rows is 128."""
    num_routed = routing.routed_R.shape[0]
    check("act_RF", act_RF, torch.bfloat16, num_routed, weights.hidden)
    check("down_EDF", weights.down_EDF, torch.bfloat16, routing.num_experts, weights.dim, weights.hidden, device=act_RF.device)
    assert routing.tile_rows == TILE_ROWS, f"the routing was made for tiles of {routing.tile_rows} rows"
    rows_RD = act_RF.new_empty(num_routed, weights.dim) if out is None else out
    check("out", rows_RD, torch.bfloat16, num_routed, weights.dim, device=act_RF.device)
    _down_kernel[(num_sms(act_RF.device),)](
        _descriptor(act_RF, 64), _descriptor(weights.down_EDF, TILE_COLS), _descriptor(rows_RD, 64), rows_RD, routing.tiles_M5,
        routing.num_tiles, K=weights.hidden, N=weights.dim,
        STAGES=tile.num_stages, SKEW=tile.skew, TMA_STORE=tile.tma_store, num_warps=4, **pdl_options(act_RF.device),
    )  # fmt: skip
    return rows_RD


def _descriptor(tensor: Tensor, rows: int) -> TensorDescriptor:
    """All leading axes as rows, cut into boxes of [rows, 64]."""
    return TensorDescriptor.from_tensor(tensor.view(-1, tensor.shape[-1]), [rows, BLOCK_K.value], SWIZZLED.value)
