"""Owns attention of one query row a sequence over paged keys, cut by the device so that every multiprocessor reads as much. Knows no batch.

    out[s, h] = sum over j < lengths[s] of softmax_j(q[s, h] . k[j, h / G] * scale) v[j, h / G]; zeros where lengths[s] = 0

The pool of one layer is [blocks, 2 (k, v), kv heads N, block tokens, head dim D]; position j of sequence s lies in block
table[s, j / block_tokens]. Only positions under lengths[s] are read: neither later table entries nor later slots of the last block.

The work is a row of tiles: items (sequence, kv head) one after another, each ceil(length / BLOCK) tiles. Every program takes an equal run
of it, whatever the lengths, so one long sequence among short ones is spread over as many programs as it is worth. What a program reads of
an item is a piece. An item in one piece is written at once; otherwise pieces leave (max, sum, sum of weighted values) in float32, added in
the order of the pieces by the last program to arrive (an integer ticket, which it sets back) or by a second kernel: the same bits in every
run, since arrival decides only who adds. A program runs through its tiles in one loop, whose copies do not pause where an item ends.

With `chunk_tokens` pieces are cut there instead, belong to the program in whose run they begin and are added by the second kernel: a
sequence's bits then depend on nothing but itself. Without it they depend on the lengths beside it (and on nothing else: the same call
gives the same bits).

Legend: S sequences, H query heads, N kv heads, G = H / N, D head dim, P programs, U pieces.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from duomo_kernels._decode_pieces import (
    MERGE_ROWS,
    DecodeConfig,
    DecodeShape,
    DecodeWorkspace,
    check_workspace,
    chunk_start,
    item_ends,
    locate,
    merge,
    merge_kernel,
    pieces,
    run_start,
)
from duomo_kernels._launch import check, num_sms, pdl_options, start_next, wait_for_previous

LOG2_E = 1.4426950408889634
MAX_SEQUENCES = 4096  # lengths that a program holds in registers: 32 a thread


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
    pool_ptr, table_row_ptr, head, tile, length, N: tl.constexpr, D: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK: tl.constexpr
):
    """Which keys of an item's tile live, keys [D, BLOCK] and values [BLOCK, D]."""
    lane_L = tl.arange(0, BLOCK)
    lane_D = tl.arange(0, D)
    key_L = tile * BLOCK + lane_L
    live_L = key_L < length
    if BLOCK_TOKENS >= BLOCK:  # one block holds the tile: one scalar address, the rest is constant
        block = tl.load(table_row_ptr + tile * BLOCK // BLOCK_TOKENS)
        from_ptr = pool_ptr + ((block.to(tl.int64) * (2 * N) + head) * BLOCK_TOKENS + tile * BLOCK % BLOCK_TOKENS) * D
        row_L = lane_L * D
    else:
        block_L = tl.load(table_row_ptr + key_L // BLOCK_TOKENS, mask=live_L, other=0)
        from_ptr = pool_ptr
        row_L = ((block_L.to(tl.int64) * (2 * N) + head) * BLOCK_TOKENS + key_L % BLOCK_TOKENS) * D
    k_DL = tl.load(from_ptr + row_L[None, :] + lane_D[:, None], mask=live_L[None, :], other=0.0)
    v_LD = tl.load(from_ptr + N * BLOCK_TOKENS * D + row_L[:, None] + lane_D[None, :], mask=live_L[:, None], other=0.0)
    return live_L, k_DL, v_LD


@triton.jit
def _add_pieces(
    out_ptr, acc_ptr, max_ptr, sum_ptr, tickets_ptr, start, stop, total, programs, ends_S, keys_S,
    N: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr, MERGE_ROWS: tl.constexpr,
):  # fmt: skip
    """Tickets of a run's first and last item, the only ones that others share, and the sum of those whose pieces are then all there."""
    seq, head, begin, tiles, _ = locate(stop - 1, ends_S, keys_S, N, BLOCK)
    last_item = seq * N + head
    last_slot, last_count = pieces(last_item, begin, tiles, total, programs, 0)
    seq, head, begin, tiles, _ = locate(start, ends_S, keys_S, N, BLOCK)
    item = seq * N + head
    slot, count = pieces(item, begin, tiles, total, programs, 0)
    lane_E = tl.arange(0, 2)  # the first item, then the last where it is another: both tickets in one round trip
    item_E = tl.where(lane_E == 0, item, last_item)
    count_E = tl.where(lane_E == 0, count, tl.where(item != last_item, last_count, 0))
    is_due_E = count_E > 1
    tl.debug_barrier()  # every thread's part is written before one thread takes a ticket for all
    ticket_E = tl.atomic_add(tickets_ptr + item_E, 1, mask=is_due_E, sem="acq_rel", scope="gpu")
    is_ours_E = (is_due_E & (ticket_E == count_E - 1)).to(tl.int32)
    for end in range(2):
        if tl.max(tl.where(lane_E == end, is_ours_E, 0), 0) > 0:
            item = tl.where(end == 0, item, last_item)
            slot = tl.where(end == 0, slot, last_slot)
            count = tl.where(end == 0, count, last_count)
            tl.store(tickets_ptr + item, 0)
            lane_R = tl.arange(0, MERGE_ROWS)
            out_RD = merge(acc_ptr, max_ptr, sum_ptr, slot, count, lane_R, G, D, PIECES)
            at_RD = (item.to(tl.int64) * G + lane_R)[:, None] * D + tl.arange(0, D)[None, :]
            tl.store(out_ptr + at_RD, out_RD.to(out_ptr.dtype.element_ty), mask=lane_R[:, None] < G)


@triton.jit
def _decode_kernel(
    q_ptr,
    pool_ptr,
    table_ptr,
    lengths_ptr,
    out_ptr,
    acc_ptr,
    max_ptr,
    sum_ptr,
    tickets_ptr,
    scale_log2,
    num_sequences,
    max_blocks,
    N: tl.constexpr,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    S_PAD: tl.constexpr,
    CHUNK_TILES: tl.constexpr,
    PIECES: tl.constexpr,
    MERGE_ROWS: tl.constexpr,
    HAS_TICKETS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    lane_G = tl.arange(0, ROWS)
    lane_D = tl.arange(0, D)
    in_G = lane_G < G
    pid = tl.program_id(0)
    wait_for_previous(USE_PDL)
    ends_S, keys_S = item_ends(lengths_ptr, num_sequences, N, BLOCK, S_PAD)
    start_next(USE_PDL)
    total = tl.max(ends_S, 0)
    programs = tl.minimum(tl.num_programs(0), total)  # every program that takes part has a tile
    start = tl.minimum(run_start(pid, total, programs), total)
    stop = tl.minimum(run_start(pid + 1, total, programs), total)
    if CHUNK_TILES > 0:
        start = chunk_start(start, total, ends_S, keys_S, N, BLOCK, CHUNK_TILES)
        stop = chunk_start(stop, total, ends_S, keys_S, N, BLOCK, CHUNK_TILES)
    top_G = tl.full((ROWS,), float("-inf"), tl.float32)
    sum_GL = tl.zeros((ROWS, BLOCK), tl.float32)
    acc_GD = tl.zeros((ROWS, D), tl.float32)
    for at in range(start, stop):  # one loop over all items: the next one's copies are under way while a piece is stored
        seq, head, begin, tiles, length = locate(at, ends_S, keys_S, N, BLOCK)
        tile = at - begin
        item = seq * N + head
        at_GD = item.to(tl.int64) * G * D + lane_G[:, None] * D + lane_D[None, :]
        q_GD = tl.load(q_ptr + at_GD, mask=in_G[:, None], other=0.0)
        table_row_ptr = table_ptr + seq.to(tl.int64) * max_blocks
        live_L, k_DL, v_LD = _load_tile(pool_ptr, table_row_ptr, head, tile, length, N, D, BLOCK_TOKENS, BLOCK)
        score_GL = tl.where(live_L[None, :], tl.dot(q_GD, k_DL) * scale_log2, float("-inf"))
        new_top_G = tl.maximum(top_G, tl.max(score_GL, 1))  # finite: the first key of every tile lives
        shrink_G = tl.exp2(top_G - new_top_G)
        weight_GL = tl.exp2(score_GL - new_top_G[:, None])
        sum_GL = sum_GL * shrink_G[:, None] + weight_GL
        acc_GD = tl.dot(weight_GL.to(v_LD.dtype), v_LD, acc_GD * shrink_G[:, None])
        top_G = new_top_G
        if CHUNK_TILES > 0:
            is_last = (tile + 1 == tiles) | ((tile + 1) % CHUNK_TILES == 0)
            is_whole = tiles <= CHUNK_TILES
        else:
            is_last = (tile + 1 == tiles) | (at + 1 == stop)
            is_whole = (tile + 1 == tiles) & (begin >= start)
        if is_last:
            sum_G = tl.sum(sum_GL, 1)
            if is_whole:
                tl.store(out_ptr + at_GD, (acc_GD / sum_G[:, None]).to(out_ptr.dtype.element_ty), mask=in_G[:, None])
            else:
                slot, count = pieces(item, begin, tiles, total, programs, CHUNK_TILES)
                if CHUNK_TILES > 0:
                    mine = slot + tile // CHUNK_TILES
                else:
                    mine = item + pid
                at_G = mine.to(tl.int64) * G + lane_G
                tl.store(max_ptr + at_G, top_G, mask=in_G)
                tl.store(sum_ptr + at_G, sum_G, mask=in_G)
                tl.store(acc_ptr + at_G[:, None] * D + lane_D[None, :], acc_GD, mask=in_G[:, None])
            top_G = tl.full((ROWS,), float("-inf"), tl.float32)
            sum_GL = tl.zeros((ROWS, BLOCK), tl.float32)
            acc_GD = tl.zeros((ROWS, D), tl.float32)
    if HAS_TICKETS and start < stop:  # outside the loop, whose pipeline a barrier or a loop inside would end
        _add_pieces(
            out_ptr,
            acc_ptr,
            max_ptr,
            sum_ptr,
            tickets_ptr,
            start,
            stop,
            total,
            programs,
            ends_S,
            keys_S,
            N,
            G,
            D,
            BLOCK,
            PIECES,
            MERGE_ROWS,
        )
    for seq in range(pid, num_sequences, tl.num_programs(0)):
        if tl.load(lengths_ptr + seq) == 0:
            for head in range(N):
                at_GD = ((seq * N + head) * G + lane_G.to(tl.int64))[:, None] * D + lane_D[None, :]
                tl.store(out_ptr + at_GD, tl.zeros((ROWS, D), out_ptr.dtype.element_ty), mask=in_G[:, None])


def decode_attention(
    q_SHD: Tensor,
    pool: Tensor,
    block_table_SB: Tensor,
    lengths_S: Tensor,
    *,
    scale: float,
    workspace: DecodeWorkspace,
    chunk_tokens: int | None = None,
    config: DecodeConfig | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """q [S, H, D], pool [blocks, 2, N, block tokens, D] of its dtype, block_table [S, B] and lengths [S] int32 -> [S, H, D].

    chunk_tokens (a whole number of tiles) makes a sequence's bits independent of its company. Calls that share a workspace must follow each
    other on one stream.
    """
    device, shape = q_SHD.device, _shape_of(q_SHD, pool, block_table_SB, chunk_tokens)
    config = config or shape.config(device)
    _check_arguments(q_SHD, pool, block_table_SB, lengths_S)
    check_workspace(workspace, shape, config, device)
    out_SHD = torch.empty_like(q_SHD) if out is None else out
    check("out", out_SHD, q_SHD.dtype, *q_SHD.shape, device=device)
    if shape.num_sequences == 0:
        return out_SHD
    group, programs = shape.num_heads // shape.num_kv_heads, config.programs_per_sm * num_sms(device)
    rows = triton.next_power_of_2(group)
    by_kernel = config.merge == "kernel" or chunk_tokens is not None  # a run may hold chunks of many items
    layout = {
        "N": shape.num_kv_heads,
        "G": group,
        "D": shape.head_dim,
        "BLOCK": config.block_keys,
        "S_PAD": max(16, triton.next_power_of_2(shape.num_sequences)),
        "CHUNK_TILES": 0 if chunk_tokens is None else chunk_tokens // config.block_keys,
    }
    room = (workspace.acc_UGD, workspace.max_UG, workspace.sum_UG)
    _decode_kernel[(programs,)](
        *(q_SHD, pool, block_table_SB, lengths_S, out_SHD, *room, workspace.tickets),
        *(scale * LOG2_E, shape.num_sequences, shape.max_blocks),
        **layout,
        ROWS=max(16, rows),
        BLOCK_TOKENS=shape.block_tokens,
        PIECES=max(1, MERGE_ROWS // rows),
        MERGE_ROWS=rows,
        HAS_TICKETS=not by_kernel,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **pdl_options(device),
    )
    if by_kernel:
        merge_kernel[(shape.num_sequences * shape.num_heads,)](
            *(lengths_S, out_SHD, *room, shape.num_sequences, programs),
            **layout,
            PIECES=MERGE_ROWS,
            num_warps=4,
            **pdl_options(device),
        )
    return out_SHD


def _shape_of(q_SHD: Tensor, pool: Tensor, block_table_SB: Tensor, chunk_tokens: int | None) -> DecodeShape:
    return DecodeShape(
        num_sequences=q_SHD.shape[0],
        num_heads=q_SHD.shape[1],
        num_kv_heads=pool.shape[2],
        head_dim=q_SHD.shape[2],
        block_tokens=pool.shape[3],
        max_blocks=block_table_SB.shape[1],
        chunk_tokens=chunk_tokens,
    )


def _check_arguments(q_SHD: Tensor, pool: Tensor, block_table_SB: Tensor, lengths_S: Tensor) -> None:
    device, (num_sequences, num_heads, dim) = q_SHD.device, q_SHD.shape
    check("q", q_SHD, q_SHD.dtype, None, None, None)
    check("pool", pool, q_SHD.dtype, None, 2, None, None, dim, device=device)
    check("block_table", block_table_SB, torch.int32, num_sequences, None, device=device)
    check("lengths", lengths_S, torch.int32, num_sequences, device=device)
    assert num_heads % pool.shape[2] == 0, f"{num_heads} query heads over {pool.shape[2]} kv heads"
    assert num_sequences <= MAX_SEQUENCES, f"{num_sequences} sequences, at most {MAX_SEQUENCES}"
    for name, size in (("head dim", dim), ("block tokens", pool.shape[3])):
        assert size >= 16 and size & (size - 1) == 0, f"{name} {size}: a power of two from 16 on"
