"""Owns the experts' two products over routed rows in fp8 with block scales. Knows no gate and no sum over experts (expert_combine.py).

    act[p]  = silu(x[token(p)] @ gate[e].T) * (x[token(p)] @ up[e].T)      token(p) = routed_R[p] // K, e the expert of place p
    rows[p] = e4m3(act[p]) @ down[e].T

where every matrix is e4m3 numbers times float32 scales: x and act one scale for 128 columns of a row (quantise_rows_fp8.py), weights one
for a block of 128 x 128 (_weights.py). Both scales are constant over 128 steps of the sum, so

    sum over k  =  sum over blocks b of 128:  scale_x[b] * scale_w[b] * (q_x[b] . q_w[b])

Each block's product is summed by the tensor core and then added in float32: Hopper's fp8 products keep some 14 bits of their sums
(arXiv 2412.19437, 3.5.2), too few for thousands of terms. The first product's epilogue quantises act, so its columns come in 128s.

Tiles as in expert_gemm.py: Routing.tiles_M5 says which rows; within a group the columns run outer, the tiles inner, so that weights
cross HBM once; low tiles take a lower body. Bodies below 64 rows compute the transpose: Hopper's product has 64 rows at least, which the
weights fill and 16 tokens would not, and 8 columns at least.

Legend: T tokens, K experts a token, R routed places, E experts, D model, F expert hidden, M rows of a tile, N its columns, G groups of 128.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from duomo_kernels._launch import check, is_interpreted, pdl_options, start_next, wait_for_previous
from duomo_kernels._routing import Routing
from duomo_kernels._tile_walk import BY_EXPERT, TMA_BYTES, find_tile, num_programs, num_touching
from duomo_kernels._weights import SCALE_BLOCK, ExpertWeights
from duomo_kernels._weights_fp8 import dequantised_expert
from duomo_kernels.quantise_rows_fp8 import dequantise_rows, num_groups, to_e4m3

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Tile:
    """The tile of one product. block_n counts columns of the output: 128 for up (as many of gate and of up are loaded), 64, 128 or
    256 for down. The sum runs in blocks of 128, those of the scales. num_programs 0: one for each tile; else so many a multiprocessor.
    touch (down): columns, a power of two of at least 32, of each weight row that are brought into L2 while up still runs.

    Where the columns of the weights are no multiple of 16, TMA cannot address them, and plain loads take its place. Where touch is more
    columns than a row has, or rows are no multiple of block_n, a touch could reach past the weights, and there is none.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    use_tma: bool = True
    num_programs: int = 0
    shrinks: bool = True
    touch: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Tiles:
    """Tiles of both products; they share the routing's rows a tile."""

    up: Fp8Tile
    down: Fp8Tile

    def __post_init__(self) -> None:
        assert self.up.block_m == self.down.block_m, self

    @property
    def tile_rows(self) -> int:
        return self.up.block_m


def fp8_tiles(num_routed: int, num_experts: int) -> Fp8Tiles:
    """What to take where no table of measurements says otherwise: rows as near above an expert's mean as the sizes allow."""
    mean = num_routed / num_experts
    rows = 16 if mean <= 12 else 32 if mean <= 24 else 64 if mean <= 64 else 128
    if rows <= 32:  # bound by memory: two programs a multiprocessor with three stages keep some 130 KB of weights on their way
        up = Fp8Tile(block_m=rows, block_n=128, num_warps=4, num_stages=3)
        return Fp8Tiles(up=up, down=Fp8Tile(block_m=rows, block_n=128, num_warps=4, num_stages=4))
    # Up holds two sums and a product, 192 registers a thread: it is plain loads that leave enough for the rest, and the loop over tiles at
    # 128 rows, one program a tile at 64 (as compiled for sm_90 by Triton 3.6: no spills in the inner loop, where TMA has 40).
    if rows == 64:
        up = Fp8Tile(block_m=64, block_n=128, num_warps=4, num_stages=2, use_tma=False)
        return Fp8Tiles(up=up, down=Fp8Tile(block_m=64, block_n=128, num_warps=4, num_stages=3))
    up = Fp8Tile(block_m=128, block_n=128, num_warps=8, num_stages=4, use_tma=False, num_programs=1)
    return Fp8Tiles(up=up, down=Fp8Tile(block_m=128, block_n=256, num_warps=8, num_stages=4))


def expert_up_fp8_reference(x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
    """act [R, F] in float64, not quantised, expert by expert. x as wide numbers: dequantise_rows(q, scale), or what was quantised."""
    act_RF = torch.zeros(routing.routed_R.shape[0], weights.hidden, dtype=torch.float64, device=x_TD.device)
    offsets = routing.offsets_E1.tolist()
    for expert, (lo, hi) in enumerate(zip(offsets, offsets[1:], strict=False)):
        x = x_TD[(routing.routed_R[lo:hi] // routing.top_k).long()].double()
        gate, up = (x @ dequantised_expert(weights, expert)[0].T).chunk(2, -1)
        act_RF[lo:hi] = gate * torch.sigmoid(gate) * up
    return act_RF


def expert_down_fp8_reference(act_RF: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
    """rows [R, D] in float64 of act [R, F] as wide numbers; places that hold nothing are zero."""
    rows_RD = torch.zeros(act_RF.shape[0], weights.dim, dtype=torch.float64, device=act_RF.device)
    offsets = routing.offsets_E1.tolist()
    for expert, (lo, hi) in enumerate(zip(offsets, offsets[1:], strict=False)):
        rows_RD[lo:hi] = act_RF[lo:hi].double() @ dequantised_expert(weights, expert)[1].T
    return rows_RD


def expert_gemm_fp8_reference(q_TD: Tensor, scale_TG: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
    """rows [R, D] in float64 of both products with nothing rounded between them."""
    return expert_down_fp8_reference(expert_up_fp8_reference(dequantise_rows(q_TD, scale_TG), routing, weights), routing, weights)


@triton.jit
def _weight_tile(w, w_desc, row, last_row, k0, K: tl.constexpr, BN: tl.constexpr):
    """[BN, 128]: rows row .. row + BN. Rows past last_row hold other weights or zeros: their columns are not stored."""
    if w_desc is not None:
        return w_desc.load([row, k0])
    else:
        at_N = tl.minimum(row + tl.arange(0, BN), last_row).to(tl.int64)
        k = k0 + tl.arange(0, 128)
        at_NK = w + at_N[:, None] * K + k[None, :]
        if K % 128 == 0:
            return tl.load(at_NK)
        else:
            return tl.load(at_NK, mask=k[None, :] < K, other=0.0)


@triton.jit
def _add_block(sum_, x_MK, w_NK, scale_M, scale_w, IS_SWAPPED: tl.constexpr, IS_VECTOR: tl.constexpr):
    """sum_ + scales * (x . w) of one block of 128: [M, N], or [N, M] where swapped. scale_w is one number, or N of them."""
    if IS_SWAPPED:
        part = tl.dot(w_NK, x_MK.T)
        if IS_VECTOR:
            return sum_ + part * scale_w[:, None] * scale_M[None, :]
        else:
            return sum_ + part * (scale_M * scale_w)[None, :]
    else:
        part = tl.dot(x_MK, w_NK.T)
        if IS_VECTOR:
            return sum_ + part * scale_w[None, :] * scale_M[:, None]
        else:
            return sum_ + part * (scale_M * scale_w)[:, None]


@triton.jit
def _sums(
    x_M, scale_M, w, w_desc, row_0, last_0, row_1, last_1, scale_0, scale_1, K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, IS_PAIR: tl.constexpr, IS_VECTOR: tl.constexpr,
):  # fmt: skip
    """BM rows times weight rows row_0 .. + BN and (IS_PAIR) row_1 .. + BN, float32 [BM, BN] each. x_M, scale_M: pointers to the rows and
    their scales; scale_0, scale_1: pointers to the weights' scales."""
    IS_SWAPPED: tl.constexpr = BM < 64
    NUM_K: tl.constexpr = (K + 127) // 128
    if IS_SWAPPED:
        sum_0 = tl.zeros((BN, BM), tl.float32)
    else:
        sum_0 = tl.zeros((BM, BN), tl.float32)
    sum_1 = sum_0
    for b in tl.range(0, NUM_K, num_stages=STAGES):
        k = b * 128 + tl.arange(0, 128)
        if K % 128 == 0:
            x_MK = tl.load(x_M[:, None] + k[None, :])
        else:
            x_MK = tl.load(x_M[:, None] + k[None, :], mask=k[None, :] < K, other=0.0)
        w_0 = _weight_tile(w, w_desc, row_0, last_0, b * 128, K, BN)
        scale_b_M = tl.load(scale_M + b)
        sum_0 = _add_block(sum_0, x_MK, w_0, scale_b_M, tl.load(scale_0 + b), IS_SWAPPED, False)
        if IS_PAIR:
            w_1 = _weight_tile(w, w_desc, row_1, last_1, b * 128, K, BN)
            sum_1 = _add_block(sum_1, x_MK, w_1, scale_b_M, tl.load(scale_1 + b), IS_SWAPPED, IS_VECTOR)
    if IS_SWAPPED:
        return sum_0.T, sum_1.T
    else:
        return sum_0, sum_1


@triton.jit
def _up_tile(
    x, scale_x, w, w_desc, scale_w, act, scale_act, routed, expert, first, rows, column, D: tl.constexpr, F: tl.constexpr,
    TOP_K: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    NUM_D: tl.constexpr = (D + 127) // 128
    NUM_F: tl.constexpr = (F + 127) // 128
    row_M = tl.arange(0, BM)
    place_M = (first + tl.minimum(row_M, rows - 1)).to(tl.int64)
    token_M = (tl.load(routed + place_M) // TOP_K).to(tl.int64)
    gate_row = expert * (2 * F) + column * 128
    last_gate = expert * (2 * F) + F - 1
    # Blocks of the scales run over gate and up together: up's tile meets two of them where F is no multiple of 128.
    scale_e = scale_w + expert.to(tl.int64) * (((2 * F + 127) // 128) * NUM_D)
    scale_gate = scale_e + column * NUM_D
    if F % 128 == 0:
        scale_up = scale_gate + NUM_F * NUM_D
    else:
        scale_up = scale_e + (tl.minimum(F + column * 128 + tl.arange(0, 128), 2 * F - 1) // 128) * NUM_D
    gate_MN, up_MN = _sums(
        x + token_M * D, scale_x + token_M * NUM_D, w, w_desc, gate_row, last_gate, gate_row + F, last_gate + F, scale_gate, scale_up,
        D, BM, 128, STAGES, True, F % 128 != 0,
    )  # fmt: skip
    act_MN = gate_MN / (1.0 + tl.exp(-gate_MN)) * up_MN
    col_N = column * 128 + tl.arange(0, 128)
    if F % 128 != 0:
        act_MN = tl.where((col_N < F)[None, :], act_MN, 0.0)
    top_M = tl.maximum(tl.max(tl.abs(act_MN), axis=1), 2.0**-100)
    q_MN = to_e4m3(act_MN * (448.0 / top_M)[:, None], INTERPRETED)
    tl.store(act + place_M[:, None] * F + col_N[None, :], q_MN, mask=(row_M < rows)[:, None] & (col_N < F)[None, :])
    tl.store(scale_act + place_M * NUM_F + column, top_M * (1.0 / 448.0), mask=row_M < rows)


@triton.jit
def _down_tile(
    act, scale_act, w, w_desc, scale_w, out, expert, first, rows, column, F: tl.constexpr, D: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, IS_PAIR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    NUM_F: tl.constexpr = (F + 127) // 128
    NUM_D: tl.constexpr = (D + 127) // 128
    row_M = tl.arange(0, BM)
    place_M = (first + tl.minimum(row_M, rows - 1)).to(tl.int64)
    col = column * (2 * BN if IS_PAIR else BN)
    last_row = expert * D + D - 1
    scale_e = scale_w + expert.to(tl.int64) * (NUM_D * NUM_F)
    scale_0 = scale_e + (col // 128) * NUM_F
    scale_1 = scale_e + tl.minimum((col + BN) // 128, NUM_D - 1) * NUM_F
    row = expert * D + col
    out_0, out_1 = _sums(
        act + place_M * F, scale_act + place_M * NUM_F, w, w_desc, row, last_row, row + BN, last_row, scale_0, scale_1,
        F, BM, BN, STAGES, IS_PAIR, False,
    )  # fmt: skip
    col_N = col + tl.arange(0, BN)
    at_MN = out + place_M[:, None] * D + col_N[None, :]
    is_row_M = row_M < rows
    tl.store(at_MN, out_0.to(out.dtype.element_ty), mask=is_row_M[:, None] & (col_N < D)[None, :])
    if IS_PAIR:
        tl.store(at_MN + BN, out_1.to(out.dtype.element_ty), mask=is_row_M[:, None] & (col_N + BN < D)[None, :])


@triton.jit
def _up_pid(
    pid, x, scale_x, w, w_desc, scale_w, act, scale_act, routed, tiles, D: tl.constexpr, F: tl.constexpr, TOP_K: tl.constexpr,
    BM: tl.constexpr, STAGES: tl.constexpr, SHRINKS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    expert, first, rows, column = find_tile(pid, tiles, 0, tl.cdiv(F, 128), BY_EXPERT, "")
    at = (x, scale_x, w, w_desc, scale_w, act, scale_act, routed)
    if SHRINKS and rows <= BM // 4:
        _up_tile(*at, expert, first, rows, column, D, F, TOP_K, BM // 4, STAGES, INTERPRETED)
    elif SHRINKS and rows <= BM // 2:
        _up_tile(*at, expert, first, rows, column, D, F, TOP_K, BM // 2, STAGES, INTERPRETED)
    else:
        _up_tile(*at, expert, first, rows, column, D, F, TOP_K, BM, STAGES, INTERPRETED)


@triton.jit
def _up_kernel(
    x, scale_x, w, w_desc, scale_w, act, scale_act, routed, tiles, num_tiles, D: tl.constexpr, F: tl.constexpr, TOP_K: tl.constexpr,
    BM: tl.constexpr, STAGES: tl.constexpr, SHRINKS: tl.constexpr, PERSISTS: tl.constexpr, INTERPRETED: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous(USE_PDL)
    start_next(USE_PDL)
    pid, num_pids = tl.program_id(0), tl.load(num_tiles) * tl.cdiv(F, 128)
    if PERSISTS:
        while pid < num_pids:  # not a range: the interpreter of Triton 3.6 takes none from tensors
            _up_pid(
                pid, x, scale_x, w, w_desc, scale_w, act, scale_act, routed, tiles, D, F, TOP_K, BM, STAGES, SHRINKS, INTERPRETED,
            )  # fmt: skip
            pid += tl.num_programs(0)
    elif pid < num_pids:
        _up_pid(pid, x, scale_x, w, w_desc, scale_w, act, scale_act, routed, tiles, D, F, TOP_K, BM, STAGES, SHRINKS, INTERPRETED)


@triton.jit
def _down_pid(
    pid, num_columns, act, scale_act, w, w_desc, scale_w, out, tiles, F: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    IS_PAIR: tl.constexpr, STAGES: tl.constexpr, SHRINKS: tl.constexpr,
):  # fmt: skip
    expert, first, rows, column = find_tile(pid, tiles, 0, num_columns, BY_EXPERT, "")
    at = (act, scale_act, w, w_desc, scale_w, out)
    if SHRINKS and rows <= BM // 4:
        _down_tile(*at, expert, first, rows, column, F, D, BM // 4, BN, IS_PAIR, STAGES)
    elif SHRINKS and rows <= BM // 2:
        _down_tile(*at, expert, first, rows, column, F, D, BM // 2, BN, IS_PAIR, STAGES)
    else:
        _down_tile(*at, expert, first, rows, column, F, D, BM, BN, IS_PAIR, STAGES)


@triton.jit
def _down_kernel(
    act, scale_act, w, w_desc, scale_w, out, tiles, num_tiles, touching, F: tl.constexpr, D: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, IS_PAIR: tl.constexpr, STAGES: tl.constexpr, SHRINKS: tl.constexpr, PERSISTS: tl.constexpr, TOUCH: tl.constexpr,
    USE_PDL: tl.constexpr,
):  # fmt: skip
    start_next(USE_PDL)
    num_columns = tl.cdiv(D, 2 * BN if IS_PAIR else BN)
    # The routing is read before the wait: expert_up_fp8 let us start after its own, when the routing was whole. From L2: L1 may hold an
    # earlier kernel's line.
    pid, num_pids = tl.program_id(0), tl.load(num_tiles, cache_modifier=".cg") * num_columns
    if TOUCH > 0 and USE_PDL and pid < tl.minimum(touching, num_pids):
        expert, _, _, column = find_tile(pid, tiles, 0, num_columns, BY_EXPERT, ".cg")
        row_N = expert.to(tl.int64) * D + column * (2 * BN if IS_PAIR else BN) + tl.arange(0, BN)
        # Into L2, while the product before still runs: one byte of every 32. Volatile, or the compiler drops what nobody needs.
        tl.load(w + row_N[:, None] * F + (tl.arange(0, TOUCH // 32) * 32)[None, :], volatile=True)
    wait_for_previous(USE_PDL)
    if PERSISTS:
        while pid < num_pids:
            _down_pid(pid, num_columns, act, scale_act, w, w_desc, scale_w, out, tiles, F, D, BM, BN, IS_PAIR, STAGES, SHRINKS)
            pid += tl.num_programs(0)
    elif pid < num_pids:
        _down_pid(pid, num_columns, act, scale_act, w, w_desc, scale_w, out, tiles, F, D, BM, BN, IS_PAIR, STAGES, SHRINKS)


def expert_up_fp8(
    q_TD: Tensor, scale_TG: Tensor, routing: Routing, weights: ExpertWeights, tile: Fp8Tile, *, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """x as quantise_rows_fp8 gives it -> (act_RF float8_e4m3fn, its scales float32 [R, ceil(F / 128)]), at sorted places; places that hold
    nothing are not written."""
    num_routed, dim, hidden, device = routing.routed_R.shape[0], weights.dim, weights.hidden, q_TD.device
    check("q_TD", q_TD, FP8, routing.ids_TK.shape[0], dim)
    check("scale_TG", scale_TG, torch.float32, q_TD.shape[0], num_groups(dim), device=device)
    _check_tile(routing, weights, tile, device)
    assert tile.block_n == SCALE_BLOCK, f"tile.block_n {tile.block_n}: act is quantised in groups of {SCALE_BLOCK} columns"
    empty = (q_TD.new_empty(num_routed, hidden), scale_TG.new_empty(num_routed, num_groups(hidden))) if out is None else out
    act_RF, scale_RG = empty
    check("out act", act_RF, FP8, num_routed, hidden, device=device)
    check("out scale", scale_RG, torch.float32, num_routed, num_groups(hidden), device=device)
    if num_routed == 0:
        return act_RF, scale_RG
    _up_kernel[(num_programs(routing, num_groups(hidden), tile.num_programs, device),)](
        q_TD, scale_TG, weights.gate_up_EFD, _descriptor(weights.gate_up_EFD, tile), weights.gate_up_scale_Efd, act_RF, scale_RG,
        routing.routed_R, routing.tiles_M5, routing.num_tiles, D=dim, F=hidden, TOP_K=routing.top_k,
        BM=tile.block_m, STAGES=tile.num_stages, SHRINKS=tile.shrinks and tile.block_m >= 64, PERSISTS=tile.num_programs > 0,
        INTERPRETED=is_interpreted(), num_warps=tile.num_warps, **pdl_options(device),
    )  # fmt: skip
    return act_RF, scale_RG


def expert_down_fp8(
    act_RF: Tensor, scale_RG: Tensor, routing: Routing, weights: ExpertWeights, tile: Fp8Tile, *, out: Tensor | None = None
) -> Tensor:
    """act as expert_up_fp8 gives it -> rows [R, D] in bf16 (or out's dtype), at sorted places; places that hold nothing are not written."""
    num_routed, dim, hidden, device = routing.routed_R.shape[0], weights.dim, weights.hidden, act_RF.device
    check("act_RF", act_RF, FP8, num_routed, hidden)
    check("scale_RG", scale_RG, torch.float32, num_routed, num_groups(hidden), device=device)
    _check_tile(routing, weights, tile, device)
    assert tile.block_n in (64, 128, 256), f"tile.block_n {tile.block_n}: down's columns are 64, 128 or two times 128"
    rows_RD = torch.empty(num_routed, dim, dtype=torch.bfloat16, device=device) if out is None else out
    check("out", rows_RD, rows_RD.dtype, num_routed, dim, device=device)
    if num_routed == 0:
        return rows_RD
    touch = tile.touch if tile.touch <= hidden and dim % tile.block_n == 0 else 0  # not where it could reach past the weights
    _down_kernel[(num_programs(routing, triton.cdiv(dim, tile.block_n), tile.num_programs, device),)](
        act_RF, scale_RG, weights.down_EDF, _descriptor(weights.down_EDF, tile), weights.down_scale_Edf, rows_RD,
        routing.tiles_M5, routing.num_tiles, num_touching(device), F=hidden, D=dim, BM=tile.block_m, BN=min(tile.block_n, SCALE_BLOCK),
        IS_PAIR=tile.block_n > SCALE_BLOCK, STAGES=tile.num_stages, SHRINKS=tile.shrinks and tile.block_m >= 64,
        PERSISTS=tile.num_programs > 0, TOUCH=touch, num_warps=tile.num_warps, **pdl_options(device),
    )  # fmt: skip
    return rows_RD


def expert_gemm_fp8(
    q_TD: Tensor, scale_TG: Tensor, routing: Routing, weights: ExpertWeights, tiles: Fp8Tiles | None = None, *, out: Tensor | None = None
) -> Tensor:
    """Both products: rows [R, D] in bf16 (or out's dtype) of x as quantise_rows_fp8 gives it. Two launches."""
    tiles = fp8_tiles(routing.routed_R.shape[0], routing.num_experts) if tiles is None else tiles
    act_RF, scale_RG = expert_up_fp8(q_TD, scale_TG, routing, weights, tiles.up)
    return expert_down_fp8(act_RF, scale_RG, routing, weights, tiles.down, out=out)


def _check_tile(routing: Routing, weights: ExpertWeights, tile: Fp8Tile, device: torch.device) -> None:
    assert weights.is_fp8 and weights.num_experts == routing.num_experts and weights.down_EDF.device == device == routing.routed_R.device, (
        "weights: other routing, dtype or device"
    )
    assert tile.block_m == routing.tile_rows, f"tile.block_m {tile.block_m}: the routing was made for tiles of {routing.tile_rows} rows"
    assert tile.block_m >= 16 and tile.num_warps in (4, 8), f"{tile}: warpgroups have four warps, tiles 16 rows at least"


def _descriptor(weight: Tensor, tile: Fp8Tile) -> TensorDescriptor | None:
    """The weights of all experts as rows [E * N, K], cut into [N of a tile, 128]; None where TMA cannot address them."""
    if not tile.use_tma or weight.shape[-1] % TMA_BYTES:
        return None
    return TensorDescriptor.from_tensor(weight.view(-1, weight.shape[-1]), [min(tile.block_n, SCALE_BLOCK), SCALE_BLOCK])
