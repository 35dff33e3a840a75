"""Owns the experts' two products over routed rows on a GPU. Knows no gate (it reads a Routing) and no sum over experts (expert_combine.py).

    act[p]  = silu(x[token(p)] @ gate[e].T) * (x[token(p)] @ up[e].T)      token(p) = routed_R[p] // K, e the expert of place p
    rows[p] = act[p] @ down[e].T

Rows of x are gathered in the load, the activation is computed in the first product's epilogue, so neither a routed copy of x nor the
[R, 2F] product ever exists. Sums in float32, act and rows rounded to x's dtype. float32 itself is multiplied whole, not as TF32: for tests.

A program computes one tile: up to block_m places of one expert times block_n columns. Routing.tiles_M5 says which; within a group of
tiles the columns run outer and the tiles inner, so that an expert's weights cross HBM once and are shared through L2. A tile of few
rows takes a body of half or a quarter of the height: the padding of each expert's last tile would cost as much as the rows themselves
where an expert has few. Every row's sum runs over k in the same steps whatever its tile holds.

Legend: T tokens, K experts a token, R routed places, E experts, D model, F expert hidden, M tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from duomo_kernels._launch import check, pdl_options, start_next, wait_for_previous
from duomo_kernels._routing import Routing
from duomo_kernels._tile_walk import TMA_BYTES, find_tile, num_programs, num_touching
from duomo_kernels._weights import ExpertWeights


@dataclass(frozen=True, kw_only=True, slots=True)
class GemmTile:
    """The tile of one product. block_n counts columns of the output (up loads as many of gate and of up).

    num_programs: 0 for one program a tile; otherwise persistent, that many for each multiprocessor. shrinks: tiles of few rows take a lower
    body. touch: columns of each weight row brought into L2 while the kernel before still runs (64 times a power of two). is_flat (down
    alone): one persistent loop over the steps of all of a program's tiles, so that the next tile's copies start before this one is stored;
    full height only, and by TMA alone. band: successive tiles whose columns run together; 0 for those of one expert.

    Where the rows of a tensor do not start at multiples of 16 bytes, TMA cannot address it, and plain loads take its place; is_flat then
    gives the persistent loop over whole tiles. Where touch is more columns than a row has, columns are no multiple of 64, or rows none of
    block_n, a touch could reach past the weights, and there is none; nor is there in the flat loop.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    use_tma: bool = True
    num_programs: int = 0
    shrinks: bool = True
    touch: int = 0
    is_flat: bool = False
    band: int = 0

    def __post_init__(self) -> None:
        assert self.use_tma or not self.is_flat, f"{self}: the flat loop runs by TMA alone"


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
def _up_weights(w, w_desc, expert, column, k0, num_k, num_f, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr):
    """[BK, 2 BN]: BN rows of the gate, then the same BN of up, transposed. One copy by TMA, so that one product computes both."""
    if w_desc is not None:
        return w_desc.load([expert, 0, column * BN, k0]).reshape(2 * BN, BK).T
    else:
        row_N = tl.arange(0, 2 * BN)
        half_row_N = tl.minimum(column * BN + row_N % BN, num_f - 1)  # past the edge any row will do: its column is not stored
        at_N = (expert * 2 + row_N // BN).to(tl.int64) * num_f + half_row_N
        k_K = k0 + tl.arange(0, BK)
        at_KN = w + at_N[None, :] * num_k + k_K[:, None]
        return tl.load(at_KN) if EVEN_K else tl.load(at_KN, mask=k_K[:, None] < num_k, other=0.0)


@triton.jit
def _down_weights(w, w_desc, expert, column, k0, num_k, num_d, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr):
    """[BK, BN]: BN rows of down, transposed."""
    if w_desc is not None:
        return w_desc.load([expert, column * BN, k0]).reshape(BN, BK).T
    else:
        at_N = expert.to(tl.int64) * num_d + tl.minimum(column * BN + tl.arange(0, BN), num_d - 1)
        k_K = k0 + tl.arange(0, BK)
        at_KN = w + at_N[None, :] * num_k + k_K[:, None]
        return tl.load(at_KN) if EVEN_K else tl.load(at_KN, mask=k_K[:, None] < num_k, other=0.0)


@triton.jit
def _touch(w, row, num_k, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Bring the first COLUMNS columns of ROWS successive weight rows into L2: one load a line of 128 bytes, whose value nobody needs."""
    row_N = (row + tl.arange(0, ROWS)).to(tl.int64)
    line_K = tl.arange(0, COLUMNS // 64) * 64
    tl.load(w + row_N[:, None] * num_k + line_K[None, :], volatile=True)  # volatile, or the compiler drops it


@triton.jit
def _up_tile(
    x, w, w_desc, act, routed, expert, first, rows, column, num_k, num_f,
    TOP_K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    row_M = tl.arange(0, BM)
    is_row_M = row_M < rows
    token_M = tl.load(routed + first + row_M, mask=is_row_M, other=0) // TOP_K
    x_MK = x + token_M.to(tl.int64)[:, None] * num_k + tl.arange(0, BK)[None, :]
    sum_MN = tl.zeros((BM, 2 * BN), tl.float32)
    for k0 in tl.range(0, num_k, BK, num_stages=STAGES):
        part_MK = tl.load(x_MK + k0) if EVEN_K else tl.load(x_MK + k0, mask=(k0 + tl.arange(0, BK))[None, :] < num_k, other=0.0)
        sum_MN = tl.dot(part_MK, _up_weights(w, w_desc, expert, column, k0, num_k, num_f, BN, BK, EVEN_K), sum_MN, input_precision="ieee")
    gate_MN, up_MN = sum_MN.reshape(BM, 2, BN).permute(0, 2, 1).split()
    act_MN = gate_MN / (1.0 + tl.exp(-gate_MN)) * up_MN
    col_N = column * BN + tl.arange(0, BN)
    out_MN = act + (first + row_M).to(tl.int64)[:, None] * num_f + col_N[None, :]
    tl.store(out_MN, act_MN.to(act.dtype.element_ty), mask=is_row_M[:, None] & (col_N < num_f)[None, :])


@triton.jit
def _down_tile(
    act, act_desc, w, w_desc, out, expert, first, rows, column, num_k, num_d,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    row_M = tl.arange(0, BM)
    place_M = (first + tl.minimum(row_M, rows - 1)).to(tl.int64)
    act_MK = act + place_M[:, None] * num_k + tl.arange(0, BK)[None, :]
    sum_MN = tl.zeros((BM, BN), tl.float32)
    for k0 in tl.range(0, num_k, BK, num_stages=STAGES):
        if act_desc is not None:  # rows past the tile's are another expert's or nobody's: what they give is not stored
            part_MK = act_desc.load([first, k0])
        elif EVEN_K:
            part_MK = tl.load(act_MK + k0)
        else:
            part_MK = tl.load(act_MK + k0, mask=(k0 + tl.arange(0, BK))[None, :] < num_k, other=0.0)
        sum_MN = tl.dot(part_MK, _down_weights(w, w_desc, expert, column, k0, num_k, num_d, BN, BK, EVEN_K), sum_MN, input_precision="ieee")
    col_N = column * BN + tl.arange(0, BN)
    out_MN = out + (first + row_M).to(tl.int64)[:, None] * num_d + col_N[None, :]
    tl.store(out_MN, sum_MN.to(out.dtype.element_ty), mask=(row_M < rows)[:, None] & (col_N < num_d)[None, :])


@triton.jit
def _up_kernel(
    x, w, w_desc, act, routed, tiles, num_tiles, num_columns, num_k, num_f, num_experts, touching,
    TOP_K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, TOUCH: tl.constexpr,
    EVEN_K: tl.constexpr, BAND: tl.constexpr, SHRINKS: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if TOUCH > 0 and USE_PDL and pid < touching:  # while the gate still runs: most experts will be asked for, whatever it says
        row = (pid // num_columns) % num_experts * 2 * num_f + pid % num_columns * BN
        _touch(w, row, num_k, BN, TOUCH)
        _touch(w, row + num_f, num_k, BN, TOUCH)
    wait_for_previous(USE_PDL)
    start_next(USE_PDL)  # after the wait: the next kernel may then read the routing at once
    total = tl.load(num_tiles)
    num_pids = total * num_columns
    while pid < num_pids:  # not a range: the interpreter of Triton 3.6 takes none from tensors
        expert, first, rows, column = find_tile(pid, tiles, total, num_columns, BAND, "")
        if SHRINKS and rows <= BM // 4:
            _up_tile(x, w, w_desc, act, routed, expert, first, rows, column, num_k, num_f, TOP_K, BM // 4, BN, BK, STAGES, EVEN_K)
        elif SHRINKS and rows <= BM // 2:
            _up_tile(x, w, w_desc, act, routed, expert, first, rows, column, num_k, num_f, TOP_K, BM // 2, BN, BK, STAGES, EVEN_K)
        else:
            _up_tile(x, w, w_desc, act, routed, expert, first, rows, column, num_k, num_f, TOP_K, BM, BN, BK, STAGES, EVEN_K)
        pid += tl.num_programs(0)


@triton.jit
def _down_kernel(
    act, act_desc, w, w_desc, out, tiles, num_tiles, num_columns, num_k, num_d, touching,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, TOUCH: tl.constexpr,
    EVEN_K: tl.constexpr, BAND: tl.constexpr, SHRINKS: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    start_next(USE_PDL)
    pid = tl.program_id(0)
    # Before the wait: expert_up let us start after its own, when the routing was whole. From L2: L1 may hold an earlier kernel's line.
    total = tl.load(num_tiles, cache_modifier=".cg")
    num_pids = total * num_columns
    if TOUCH > 0 and USE_PDL and pid < tl.minimum(touching, num_pids):
        expert, _, _, column = find_tile(pid, tiles, total, num_columns, BAND, ".cg")
        _touch(w, expert * num_d + column * BN, num_k, BN, TOUCH)
    wait_for_previous(USE_PDL)
    while pid < num_pids:
        expert, first, rows, column = find_tile(pid, tiles, total, num_columns, BAND, "")
        if SHRINKS and rows <= BM // 4:
            _down_tile(act, None, w, w_desc, out, expert, first, rows, column, num_k, num_d, BM // 4, BN, BK, STAGES, EVEN_K)
        elif SHRINKS and rows <= BM // 2:
            _down_tile(act, None, w, w_desc, out, expert, first, rows, column, num_k, num_d, BM // 2, BN, BK, STAGES, EVEN_K)
        else:
            _down_tile(act, act_desc, w, w_desc, out, expert, first, rows, column, num_k, num_d, BM, BN, BK, STAGES, EVEN_K)
        pid += tl.num_programs(0)


@triton.jit
def _down_flat_kernel(
    act_desc, w_desc, out, tiles, num_tiles, num_columns, num_k, num_d,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, BAND: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    start_next(USE_PDL)
    total = tl.load(num_tiles, cache_modifier=".cg")  # before the wait, as in _down_kernel
    wait_for_previous(USE_PDL)
    num_pids = total * num_columns
    row_M = tl.arange(0, BM)
    for pid in tl.range(tl.program_id(0), num_pids, tl.num_programs(0), flatten=True, num_stages=STAGES):
        expert, first, rows, column = find_tile(pid, tiles, total, num_columns, BAND, "")
        sum_MN = tl.zeros((BM, BN), tl.float32)
        for k0 in tl.range(0, num_k, BK):
            part_MK = act_desc.load([first, k0])
            w_KN = w_desc.load([expert, column * BN, k0]).reshape(BN, BK).T
            sum_MN = tl.dot(part_MK, w_KN, sum_MN, input_precision="ieee")
        col_N = column * BN + tl.arange(0, BN)
        out_MN = out + (first + row_M).to(tl.int64)[:, None] * num_d + col_N[None, :]
        tl.store(out_MN, sum_MN.to(out.dtype.element_ty), mask=(row_M < rows)[:, None] & (col_N < num_d)[None, :])


def expert_up(x_TD: Tensor, routing: Routing, weights: ExpertWeights, tile: GemmTile, out: Tensor | None = None) -> Tensor:
    """x [T, D] -> act [R, F] of x's dtype, at sorted places; places that hold nothing are not written. Weights of x's dtype.

    The kernel lets its successor start once the routing is whole: only a kernel launched after it may read the routing before it waits.
    """
    num_k, num_f, num_routed = x_TD.shape[1], weights.hidden, routing.routed_R.shape[0]
    check("x_TD", x_TD, weights.gate_up_EFD.dtype, routing.ids_TK.shape[0], weights.dim, device=weights.gate_up_EFD.device)
    _check_routing(routing, weights, tile)
    act_RF = x_TD.new_empty(num_routed, num_f) if out is None else out
    check("out", act_RF, x_TD.dtype, num_routed, num_f, device=x_TD.device)
    if num_routed == 0:
        return act_RF
    num_columns = triton.cdiv(num_f, tile.block_n)
    w_desc = _descriptor(weights.gate_up_EFD.view(-1, 2, num_f, num_k), [1, 2, tile.block_n, tile.block_k], tile)
    _up_kernel[(num_programs(routing, num_columns, tile.num_programs, x_TD.device),)](
        x_TD, weights.gate_up_EFD, w_desc, act_RF, routing.routed_R, routing.tiles_M5, routing.num_tiles,
        num_columns, num_k, num_f, weights.num_experts, num_touching(x_TD.device),
        TOP_K=routing.top_k, BM=tile.block_m, BN=tile.block_n, BK=tile.block_k, STAGES=tile.num_stages,
        TOUCH=_touch_columns(num_k, num_f, tile), EVEN_K=num_k % tile.block_k == 0, BAND=_band(routing, tile),
        SHRINKS=tile.shrinks and tile.block_m >= 64, num_warps=tile.num_warps, **pdl_options(x_TD.device),
    )  # fmt: skip
    return act_RF


def expert_down(act_RF: Tensor, routing: Routing, weights: ExpertWeights, tile: GemmTile, out: Tensor | None = None) -> Tensor:
    """act [R, F] -> rows [R, D] of act's dtype, at sorted places; places that hold nothing are not written.

    Comes straight after the expert_up of the same routing (it reads the routing before it waits for the kernel before it).
    """
    num_routed, num_k = act_RF.shape
    num_d = weights.dim
    check("act_RF", act_RF, weights.down_EDF.dtype, routing.routed_R.shape[0], weights.hidden, device=weights.down_EDF.device)
    _check_routing(routing, weights, tile)
    rows_RD = act_RF.new_empty(num_routed, num_d) if out is None else out
    check("out", rows_RD, act_RF.dtype, num_routed, num_d, device=act_RF.device)
    if num_routed == 0:
        return rows_RD
    num_columns = triton.cdiv(num_d, tile.block_n)
    w_desc = _descriptor(weights.down_EDF, [1, tile.block_n, tile.block_k], tile)
    act_desc = _descriptor(act_RF, [tile.block_m, tile.block_k], tile)
    programs = num_programs(routing, num_columns, max(tile.num_programs, int(tile.is_flat)), act_RF.device)
    if tile.is_flat and act_desc is not None and w_desc is not None:
        _down_flat_kernel[(programs,)](
            act_desc, w_desc, rows_RD, routing.tiles_M5, routing.num_tiles, num_columns, num_k, num_d,
            BM=tile.block_m, BN=tile.block_n, BK=tile.block_k, STAGES=tile.num_stages, BAND=_band(routing, tile),
            num_warps=tile.num_warps, **pdl_options(act_RF.device),
        )  # fmt: skip
        return rows_RD
    _down_kernel[(programs,)](
        act_RF, act_desc, weights.down_EDF, w_desc, rows_RD, routing.tiles_M5, routing.num_tiles, num_columns, num_k, num_d,
        num_touching(act_RF.device),
        BM=tile.block_m, BN=tile.block_n, BK=tile.block_k, STAGES=tile.num_stages,
        TOUCH=_touch_columns(num_k, num_d, tile), EVEN_K=num_k % tile.block_k == 0, BAND=_band(routing, tile),
        SHRINKS=tile.shrinks and tile.block_m >= 64, num_warps=tile.num_warps, **pdl_options(act_RF.device),
    )  # fmt: skip
    return rows_RD


def _check_routing(routing: Routing, weights: ExpertWeights, tile: GemmTile) -> None:
    assert routing.num_experts == weights.num_experts, f"routing over {routing.num_experts} experts, weights of {weights.num_experts}"
    assert routing.routed_R.device == weights.down_EDF.device, f"routing on {routing.routed_R.device}, weights on {weights.down_EDF.device}"
    assert tile.block_m == routing.tile_rows, f"tile.block_m {tile.block_m}: the routing was made for tiles of {routing.tile_rows} rows"


def _band(routing: Routing, tile: GemmTile) -> int:
    """Where experts have one tile each in the mean, nothing is shared and columns may as well be successive."""
    is_shared = routing.routed_R.shape[0] > routing.num_experts * tile.block_m
    return tile.band if is_shared else 1


def _touch_columns(num_k: int, num_rows: int, tile: GemmTile) -> int:
    """Columns that a program may touch before its turn: none where its rows or columns could reach past the weights."""
    return tile.touch if tile.touch <= num_k and num_rows % tile.block_n == 0 and num_k % 64 == 0 else 0


def _descriptor(tensor: Tensor, block: list[int], tile: GemmTile) -> TensorDescriptor | None:
    """A tensor that TMA copies by blocks; None where it cannot address it."""
    is_addressable = all(stride * tensor.element_size() % TMA_BYTES == 0 for stride in tensor.stride()[:-1])
    return TensorDescriptor.from_tensor(tensor, block) if tile.use_tma and is_addressable else None
