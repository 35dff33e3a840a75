"""Owns the dense product of few rows and fp8 weights whose sums are cut across programs. Knows no plan.

    out[t, n] = sum over slices of  sum over the slice's blocks of 128 columns  scale[n, block] * (x[t, block] . w[n, block])

Few outputs give few programs when each sums all of K, and few programs cannot keep HBM busy. Here a program sums one slice of the columns
for block_n outputs, so that there are programs for every multiprocessor and more. Each leaves its sum in float32; the one that draws the
last ticket of a tile adds them in the order of the slices: arrival decides only who adds, so the bits are the same in every run.

Weights are constants, so a program may ask for all of its own before it waits for the kernel before it: into L2, by bulk prefetches, which
take no register. That pays where few programs each have many rows; else their requests only stand in each other's way. Lines touched one
by one, and weights taken into registers, were measured too and won nowhere by more than half a microsecond
(bench/results/linear_ways_h100.json).

Legend: T rows of x, N weight rows (outputs), K summed; M rows of a tile, S slices of K.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from duomo_kernels._grid_board import Boards
from duomo_kernels._launch import pdl_options, start_next, wait_for_previous
from duomo_kernels._linear_blocks import row_block, store_sums, weight_block
from duomo_kernels._tile_walk import TMA_BYTES
from duomo_kernels._weights import SCALE_BLOCK

TICKET_BYTES = 4
TICKETS_TOGETHER = 4  # 16 bytes: Triton compiles a kernel anew for a pointer to anything else, which a capture may be the first to meet
SLAB_BYTES = 8 << 20  # tickets of a process: 20,000 captured launches of 100 tiles
LEAST_PIECE = 256  # bytes of a prefetch


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitTile:
    """A program's tile: block_m rows of x times block_n weight rows, of which it sums slice_k columns, a multiple of 128.

    prefetches: its weights are brought into L2 before the wait.
    """

    block_m: int
    block_n: int
    slice_k: int
    num_warps: int = 4
    num_stages: int = 4
    is_swapped: bool = True
    use_tma: bool = False
    prefetches: bool = False

    def __post_init__(self) -> None:
        assert self.block_n <= SCALE_BLOCK, f"{self}: a tile's weights lie in one row of scale blocks"
        assert self.slice_k > 0 and self.slice_k % SCALE_BLOCK == 0, f"{self}: slices are whole scale blocks"


@triton.jit
def _bring_to_cache(w, column, k0, num_n, num_k, BN: tl.constexpr, SLICE: tl.constexpr, PIECE: tl.constexpr):
    """Ask for [BN, SLICE] bytes without waiting for them or giving them a register, PIECE bytes at a time."""
    at_N = tl.minimum(column + tl.arange(0, BN), num_n - 1).to(tl.int64)
    piece_P = k0 + tl.arange(0, SLICE // PIECE) * PIECE
    at_NP = (w + at_N[:, None] * num_k + piece_P[None, :]).to(tl.int64)
    bulk: tl.constexpr = "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;"
    tl.inline_asm_elementwise(bulk, "=r,l,r", [at_NP, tl.full(at_NP.shape, PIECE, tl.int32)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _scale(scale, k0, num_k, STEP: tl.constexpr, EVEN: tl.constexpr):
    return tl.load(scale + k0 // STEP) if EVEN else tl.load(scale + k0 // STEP, mask=k0 < num_k, other=0.0)


@triton.jit
def _add_block(sum_, x_MK, w_NK, scale, IS_SWAPPED: tl.constexpr):
    """sum_ + scale * (x . w) of one block, [M, N], or its transpose where swapped."""
    w_NK = w_NK.to(tl.float32).to(x_MK.dtype)  # straight to bf16 is an instruction of a quarter of the rate
    if IS_SWAPPED:
        part = tl.dot(w_NK, x_MK.T, input_precision="ieee")
    else:
        part = tl.dot(x_MK, w_NK.T, input_precision="ieee")
    return sum_ + part * scale


@triton.jit(do_not_specialize=["num_rows", "num_tiles"])
def _split_kernel(
    x, w, w_desc, scale, parts, tickets, out, num_rows, num_n, num_k, num_tiles,
    BM: tl.constexpr, BN: tl.constexpr, SLICE: tl.constexpr, NUM_SLICES: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
    EVEN: tl.constexpr, IS_SWAPPED: tl.constexpr, PIECE: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tile, slice_ = pid // NUM_SLICES, pid % NUM_SLICES
    row_M, column, first_k = tile % num_tiles * BM + tl.arange(0, BM), tile // num_tiles * BN, slice_ * SLICE
    scale += column // STEP * tl.cdiv(num_k, STEP)
    if PIECE > 0:
        _bring_to_cache(w, column, first_k, num_n, num_k, BN, SLICE, PIECE)
    wait_for_previous(USE_PDL)
    start_next(USE_PDL)
    is_row_M = row_M < num_rows
    x_M = x + row_M.to(tl.int64) * num_k
    if IS_SWAPPED:
        sum_ = tl.zeros((BN, BM), tl.float32)
    else:
        sum_ = tl.zeros((BM, BN), tl.float32)
    for step in tl.range(0, SLICE // STEP, num_stages=STAGES):
        at = first_k + step * STEP
        x_MK = row_block(x_M, is_row_M, at, num_k, STEP, EVEN)
        w_NK = weight_block(w, w_desc, column, at, num_n, num_k, BN, STEP, EVEN)
        sum_ = _add_block(sum_, x_MK, w_NK, _scale(scale, at, num_k, STEP, EVEN), IS_SWAPPED)
    col_N = column + tl.arange(0, BN)
    if NUM_SLICES == 1:
        store_sums(out, sum_, row_M, num_rows, col_N, num_n, IS_SWAPPED)
    else:
        piece = tl.arange(0, sum_.shape[0])[:, None] * sum_.shape[1] + tl.arange(0, sum_.shape[1])[None, :]
        piece_ptrs = parts + tile.to(tl.int64) * (NUM_SLICES * BM * BN) + piece
        tl.store(piece_ptrs + slice_ * (BM * BN), sum_)
        tl.debug_barrier()  # every thread's part is written before one thread takes a ticket for all
        if tl.atomic_add(tickets + tile, 1, sem="acq_rel", scope="gpu") == NUM_SLICES - 1:
            tl.store(tickets + tile, 0)
            sum_ = tl.load(piece_ptrs, cache_modifier=".cg")
            for other in tl.static_range(1, NUM_SLICES):
                sum_ += tl.load(piece_ptrs + other * (BM * BN), cache_modifier=".cg")
            store_sums(out, sum_, row_M, num_rows, col_N, num_n, IS_SWAPPED)


def linear_split(x_TK: Tensor, weight_NK: Tensor, scale_nk: Tensor | None, out_TN: Tensor, tile: SplitTile) -> None:
    """Checked by linear()."""
    assert scale_nk is not None, f"{tile}: of weights with scales alone"
    (num_rows, num_k), num_n, device = x_TK.shape, weight_NK.shape[0], x_TK.device
    num_tiles, num_slices = triton.cdiv(num_rows, tile.block_m), triton.cdiv(num_k, tile.slice_k)
    num_sums = num_tiles * triton.cdiv(num_n, tile.block_n)
    is_even = num_k % tile.slice_k == 0
    options = pdl_options(device)
    piece = 0
    # whole, aligned pieces; without dependent launch there is nothing to be early for
    if tile.prefetches and is_even and options["USE_PDL"]:
        piece = min(tile.slice_k, max(LEAST_PIECE, tile.block_n * tile.slice_k // (32 * tile.num_warps)))  # one for each thread
    parts = drawn = out_TN
    if num_slices > 1:
        parts = torch.empty(num_sums * num_slices * tile.block_m * tile.block_n, dtype=torch.float32, device=device)
        whole = triton.cdiv(num_sums, TICKETS_TOGETHER) * TICKETS_TOGETHER
        drawn = tickets(device).take(whole, TICKET_BYTES).view(torch.int32)
    _split_kernel[(num_sums * num_slices,)](
        x_TK, weight_NK, _descriptor(weight_NK, tile), scale_nk, parts, drawn, out_TN, num_rows, num_n, num_k, num_tiles,
        BM=tile.block_m, BN=tile.block_n, SLICE=tile.slice_k, NUM_SLICES=num_slices, STEP=SCALE_BLOCK, STAGES=tile.num_stages,
        EVEN=is_even, IS_SWAPPED=tile.is_swapped, PIECE=piece, num_warps=tile.num_warps, **options,
    )  # fmt: skip


def _descriptor(weight_NK: Tensor, tile: SplitTile) -> TensorDescriptor | None:
    is_addressable = weight_NK.stride(0) * weight_NK.element_size() % TMA_BYTES == 0
    return TensorDescriptor.from_tensor(weight_NK, [tile.block_n, SCALE_BLOCK]) if tile.use_tma and is_addressable else None


@functools.cache
def tickets(device: torch.device) -> Boards:
    """A device's tickets, zero between launches. Made by the first eager launch, which a capture needs anyway."""
    assert device.type != "cuda" or not torch.cuda.is_current_stream_capturing(), "launch once before capturing: tickets are zeroed outside"
    slab = torch.zeros(SLAB_BYTES if device.type == "cuda" else 1 << 20, dtype=torch.uint8, device=device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # once in a process: other streams may use it right away
    return Boards(slab=slab)
