"""Owns the experts' two products over routed rows on a GPU. Knows no gate (it reads a Routing) and no sum over experts (expert_combine.py).

    act[p]  = silu(x[token(p)] @ gate[e].T) * (x[token(p)] @ up[e].T)      token(p) = routed_R[p] // K, e the expert of place p
    rows[p] = act[p] @ down[e].T

Rows of x are gathered in the load, the activation is computed in the first product's epilogue, so neither a routed copy of x nor the
[R, 2F] product ever exists. Sums in float32, act and rows rounded to x's dtype.

A program computes one tile: up to block_m places of one expert times block_n columns. Routing.tiles_M5 says which; within a group of
tiles the columns run outer and the tiles inner, so that an expert's weights cross HBM once and are shared through L2. A tile of few rows
takes a body of half or a quarter of the height: at 128 rows the padding of the last tiles alone would cost a quarter of the time at 256 rows an
expert. Every row's sum runs over k in the same steps whatever its tile holds.

Legend: T tokens, K experts a token, R routed places, E experts, D model, F expert hidden, M tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from duomo_kernels._launch import check, num_sms, pdl_options, start_next, wait_for_previous
from duomo_kernels._routing import Routing
from duomo_kernels._weights import ExpertWeights

TMA_BYTES = 16  # a descriptor's rows start at multiples of this


@dataclass(frozen=True, kw_only=True, slots=True)
class GemmTile:
    """The tile of one product. block_n counts columns of the output (up: as many of gate and of up are loaded). num_programs 0: one for each
    tile; otherwise persistent, that many for each multiprocessor."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    use_tma: bool = True
    num_programs: int = 0
    shrinks: bool = True


def expert_gemm_reference(x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> tuple[Tensor, Tensor]:
    """act [R, F] and rows [R, D], expert by expert, in float64. Places that hold nothing are zero."""
    act_RF = torch.zeros(routing.routed_R.shape[0], weights.down_EDF.shape[2], dtype=torch.float64, device=x_TD.device)
    rows_RD = torch.zeros(routing.routed_R.shape[0], x_TD.shape[1], dtype=torch.float64, device=x_TD.device)
    offsets = routing.offsets_E1.tolist()
    for expert, (lo, hi) in enumerate(zip(offsets, offsets[1:], strict=False)):
        x = x_TD[(routing.routed_R[lo:hi] // routing.top_k).long()].double()
        gate, up = (x @ weights.gate_up_EFD[expert].double().T).chunk(2, -1)
        act_RF[lo:hi] = gate * torch.sigmoid(gate) * up
        rows_RD[lo:hi] = act_RF[lo:hi] @ weights.down_EDF[expert].double().T
    return act_RF, rows_RD


@triton.jit
def _find_tile(pid, tiles, num_columns, GROUPED: tl.constexpr):
    """pid -> (expert, first place, rows, column of tiles). The pids of a group are successive whatever their order inside."""
    if GROUPED:
        at = tiles + (pid // num_columns) * 5
        first_tile, group_tiles = tl.load(at + 3), tl.load(at + 4)
        local = pid - first_tile * num_columns
        tile, column = first_tile + local % group_tiles, local // group_tiles
    else:
        tile, column = pid // num_columns, pid % num_columns
    at = tiles + tile * 5
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), column


@triton.jit
def _weight_tile(w, w_desc, row, last_row, k0, num_k, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr):
    """[BK, BN]: rows row .. row + BN of a row-major weight, transposed. Rows past last_row are anything finite or not: their columns are not stored."""
    if w_desc is not None:
        return w_desc.load([row, k0]).T
    else:
        at_N = tl.minimum(row + tl.arange(0, BN), last_row).to(tl.int64)
        k = k0 + tl.arange(0, BK)
        at_KN = w + at_N[None, :] * num_k + k[:, None]
        if EVEN_K:
            return tl.load(at_KN)
        else:
            return tl.load(at_KN, mask=k[:, None] < num_k, other=0.0)


@triton.jit
def _up_tile(
    x, w, w_desc, act, routed, expert, first, rows, column, num_k, num_f,
    TOP_K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    row_M = tl.arange(0, BM)
    is_row_M = row_M < rows
    token_M = tl.load(routed + first + row_M, mask=is_row_M, other=0) // TOP_K
    x_MK = x + token_M.to(tl.int64)[:, None] * num_k + tl.arange(0, BK)[None, :]
    gate_row = expert * 2 * num_f + column * BN
    last_row = expert * 2 * num_f + num_f - 1
    gate_MN = tl.zeros((BM, BN), tl.float32)
    up_MN = tl.zeros((BM, BN), tl.float32)
    for k0 in tl.range(0, num_k, BK, num_stages=STAGES):
        if EVEN_K:
            part_MK = tl.load(x_MK + k0)
        else:
            part_MK = tl.load(x_MK + k0, mask=(k0 + tl.arange(0, BK))[None, :] < num_k, other=0.0)
        gate_MN = tl.dot(part_MK, _weight_tile(w, w_desc, gate_row, last_row, k0, num_k, BN, BK, EVEN_K), gate_MN)
        up_MN = tl.dot(part_MK, _weight_tile(w, w_desc, gate_row + num_f, last_row + num_f, k0, num_k, BN, BK, EVEN_K), up_MN)
    act_MN = gate_MN / (1.0 + tl.exp(-gate_MN)) * up_MN
    col_N = column * BN + tl.arange(0, BN)
    out_MN = act + (first + row_M).to(tl.int64)[:, None] * num_f + col_N[None, :]
    tl.store(out_MN, act_MN.to(act.dtype.element_ty), mask=is_row_M[:, None] & (col_N < num_f)[None, :])


@triton.jit
def _down_tile(
    act, w, w_desc, out, expert, first, rows, column, num_k, num_d,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    row_M = tl.arange(0, BM)
    is_row_M = row_M < rows
    place_M = (first + tl.minimum(row_M, rows - 1)).to(tl.int64)
    act_MK = act + place_M[:, None] * num_k + tl.arange(0, BK)[None, :]
    sum_MN = tl.zeros((BM, BN), tl.float32)
    for k0 in tl.range(0, num_k, BK, num_stages=STAGES):
        if EVEN_K:
            part_MK = tl.load(act_MK + k0)
        else:
            part_MK = tl.load(act_MK + k0, mask=(k0 + tl.arange(0, BK))[None, :] < num_k, other=0.0)
        row = expert * num_d + column * BN
        sum_MN = tl.dot(part_MK, _weight_tile(w, w_desc, row, expert * num_d + num_d - 1, k0, num_k, BN, BK, EVEN_K), sum_MN)
    col_N = column * BN + tl.arange(0, BN)
    out_MN = out + (first + row_M).to(tl.int64)[:, None] * num_d + col_N[None, :]
    tl.store(out_MN, sum_MN.to(out.dtype.element_ty), mask=is_row_M[:, None] & (col_N < num_d)[None, :])


@triton.jit
def _up_kernel(
    x, w, w_desc, act, routed, tiles, num_tiles, num_columns, num_k, num_f,
    TOP_K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    EVEN_K: tl.constexpr, GROUPED: tl.constexpr, SHRINKS: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous(USE_PDL)
    start_next(USE_PDL)  # after the wait: the next kernel may then read the routing at once
    num_pids = tl.load(num_tiles) * num_columns
    pid = tl.program_id(0)
    while pid < num_pids:  # not a range: the interpreter of Triton 3.6 takes none from tensors
        expert, first, rows, column = _find_tile(pid, tiles, num_columns, GROUPED)
        if SHRINKS and rows <= BM // 4:
            _up_tile(x, w, w_desc, act, routed, expert, first, rows, column, num_k, num_f, TOP_K, BM // 4, BN, BK, STAGES, EVEN_K)
        elif SHRINKS and rows <= BM // 2:
            _up_tile(x, w, w_desc, act, routed, expert, first, rows, column, num_k, num_f, TOP_K, BM // 2, BN, BK, STAGES, EVEN_K)
        else:
            _up_tile(x, w, w_desc, act, routed, expert, first, rows, column, num_k, num_f, TOP_K, BM, BN, BK, STAGES, EVEN_K)
        pid += tl.num_programs(0)


@triton.jit
def _down_kernel(
    act, w, w_desc, out, tiles, num_tiles, num_columns, num_k, num_d,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    EVEN_K: tl.constexpr, GROUPED: tl.constexpr, SHRINKS: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    start_next(USE_PDL)
    wait_for_previous(USE_PDL)
    num_pids = tl.load(num_tiles) * num_columns
    pid = tl.program_id(0)
    while pid < num_pids:  # not a range: the interpreter of Triton 3.6 takes none from tensors
        expert, first, rows, column = _find_tile(pid, tiles, num_columns, GROUPED)
        if SHRINKS and rows <= BM // 4:
            _down_tile(act, w, w_desc, out, expert, first, rows, column, num_k, num_d, BM // 4, BN, BK, STAGES, EVEN_K)
        elif SHRINKS and rows <= BM // 2:
            _down_tile(act, w, w_desc, out, expert, first, rows, column, num_k, num_d, BM // 2, BN, BK, STAGES, EVEN_K)
        else:
            _down_tile(act, w, w_desc, out, expert, first, rows, column, num_k, num_d, BM, BN, BK, STAGES, EVEN_K)
        pid += tl.num_programs(0)


def expert_up(x_TD: Tensor, routing: Routing, weights: ExpertWeights, tile: GemmTile, out: Tensor | None = None) -> Tensor:
    """x [T, D] -> act [R, F] of x's dtype, at sorted places; places that hold nothing are not written. Weights as ExpertWeights says."""
    num_k, num_f, num_routed = x_TD.shape[1], weights.down_EDF.shape[2], routing.routed_R.shape[0]
    num_experts = routing.num_experts
    check("x_TD", x_TD, weights.gate_up_EFD.dtype, None, num_k)
    check("gate_up_EFD", weights.gate_up_EFD, x_TD.dtype, num_experts, 2 * num_f, num_k, device=x_TD.device)
    assert tile.block_m == routing.tile_rows, f"tile.block_m {tile.block_m}: the routing was made for tiles of {routing.tile_rows} rows"
    act_RF = x_TD.new_empty(num_routed, num_f) if out is None else out
    check("out", act_RF, x_TD.dtype, num_routed, num_f, device=x_TD.device)
    num_columns = triton.cdiv(num_f, tile.block_n)
    _up_kernel[(_grid(routing, num_columns, tile, x_TD.device),)](
        x_TD, weights.gate_up_EFD, _descriptor(weights.gate_up_EFD, tile), act_RF, routing.routed_R, routing.tiles_M5, routing.num_tiles,
        num_columns, num_k, num_f,
        TOP_K=routing.top_k, BM=tile.block_m, BN=tile.block_n, BK=tile.block_k, STAGES=tile.num_stages,
        EVEN_K=num_k % tile.block_k == 0, GROUPED=num_routed > num_experts * tile.block_m, SHRINKS=tile.shrinks and tile.block_m >= 64,
        num_warps=tile.num_warps, **pdl_options(x_TD.device),
    )  # fmt: skip
    return act_RF


def expert_down(act_RF: Tensor, routing: Routing, weights: ExpertWeights, tile: GemmTile, out: Tensor | None = None) -> Tensor:
    """act [R, F] -> rows [R, D] of act's dtype, at sorted places; places that hold nothing are not written."""
    num_routed, num_k = act_RF.shape
    num_d = weights.down_EDF.shape[1]
    check("act_RF", act_RF, weights.down_EDF.dtype, routing.routed_R.shape[0], num_k)
    check("down_EDF", weights.down_EDF, act_RF.dtype, routing.num_experts, num_d, num_k, device=act_RF.device)
    assert tile.block_m == routing.tile_rows, f"tile.block_m {tile.block_m}: the routing was made for tiles of {routing.tile_rows} rows"
    rows_RD = act_RF.new_empty(num_routed, num_d) if out is None else out
    check("out", rows_RD, act_RF.dtype, num_routed, num_d, device=act_RF.device)
    num_columns = triton.cdiv(num_d, tile.block_n)
    _down_kernel[(_grid(routing, num_columns, tile, act_RF.device),)](
        act_RF, weights.down_EDF, _descriptor(weights.down_EDF, tile), rows_RD, routing.tiles_M5, routing.num_tiles, num_columns, num_k, num_d,
        BM=tile.block_m, BN=tile.block_n, BK=tile.block_k, STAGES=tile.num_stages,
        EVEN_K=num_k % tile.block_k == 0, GROUPED=num_routed > routing.num_experts * tile.block_m, SHRINKS=tile.shrinks and tile.block_m >= 64,
        num_warps=tile.num_warps, **pdl_options(act_RF.device),
    )  # fmt: skip
    return rows_RD


def _grid(routing: Routing, num_columns: int, tile: GemmTile, device: torch.device) -> int:
    """One program for each tile that any routing of this size may need, or num_programs for each multiprocessor."""
    most = routing.tiles_M5.shape[0] * num_columns
    return min(most, tile.num_programs * num_sms(device)) if tile.num_programs else most


def _descriptor(weight: Tensor, tile: GemmTile) -> TensorDescriptor | None:
    """The weights of all experts as rows [E * N, K], cut into [block_n, block_k]; None where TMA cannot address them."""
    if not tile.use_tma or weight.shape[-1] * weight.element_size() % TMA_BYTES:
        return None
    return TensorDescriptor.from_tensor(weight.view(-1, weight.shape[-1]), [tile.block_n, tile.block_k])
