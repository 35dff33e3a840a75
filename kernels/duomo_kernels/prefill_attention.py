"""Owns causal attention of packed sequences over their own keys and over cached ones before them. Knows no batch and no cache's owner.

    out[t, h] = sum over j <= position(t) of softmax_j(q[t, h] . k[j, h / G] * scale) v[j, h / G]

Sequence s owns rows cu_seqlens[s] .. cu_seqlens[s + 1] of q, k and v. With a prefix, its keys 0 .. prefix_s lie in blocks of the paged pool
(layout of decode_attention.py) and its packed rows follow at positions prefix_s + i. Rows past cu_seqlens[S] are padding: not read as keys,
and not written.

A program takes BLOCK_M rows of one query head: the prefix in tiles gathered from the pool, then the packed keys up to the diagonal by
TMA; only tiles on the diagonal are masked. Where the last tile is cut by the sequence's end, values of rows past it become zeros: rows of
the next sequence, or of nobody, never meet a product (a NaN there would pass through a weight of zero). Tiles above the diagonal are never
visited. A row's bits depend on its own sequence alone: tiles start at the sequence's first row and first key.

Who computes (`choose_way`), by bench/results/prefill_attention_h100.json ("ours" there is the kernel below): cuDNN where the caller
vouches that all sequences are equally long, since it overlaps softmax with products as Triton's code cannot. The kernel
on mixed lengths (cuDNN would go sequence by sequence and leave the GPU idle), under a prefix (cuDNN's causal corner knows none) and off
CUDA. Ask for way="ours" where a row's bits must not depend on company, or where shapes seldom come back: cuDNN plans each anew.

Legend: T packed rows, S sequences, H query heads, N kv heads, G = H / N, D head dim, M rows of a program, L keys of a tile, B blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from duomo_kernels._launch import check, pdl_options, start_next, wait_for_previous
from duomo_kernels._prefill_library import equal_attention, takes
from duomo_kernels._tile_walk import TMA_BYTES

LOG2_E = 1.4426950408889634
MAX_SEQUENCES = 4096  # lengths that a program holds in registers
CUDNN_MIN_TOKENS = 128  # a shorter sequence is one tile, with nothing to overlap

Way = Literal["ours", "cudnn"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CachedPrefix:
    """Keys and values before the packed rows: pool [blocks, 2, N, block tokens, D], block_table [S, B], lengths [S], both int32."""

    pool: Tensor
    block_table_SB: Tensor
    lengths_S: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillConfig:
    """Query rows and keys of a tile, pipeline depth, warps."""

    block_rows: int
    block_keys: int
    num_stages: int
    num_warps: int


def prefill_attention_reference(
    q_THD: Tensor, k_TND: Tensor, v_TND: Tensor, cu_seqlens_S1: Tensor, scale: float, prefix: CachedPrefix | None = None
) -> Tensor:
    """Sequence by sequence in float64: [T, H, D]; zeros in padding."""
    group = q_THD.shape[1] // k_TND.shape[1]
    out_THD = torch.zeros(q_THD.shape, dtype=torch.float64, device=q_THD.device)
    bounds = cu_seqlens_S1.tolist()
    for s, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        q_HTD = q_THD[begin:end].double().transpose(0, 1)
        k_NLD, v_NLD = (x[begin:end].double().transpose(0, 1) for x in (k_TND, v_TND))
        start = 0
        if prefix is not None:
            start, block_tokens = int(prefix.lengths_S[s]), prefix.pool.shape[3]
            blocks = prefix.block_table_SB[s, : -(-start // block_tokens)].long()
            cached = prefix.pool[blocks].double().permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :start]
            k_NLD, v_NLD = torch.cat([cached[0], k_NLD], 1), torch.cat([cached[1], v_NLD], 1)
        hidden_TL = torch.ones(end - begin, start + end - begin, dtype=torch.bool, device=q_THD.device).triu_(start + 1)
        for n in range(k_TND.shape[1]):
            scores = q_HTD[n * group : (n + 1) * group] @ k_NLD[n].T * scale
            weights = torch.softmax(scores.masked_fill_(hidden_TL, -torch.inf), -1)
            out_THD[begin:end, n * group : (n + 1) * group] = (weights @ v_NLD[n]).transpose(0, 1)
    return out_THD


@triton.jit
def _absorb(q_MD, k_LD, v_LD, top_M, sum_M, acc_MD, live_ML, scale_log2, MASKED: tl.constexpr):
    """One tile of keys into running max, sum and weighted values."""
    score_ML = tl.dot(q_MD, k_LD.T, input_precision="ieee")
    if MASKED:
        score_ML = tl.where(live_ML, score_ML, float("-inf"))
    return _weigh(score_ML, v_LD, top_M, sum_M, acc_MD, scale_log2)


@triton.jit
def _weigh(score_ML, v_LD, top_M, sum_M, acc_MD, scale_log2):
    new_top_M = tl.maximum(top_M, tl.max(score_ML, 1) * scale_log2)  # finite: every row sees the first key of its first tile
    weight_ML = tl.exp2(score_ML * scale_log2 - new_top_M[:, None])
    shrink_M = tl.exp2(top_M - new_top_M)
    sum_M = sum_M * shrink_M + tl.sum(weight_ML, 1)
    acc_MD = tl.dot(weight_ML.to(v_LD.dtype), v_LD, acc_MD * shrink_M[:, None], input_precision="ieee")
    return new_top_M, sum_M, acc_MD


@triton.jit
def _absorb_prefix(
    q_MD, pool_ptr, pool_desc, table_row_ptr, head, length, top_M, sum_M, acc_MD, scale_log2,
    N: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Cached keys 0 .. length. Whole tiles that one block holds come by TMA, the rest by gathered pointers under a mask."""
    D: tl.constexpr = q_MD.shape[1]
    lane_L = tl.arange(0, BLOCK_N)
    lane_D = tl.arange(0, D)
    whole = 0
    if pool_desc is not None:
        whole = length // BLOCK_N
        for tile in range(0, whole):
            block = tl.load(table_row_ptr + tile * BLOCK_N // BLOCK_TOKENS)
            row = (block * (2 * N) + head) * BLOCK_TOKENS + tile * BLOCK_N % BLOCK_TOKENS
            k_LD = pool_desc.load([row, 0])
            v_LD = pool_desc.load([row + N * BLOCK_TOKENS, 0])
            top_M, sum_M, acc_MD = _absorb(q_MD, k_LD, v_LD, top_M, sum_M, acc_MD, None, scale_log2, False)
    for tile in range(whole, tl.cdiv(length, BLOCK_N)):
        key_L = tile * BLOCK_N + lane_L
        live_L = key_L < length
        block_L = tl.load(table_row_ptr + key_L // BLOCK_TOKENS, mask=live_L, other=0)
        row_L = ((block_L.to(tl.int64) * (2 * N) + head) * BLOCK_TOKENS + key_L % BLOCK_TOKENS) * D
        k_LD = tl.load(pool_ptr + row_L[:, None] + lane_D[None, :], mask=live_L[:, None], other=0.0)
        v_LD = tl.load(pool_ptr + N * BLOCK_TOKENS * D + row_L[:, None] + lane_D[None, :], mask=live_L[:, None], other=0.0)
        top_M, sum_M, acc_MD = _absorb(q_MD, k_LD, v_LD, top_M, sum_M, acc_MD, live_L[None, :], scale_log2, True)
    return top_M, sum_M, acc_MD


@triton.jit
def _locate(tile_rank, cu_ptr, num_sequences, BLOCK_M: tl.constexpr, S_PAD: tl.constexpr):
    """Sequence, its tile, its first row and its rows; the last tiles come first, since they see most keys. No such tile: rows = 0."""
    lane_S = tl.arange(0, S_PAD)
    in_S = lane_S < num_sequences
    begin_S = tl.load(cu_ptr + lane_S, mask=in_S, other=0)
    rows_S = tl.load(cu_ptr + lane_S + 1, mask=in_S, other=0) - begin_S
    tiles_S = (rows_S + BLOCK_M - 1) // BLOCK_M
    ends_S = tl.cumsum(tiles_S, 0)
    at = tl.max(ends_S, 0) - 1 - tile_rank
    seq = tl.sum((ends_S <= at).to(tl.int32), 0)
    is_S = lane_S == seq
    first = tl.sum(tl.where(is_S, ends_S - tiles_S, 0), 0)
    begin = tl.sum(tl.where(is_S, begin_S, 0), 0)
    rows = tl.sum(tl.where(is_S, rows_S, 0), 0)
    return seq, at - first, begin, tl.where(at >= 0, rows, 0)


@triton.jit(do_not_specialize=["num_sequences", "max_blocks"])  # nothing to compile later
def _prefill_kernel(
    q_desc,
    k_desc,
    v_desc,
    cu_ptr,
    pool_ptr,
    pool_desc,
    table_ptr,
    prefix_ptr,
    out_ptr,
    scale_log2,
    num_sequences,
    max_blocks,
    H: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    S_PAD: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Program (tile, query head), heads fastest: those that share keys run side by side and find them in L2."""
    head = tl.program_id(0) % H
    kv_head = head // (H // N)
    lane_M = tl.arange(0, BLOCK_M)
    lane_L = tl.arange(0, BLOCK_N)
    lane_D = tl.arange(0, D)
    wait_for_previous(USE_PDL)
    seq, tile_m, begin, rows = _locate(tl.program_id(0) // H, cu_ptr, num_sequences, BLOCK_M, S_PAD)
    start_next(USE_PDL)
    if rows > 0:
        first = tile_m * BLOCK_M
        row_M = first + lane_M
        top_M = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        sum_M = tl.zeros((BLOCK_M,), tl.float32)
        acc_MD = tl.zeros((BLOCK_M, D), tl.float32)
        q_MD = q_desc.load([begin + first, head * D])
        if prefix_ptr is not None:
            table_row_ptr = table_ptr + seq.to(tl.int64) * max_blocks
            top_M, sum_M, acc_MD = _absorb_prefix(
                q_MD, pool_ptr, pool_desc, table_row_ptr, kv_head, tl.load(prefix_ptr + seq), top_M, sum_M, acc_MD, scale_log2,
                N, BLOCK_TOKENS, BLOCK_N,
            )  # fmt: skip
        is_whole = first + BLOCK_M <= rows
        for key in range(0, tl.where(is_whole, first + BLOCK_M, first), BLOCK_N):
            k_LD = k_desc.load([begin + key, kv_head * D])
            v_LD = v_desc.load([begin + key, kv_head * D])
            score_ML = tl.dot(q_MD, k_LD.T, input_precision="ieee")
            if key >= first:  # a branch, not a loop of its own: a second loop would fill its pipeline anew
                score_ML = tl.where(row_M[:, None] >= key + lane_L[None, :], score_ML, float("-inf"))
            top_M, sum_M, acc_MD = _weigh(score_ML, v_LD, top_M, sum_M, acc_MD, scale_log2)
        for key in range(tl.where(is_whole, rows, first), rows, BLOCK_N):  # of a whole tile none: the rest lies above its diagonal
            key_L = key + lane_L
            k_LD = k_desc.load([begin + key, kv_head * D])
            v_LD = tl.where(key_L[:, None] < rows, v_desc.load([begin + key, kv_head * D]), 0.0)
            live_ML = row_M[:, None] >= key_L[None, :]  # rows of the sequence see none past its end; other rows are not stored
            top_M, sum_M, acc_MD = _absorb(q_MD, k_LD, v_LD, top_M, sum_M, acc_MD, live_ML, scale_log2, True)
        out_MD = out_ptr + ((begin + row_M).to(tl.int64) * H + head)[:, None] * D + lane_D[None, :]
        tl.store(out_MD, (acc_MD / sum_M[:, None]).to(out_ptr.dtype.element_ty), mask=row_M[:, None] < rows)


def default_config(head_dim: int, *, has_prefix: bool, dtype: torch.dtype = torch.bfloat16, block_tokens: int = 128) -> PrefillConfig:
    """Tiles of 128 rows: those of 64 read each key from L2 twice as often.

    Over packed keys 64 keys a tile: finer steps along the diagonal, three tiles in flight in 129 KiB. Under a prefix 128 keys: a block of
    the pool whole, half as many reads of the block table. In bench/results/prefill_attention.json "n32" and "n64" are other widths.
    Where blocks hold 64 tokens, 64 keys there too: a tile of 128 would lie in two places, out of TMA's reach.
    float32 goes without tensor cores (tests alone ask for it): tiles whose operands fit into registers.
    """
    if dtype == torch.float32:
        return PrefillConfig(block_rows=16, block_keys=16, num_stages=2, num_warps=8)
    if has_prefix and block_tokens != 64:
        return PrefillConfig(block_rows=128, block_keys=128, num_stages=2 if head_dim > 64 else 3, num_warps=8)
    return PrefillConfig(block_rows=128, block_keys=64, num_stages=3, num_warps=8)


def choose_way(q_THD: Tensor, *, tokens_each: int | None, has_prefix: bool) -> Way:
    """cuDNN where it takes the call and the caller says that lengths are equal. No value on the device is looked at."""
    if has_prefix or tokens_each is None or tokens_each < CUDNN_MIN_TOKENS:
        return "ours"
    return "cudnn" if takes(q_THD) else "ours"


def prefill_attention(
    q_THD: Tensor,
    k_TND: Tensor,
    v_TND: Tensor,
    cu_seqlens_S1: Tensor,
    *,
    scale: float,
    prefix: CachedPrefix | None = None,
    way: Way | None = None,
    tokens_each: int | None = None,
    config: PrefillConfig | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """q [T, H, D], k and v [T, N, D] (bf16; float16 and float32 too), cu_seqlens [S + 1] int32 on the device -> [T, H, D].

    v may be columns of a wider matrix (of the joined projection: nothing need be copied). scale > 0. Padding rows are not written.
    tokens_each: the caller's word that every sequence has exactly so many rows and no row is padding; then cuDNN may compute, reads no
    cu_seqlens, and copies its result where `out` is given. A config is for the kernel, and so chooses it.
    """
    num_tokens, num_heads, dim = q_THD.shape
    num_sequences = cu_seqlens_S1.shape[0] - 1
    _check_arguments(q_THD, k_TND, v_TND, cu_seqlens_S1, scale)
    assert tokens_each is None or tokens_each * num_sequences == num_tokens, f"{num_sequences} x {tokens_each} rows are not {num_tokens}"
    if way is None:
        way = "ours" if config is not None else choose_way(q_THD, tokens_each=tokens_each, has_prefix=prefix is not None)
    if way == "cudnn":
        assert prefix is None, "cuDNN's causal corner is the upper left: it takes no prefix"
        assert tokens_each is not None, "cuDNN takes equal lengths alone: say tokens_each"
        return equal_attention(q_THD, k_TND, v_TND, num_sequences, scale=scale, out=out)
    out_THD = torch.empty_like(q_THD) if out is None else out
    check("out", out_THD, q_THD.dtype, *q_THD.shape, device=q_THD.device)
    if num_tokens == 0 or num_sequences == 0:
        return out_THD
    block_tokens = 128 if prefix is None else prefix.pool.shape[3]
    config = config or default_config(dim, has_prefix=prefix is not None, dtype=q_THD.dtype, block_tokens=block_tokens)
    tiles = num_tokens // config.block_rows + min(num_tokens, num_sequences)  # each sequence has at most one tile that is not full
    _prefill_kernel[(tiles * num_heads,)](
        *_descriptors((q_THD, k_TND, v_TND), config),
        *(cu_seqlens_S1, *_prefix_arguments(prefix, q_THD, k_TND.shape[1], num_sequences, config)),
        *(out_THD, scale * LOG2_E, num_sequences, 0 if prefix is None else prefix.block_table_SB.shape[1]),
        H=num_heads,
        N=k_TND.shape[1],
        D=dim,
        BLOCK_TOKENS=config.block_keys if prefix is None else prefix.pool.shape[3],
        BLOCK_M=config.block_rows,
        BLOCK_N=config.block_keys,
        S_PAD=max(16, triton.next_power_of_2(num_sequences)),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **pdl_options(q_THD.device),
    )
    return out_THD


def _descriptors(packed: tuple[Tensor, Tensor, Tensor], config: PrefillConfig) -> list[TensorDescriptor]:
    """q, k and v as matrices [T, heads * D], read in tiles of one head."""
    dim, sizes = packed[0].shape[2], (config.block_rows, config.block_keys, config.block_keys)
    return [TensorDescriptor.from_tensor(x.view(x.shape[0], -1), [size, dim]) for x, size in zip(packed, sizes, strict=True)]


def _prefix_arguments(
    prefix: CachedPrefix | None, q_THD: Tensor, num_kv_heads: int, num_sequences: int, config: PrefillConfig
) -> tuple[Tensor | None, TensorDescriptor | None, Tensor | None, Tensor | None]:
    """Pool, its descriptor where a block holds whole tiles, block table and lengths."""
    if prefix is None:
        return None, None, None, None
    device, dim, pool = q_THD.device, q_THD.shape[2], prefix.pool
    check("prefix.pool", pool, q_THD.dtype, None, 2, num_kv_heads, None, dim, device=device)
    check("prefix.block_table", prefix.block_table_SB, torch.int32, num_sequences, None, device=device)
    check("prefix.lengths", prefix.lengths_S, torch.int32, num_sequences, device=device)
    block_tokens = pool.shape[3]
    assert block_tokens >= 16 and block_tokens & (block_tokens - 1) == 0, f"block tokens {block_tokens}: a power of two from 16 on"
    assert pool.numel() // dim < 2**31, "the pool has more rows than a descriptor's coordinate can say"
    by_tma = block_tokens % config.block_keys == 0
    desc = TensorDescriptor.from_tensor(pool.view(-1, dim), [config.block_keys, dim]) if by_tma else None
    return pool, desc, prefix.block_table_SB, prefix.lengths_S


def _check_arguments(q_THD: Tensor, k_TND: Tensor, v_TND: Tensor, cu_seqlens_S1: Tensor, scale: float) -> None:
    device, (num_tokens, num_heads, dim) = q_THD.device, q_THD.shape
    check("q", q_THD, q_THD.dtype, None, None, None)
    check("k", k_TND, q_THD.dtype, num_tokens, None, dim, device=device)
    is_like_k = v_TND.dtype == q_THD.dtype and v_TND.shape == k_TND.shape and v_TND.device == device
    assert is_like_k, f"v: {v_TND.dtype} {tuple(v_TND.shape)} on {v_TND.device}, expected {q_THD.dtype} {tuple(k_TND.shape)} on {device}"
    is_side_by_side = v_TND.stride()[1:] == (dim, 1) or not num_tokens
    is_addressable = v_TND.stride(0) * v_TND.element_size() % TMA_BYTES == 0 or num_tokens <= 1
    assert is_side_by_side and is_addressable, f"v: strides {v_TND.stride()}, expected heads side by side, rows at multiples of 16 bytes"
    check("cu_seqlens", cu_seqlens_S1, torch.int32, None, device=device)
    assert num_heads % k_TND.shape[1] == 0, f"{num_heads} query heads over {k_TND.shape[1]} kv heads"
    assert dim >= 16 and dim & (dim - 1) == 0, f"head dim {dim}: a power of two from 16 on"
    assert 1 <= cu_seqlens_S1.shape[0] <= MAX_SEQUENCES + 1, f"at most {MAX_SEQUENCES} sequences"
    assert scale > 0, f"scale {scale}: maxima are taken before it"
