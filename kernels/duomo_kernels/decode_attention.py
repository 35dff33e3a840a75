"""Owns attention of one query row a sequence over paged keys, by a plan that the device made. Knows no batch and no cut (decode_plan.py).

    out[s, h] = sum over j < lengths[s] of softmax_j(q[s, h] . k[j, h / G] * scale) v[j, h / G]; zeros where lengths[s] = 0

The pool of one layer is [blocks, 2 (k, v), kv heads N, block tokens, head dim D]; position j of sequence s lies in block
table[s, j / block_tokens]. Only positions under lengths[s] are read: neither later table entries nor later slots of the last block.

A program reads one run of tiles of one kv head, whatever sequences they belong to: one long sequence among short ones is spread over as
many programs as it is worth. It runs through them in one loop, whose copies do not pause where a sequence ends. Every warp has its own keys
of a tile and its own running softmax, so that warps meet where a piece ends and nowhere else. A sequence in one piece is written at once;
otherwise pieces leave (max, sum, sum of weighted values) in float32, added in the order of the pieces by the last program to arrive (an
integer ticket, which it sets back) or by a second kernel: the same bits in every run, since arrival decides only who adds.

A plan in chunks makes a sequence's bits depend on nothing but itself; its pieces are added by the second kernel. Otherwise they depend on
the lengths beside it (and on nothing else: the same call gives the same bits).

Legend: S sequences, H query heads, N kv heads, G = H / N, D head dim, W warps, K keys of a warp, R query heads of a merge, T tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from duomo_kernels._decode_pieces import MERGE_ROWS, DecodePlan, DecodeWorkspace, check_workspace, merge, merge_by_kernel
from duomo_kernels._launch import check, pdl_options, start_next, wait_for_previous
from duomo_kernels.decode_plan import check_plan

LOG2_E = 1.4426950408889634
LEAST = tl.constexpr(-1e30)  # below every score and finite: what has seen no key has no share
RECORDS = tl.constexpr(16)  # of tiles, a line of them, brought in beside a run's own


def decode_attention_reference(q_SHD: Tensor, pool: Tensor, block_table_SB: Tensor, lengths_S: Tensor, scale: float) -> Tensor:
    """Sequence by sequence in float64: [S, H, D]."""
    num_n, block_tokens = pool.shape[2], pool.shape[3]
    group = q_SHD.shape[1] // num_n
    out_SHD = torch.zeros(q_SHD.shape, dtype=torch.float64, device=q_SHD.device)
    for s, length in enumerate(lengths_S.tolist()):
        if length == 0:
            continue
        blocks = block_table_SB[s, : -(-length // block_tokens)].long()
        kv = pool[blocks].double().permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]
        q_NGD = q_SHD[s].double().view(num_n, group, -1)
        weights_NGL = torch.softmax(q_NGD @ kv[0].transpose(1, 2) * scale, -1)
        out_SHD[s] = (weights_NGL @ kv[1]).flatten(0, 1)
    return out_SHD


@triton.jit
def _load_tile(
    pool_ptr, blocks_ptr, at, head, live,
    N: tl.constexpr, D: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Keys [W, D, K] and values [W, K, D] of tile `at`; values are zeros where no key lives."""
    KEYS: tl.constexpr = BLOCK // WARPS
    lane_W, lane_K, lane_D = tl.arange(0, WARPS), tl.arange(0, KEYS), tl.arange(0, D)
    key_WK = lane_W[:, None] * KEYS + lane_K[None, :]
    at_WDK = lane_K[None, None, :] * D + lane_D[None, :, None]
    at_WKD = lane_K[None, :, None] * D + lane_D[None, None, :]
    if BLOCK_TOKENS >= KEYS:  # one block holds a warp's keys: one address for each warp, the rest is constant
        if BLOCK_TOKENS >= BLOCK:
            MANY: tl.constexpr = BLOCK_TOKENS // BLOCK
            part = tl.load(blocks_ptr + at)
            from_ptr = pool_ptr + (((part // MANY).to(tl.int64) * (2 * N) + head) * BLOCK_TOKENS + part % MANY * BLOCK) * D
            from_W = from_ptr + lane_W * (KEYS * D)
        else:
            block_W = tl.load(blocks_ptr + at * (BLOCK // BLOCK_TOKENS) + lane_W * KEYS // BLOCK_TOKENS)
            from_W = pool_ptr + ((block_W.to(tl.int64) * (2 * N) + head) * BLOCK_TOKENS + lane_W * KEYS % BLOCK_TOKENS) * D
        k_ptr = from_W[:, None, None] + at_WDK
        v_ptr = from_W[:, None, None] + N * BLOCK_TOKENS * D + at_WKD
    else:
        block_WK = tl.load(blocks_ptr + at * (BLOCK // BLOCK_TOKENS) + key_WK // BLOCK_TOKENS)
        from_WK = pool_ptr + ((block_WK.to(tl.int64) * (2 * N) + head) * BLOCK_TOKENS + key_WK % BLOCK_TOKENS) * D
        k_ptr = from_WK[:, None, :] + lane_D[None, :, None]
        v_ptr = from_WK[:, :, None] + N * BLOCK_TOKENS * D + lane_D[None, None, :]
    # no mask: what lies past the last key is in a block of the sequence, whatever it holds; scores are masked. Of values a NaN would stay,
    # and slots never written may hold one: a weight of zero does not silence it
    k_WDK = tl.load(k_ptr)
    v_WKD = tl.load(v_ptr, mask=(key_WK < live)[:, :, None], other=0.0)
    return k_WDK, v_WKD


@triton.jit
def _touch_tiles(
    pool_ptr, tiles_ptr, blocks_ptr, start, stop, head,
    N: tl.constexpr, D: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK: tl.constexpr, TOUCH: tl.constexpr,
):  # fmt: skip
    """Bring a run's first tiles into L2, one load every 64 bytes, whose value nobody needs."""
    BLOCKS: tl.constexpr = BLOCK // BLOCK_TOKENS if BLOCK > BLOCK_TOKENS else 1
    MANY: tl.constexpr = BLOCK_TOKENS // BLOCK if BLOCK_TOKENS > BLOCK else 1
    row_R = tl.arange(0, TOUCH * BLOCK)
    at_R = start + row_R // BLOCK
    key_R = row_R % BLOCK
    live_R = tl.load(tiles_ptr + at_R, mask=at_R < stop, other=0, cache_modifier=".cg") & 1023
    is_live_R = key_R < live_R
    part_R = tl.load(blocks_ptr + at_R * BLOCKS + key_R // BLOCK_TOKENS % BLOCKS, mask=is_live_R, other=0, cache_modifier=".cg")
    key_R = part_R % MANY * BLOCK + key_R % BLOCK_TOKENS
    from_R = pool_ptr + (((part_R // MANY).to(tl.int64) * (2 * N) + head) * BLOCK_TOKENS + key_R) * D
    from_RD = from_R[:, None] + tl.arange(0, D // 32 if D > 32 else 1)[None, :] * 32
    tl.load(from_RD, mask=is_live_R[:, None], volatile=True)  # volatile, or the compiler drops it
    tl.load(from_RD + N * BLOCK_TOKENS * D, mask=is_live_R[:, None], volatile=True)


@triton.jit
def _lower_rows(x_WGX):
    """The first half of the query heads: of an mma's 16 rows, those that a group of 8 or fewer fills. No element leaves its register."""
    W: tl.constexpr = x_WGX.shape[0]
    G: tl.constexpr = x_WGX.shape[1]
    X: tl.constexpr = x_WGX.shape[2]
    lower, _ = tl.split(x_WGX.reshape(W, 2, G // 2, X).permute(0, 2, 3, 1))
    return lower


@triton.jit
def _halves(x_WGD):
    """The lower and the upper half of the columns. No element leaves its register."""
    W: tl.constexpr = x_WGD.shape[0]
    G: tl.constexpr = x_WGD.shape[1]
    D: tl.constexpr = x_WGD.shape[2]
    return tl.split(x_WGD.reshape(W, G, 2, D // 2).permute(0, 1, 3, 2))


@triton.jit
def _beside(lower_GD, upper_GD):
    G: tl.constexpr = lower_GD.shape[0]
    D: tl.constexpr = lower_GD.shape[1]
    return tl.join(lower_GD, upper_GD).permute(0, 2, 1).reshape(G, 2 * D)


@triton.jit
def _add_warps(x_WGD):
    """The sum over warps [G, D], a quarter of the columns at a time: warps meet in shared memory, which copies fill."""
    lower, upper = _halves(x_WGD)
    a, b = _halves(lower)
    c, d = _halves(upper)
    return _beside(_beside(tl.sum(a, 0), tl.sum(b, 0)), _beside(tl.sum(c, 0), tl.sum(d, 0)))


@triton.jit
def _join_warps(top_WG, sum_WGK, acc_WGD, G: tl.constexpr):
    """What the warps have of a piece, together: max, sum and acc of G query heads, padded."""
    ROWS: tl.constexpr = acc_WGD.shape[1]
    W: tl.constexpr = acc_WGD.shape[0]
    sum_WG = tl.sum(sum_WGK, 2)
    if G * 2 <= ROWS:
        top_WG = tl.reshape(_lower_rows(top_WG[:, :, None]), (W, ROWS // 2))
        sum_WG = tl.reshape(_lower_rows(sum_WG[:, :, None]), (W, ROWS // 2))
        acc_WGD = _lower_rows(acc_WGD)
    top_G = tl.max(top_WG, 0)
    share_WG = tl.exp2(top_WG - top_G[None, :])
    sum_G = tl.sum(sum_WG * share_WG, 0)
    return top_G, sum_G, _add_warps(acc_WGD * share_WG[:, :, None])


@triton.jit
def _add_pieces(
    out_ptr, acc_ptr, max_ptr, sum_ptr, tickets_ptr, run_ptr, head,
    N: tl.constexpr, G: tl.constexpr, D: tl.constexpr, PIECES: tl.constexpr, MERGE_ROWS: tl.constexpr,
):  # fmt: skip
    """Tickets of a run's first and last sequence, the only ones that others share, and the sum of those whose pieces are then all there."""
    lane_E = tl.arange(0, 2)  # the first, then the last: both tickets in one round trip
    seq_E = tl.load(run_ptr + 2 + lane_E * 3)
    count_E = tl.load(run_ptr + 4 + lane_E * 3)
    if tl.max(count_E, 0) > 1:
        tl.debug_barrier()  # every thread's part is written before one thread takes a ticket for all
        ticket_E = tl.atomic_add(tickets_ptr + seq_E * N + head, 1, mask=count_E > 1, sem="acq_rel", scope="gpu")
        is_ours_E = ((count_E > 1) & (ticket_E == count_E - 1)).to(tl.int32)
        for end in range(2):
            if tl.max(tl.where(lane_E == end, is_ours_E, 0), 0) > 0:
                item = tl.load(run_ptr + 2 + end * 3) * N + head
                slot = tl.load(run_ptr + 3 + end * 3)
                count = tl.load(run_ptr + 4 + end * 3)
                tl.store(tickets_ptr + item, 0)
                lane_R = tl.arange(0, MERGE_ROWS)
                out_RD = merge(acc_ptr, max_ptr, sum_ptr, slot, count, head, lane_R, N, G, D, PIECES)
                at_RD = (item.to(tl.int64) * G + lane_R)[:, None] * D + tl.arange(0, D)[None, :]
                tl.store(out_ptr + at_RD, out_RD.to(out_ptr.dtype.element_ty), mask=lane_R[:, None] < G)


@triton.jit
def _decode_kernel(
    q_ptr,
    pool_ptr,
    words_ptr,
    tiles_ptr,
    blocks_ptr,
    runs_ptr,
    out_ptr,
    acc_ptr,
    max_ptr,
    sum_ptr,
    tickets_ptr,
    scale_log2,
    N: tl.constexpr,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    WARPS: tl.constexpr,
    PIECES: tl.constexpr,
    MERGE_ROWS: tl.constexpr,
    HAS_TICKETS: tl.constexpr,
    IS_SETTLED: tl.constexpr,
    TOUCH: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    KEYS: tl.constexpr = BLOCK // WARPS
    lane_G = tl.arange(0, ROWS)
    lane_D = tl.arange(0, D)
    in_G = lane_G < G
    head = tl.program_id(0) % N  # heads side by side: what lies side by side in a block is read at one time
    run_ptr = runs_ptr + tl.program_id(0) // N * 8
    if not IS_SETTLED:
        wait_for_previous(USE_PDL)
    start = tl.load(run_ptr, cache_modifier=".cg")  # before the wait L1 may hold the line of an earlier step
    stop = tl.load(run_ptr + 1, cache_modifier=".cg")
    if IS_SETTLED:
        touch_T = start + tl.arange(0, RECORDS)
        tl.load(words_ptr + touch_T, mask=touch_T < stop, volatile=True)
        if TOUCH > 0:
            _touch_tiles(pool_ptr, tiles_ptr, blocks_ptr, start, stop, head, N, D, BLOCK_TOKENS, BLOCK, TOUCH)
        wait_for_previous(USE_PDL)
    start_next(USE_PDL)
    top_WG = tl.full((WARPS, ROWS), LEAST, tl.float32)
    sum_WGK = tl.zeros((WARPS, ROWS, KEYS), tl.float32)
    acc_WGD = tl.zeros((WARPS, ROWS, D), tl.float32)
    for at in range(start, stop):  # one loop over all sequences: the next one's copies are under way while a piece is stored
        ahead = tl.load(tiles_ptr + at)
        from_GD = ((ahead >> 10) * N + head).to(tl.int64) * (G * D) + lane_G[:, None] * D + lane_D[None, :]
        q_GD = tl.load(q_ptr + from_GD, mask=in_G[:, None], other=0.0)
        k_WDK, v_WKD = _load_tile(pool_ptr, blocks_ptr, at, head, ahead & 1023, N, D, BLOCK_TOKENS, BLOCK, WARPS)
        word = tl.load(words_ptr + at)  # the same and the mark again, when the tile is there: nothing is held from stage to stage
        mark = word.to(tl.int32)
        live_WK = tl.arange(0, WARPS)[:, None] * KEYS + tl.arange(0, KEYS)[None, :] < (word >> 32).to(tl.int32) & 1023
        q_WGD = tl.broadcast_to(q_GD[None, :, :], (WARPS, ROWS, D))
        score_WGK = tl.where(live_WK[:, None, :], tl.dot(q_WGD, k_WDK) * scale_log2, float("-inf"))
        new_top_WG = tl.maximum(top_WG, tl.max(score_WGK, 2))
        shrink_WG = tl.exp2(top_WG - new_top_WG)
        weight_WGK = tl.exp2(score_WGK - new_top_WG[:, :, None])
        sum_WGK = sum_WGK * shrink_WG[:, :, None] + weight_WGK
        acc_WGD = tl.dot(weight_WGK.to(v_WKD.dtype), v_WKD, acc_WGD * shrink_WG[:, :, None])
        top_WG = new_top_WG
        if mark > 0:
            top_G, sum_G, acc_GD = _join_warps(top_WG, sum_WGK, acc_WGD, G)
            row_G = tl.arange(0, acc_GD.shape[0])
            in_out_G = row_G < G
            if mark == 1:
                out_GD = acc_GD / tl.where(sum_G > 0, sum_G, 1.0)[:, None]  # no key: zeros
                at_GD = (((word >> 42) * N + head) * G + row_G)[:, None] * D + lane_D[None, :]
                tl.store(out_ptr + at_GD, out_GD.to(out_ptr.dtype.element_ty), mask=in_out_G[:, None])
            else:
                at_G = ((mark - 2).to(tl.int64) * N + head) * G + row_G
                tl.store(max_ptr + at_G, top_G, mask=in_out_G)
                tl.store(sum_ptr + at_G, sum_G, mask=in_out_G)
                tl.store(acc_ptr + at_G[:, None] * D + lane_D[None, :], acc_GD, mask=in_out_G[:, None])
            top_WG = tl.full((WARPS, ROWS), LEAST, tl.float32)
            sum_WGK = tl.zeros((WARPS, ROWS, KEYS), tl.float32)
            acc_WGD = tl.zeros((WARPS, ROWS, D), tl.float32)
    if HAS_TICKETS:  # outside the loop, whose pipeline a barrier or a loop inside would end
        _add_pieces(out_ptr, acc_ptr, max_ptr, sum_ptr, tickets_ptr, run_ptr, head, N, G, D, PIECES, MERGE_ROWS)


def decode_attention(
    q_SHD: Tensor,
    pool: Tensor,
    plan: DecodePlan,
    *,
    scale: float,
    workspace: DecodeWorkspace,
    is_settled: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """q [S, H, D], pool [blocks, 2, N, block tokens, D] of its dtype and the plan of this step's lengths and blocks -> [S, H, D].

    is_settled: the caller's word that a kernel stands between the plan and this call that waited for those before it and only then let the
    next one start (qk_rope_write and the norms do, a gate and the experts' products need not): the plan had ended when that one passed its
    wait. It is then read, and first tiles are touched, while the kernel just before still runs.
    Calls that share a workspace must follow each other on one stream.
    """
    device, shape, config = q_SHD.device, plan.shape, plan.config
    _check_arguments(q_SHD, pool, plan)
    check_workspace(workspace, shape, config, device)
    out_SHD = torch.empty_like(q_SHD) if out is None else out
    check("out", out_SHD, q_SHD.dtype, *q_SHD.shape, device=device)
    if shape.num_sequences == 0:
        return out_SHD
    group = shape.num_heads // shape.num_kv_heads
    rows = triton.next_power_of_2(group)
    by_kernel = config.merge == "kernel" or shape.chunk_tokens is not None  # a run may hold chunks of many sequences
    room = (workspace.acc_UNGD, workspace.max_UNG, workspace.sum_UNG)
    _decode_kernel[(plan.runs_C8.shape[0] * shape.num_kv_heads,)](
        *(q_SHD, pool, plan.words_T, plan.tiles_T, plan.blocks_TB, plan.runs_C8, out_SHD, *room, workspace.tickets_SN),
        scale * LOG2_E,
        N=shape.num_kv_heads,
        G=group,
        ROWS=max(16, rows),
        D=shape.head_dim,
        BLOCK_TOKENS=shape.block_tokens,
        BLOCK=config.block_keys,
        WARPS=config.num_warps,
        PIECES=max(1, MERGE_ROWS // rows),
        MERGE_ROWS=rows,
        HAS_TICKETS=not by_kernel,
        IS_SETTLED=is_settled,
        TOUCH=config.touch,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **pdl_options(device),
    )
    if by_kernel:
        merge_by_kernel(plan, workspace, out_SHD)
    return out_SHD


def _check_arguments(q_SHD: Tensor, pool: Tensor, plan: DecodePlan) -> None:
    device, shape = q_SHD.device, plan.shape
    check("q", q_SHD, q_SHD.dtype, shape.num_sequences, shape.num_heads, shape.head_dim)
    check("pool", pool, q_SHD.dtype, None, 2, shape.num_kv_heads, shape.block_tokens, shape.head_dim, device=device)
    check_plan(plan, device)
    assert shape.num_heads % shape.num_kv_heads == 0, f"{shape.num_heads} query heads over {shape.num_kv_heads} kv heads"
    for name, size in (("head dim", shape.head_dim), ("block tokens", shape.block_tokens)):
        assert size >= 16 and size & (size - 1) == 0, f"{name} {size}: a power of two from 16 on"
