"""Owns a gate's call for thousands of tokens: choose, sum histograms, place. Knows no groups, bias, capacity nor barrier.

Choose writes, beside weights and ids, how many of its own rows chose the same expert before (nth_TK, a byte) and its histogram; one small
kernel turns histograms into sums before each program; placing is then a lookup and a sum for each choice, no order is found twice.

A program holds rows as [T, 4, W]: column c = s * W + w. Triton gives the last axis to neighbouring lanes, four columns each, then the first
to the other lanes and warps, the second to a thread's registers: a warp works on several rows at once, a maximum costs few shuffles.
The four columns of one w share a word, a byte each: a histogram or a count of earlier rows is one integer sum for four columns.

Legend: T rows of a program, P programs, C columns (a power of two, column c is expert c), W = C / 4, E experts, K experts a token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._gate_choice import HIGH_HALF, LOWEST, high_half, ordered, valid_rows, value_of
from ._gate_order import write_summary, write_tiles
from ._launch import start_next, wait_for_previous


@triton.jit
def _row_max(x_TSW):
    return tl.max(tl.max(x_TSW, 1), 1)


@triton.jit(do_not_specialize=["num_tokens"])
def choose_many_kernel(
    logits_ptr, num_valid_ptr, weights_ptr, ids_ptr, nth_ptr, hist_ptr, num_tokens,
    E: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
    IS_BF16: tl.constexpr, IS_SIGMOID: tl.constexpr, NORMALISE: tl.constexpr, SCALE: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    W: tl.constexpr = C // 4
    program = tl.program_id(0)
    row_T = program * T + tl.arange(0, T)
    byte_S = tl.arange(0, 4)
    column_TSW = tl.broadcast_to(byte_S[None, :, None] * W + tl.arange(0, W)[None, None, :], (T, 4, W))
    is_expert_TSW = column_TSW < E
    wait_for_previous(USE_PDL)
    start_next(USE_PDL)
    valid = valid_rows(num_valid_ptr, num_tokens)
    is_read_TSW = is_expert_TSW & (row_T < valid)[:, None, None]
    logits_TSW = tl.load(logits_ptr + (row_T.to(tl.int64)[:, None, None] * E + column_TSW), mask=is_read_TSW, other=0).to(tl.float32)
    key_TSW = ordered(logits_TSW)
    if IS_BF16:  # the value's 16 bits above, the column below: one maximum finds both
        key_TSW = (key_TSW & HIGH_HALF) | (65535 - column_TSW)
    key_TSW = tl.where(is_expert_TSW, tl.maximum(key_TSW, LOWEST + 1), LOWEST)
    k_of = tl.arange(0, K_PAD)[None, :]
    ids_TK = tl.zeros((T, K_PAD), tl.int32)
    value_TK = tl.zeros((T, K_PAD), tl.float32)
    sum_T = tl.zeros((T,), tl.float32)
    for k in tl.static_range(K):
        best_T = _row_max(key_TSW)
        if IS_BF16:
            column_T = 65535 - (best_T & 65535)
            key_TSW = tl.where(key_TSW == best_T[:, None, None], LOWEST, key_TSW)
            value_T = high_half(value_of(best_T & HIGH_HALF))
        else:
            column_T = tl.min(tl.min(tl.where(key_TSW == best_T[:, None, None], column_TSW, C), 1), 1)
            key_TSW = tl.where(column_TSW == column_T[:, None, None], LOWEST, key_TSW)
            value_T = value_of(best_T)
        if k == 0:
            peak_T = value_T
        sum_T += 1 / (1 + tl.exp(-value_T)) if IS_SIGMOID else tl.exp(value_T - peak_T)  # in choose()'s order: the same bits
        ids_TK = tl.where(k_of == k, column_T[:, None], ids_TK)
        value_TK = tl.where(k_of == k, value_T[:, None], value_TK)
    if IS_SIGMOID:
        score_TK = 1 / (1 + tl.exp(-value_TK))
    else:
        score_TK = tl.exp(value_TK - peak_T[:, None])
    weight_TK = score_TK * SCALE
    if NORMALISE:  # 1e-20 as DeepSeek-V3: no division by zero where every chosen score underflows
        weight_TK = weight_TK / (sum_T + 1e-20)[:, None]
    elif not IS_SIGMOID:
        exp_TSW = tl.where(is_expert_TSW, tl.exp(logits_TSW - peak_T[:, None, None]), 0.0)
        weight_TK = weight_TK / tl.sum(tl.sum(exp_TSW, 1), 1)[:, None]
    at_TK = row_T.to(tl.int64)[:, None] * K + k_of
    is_at_TK = (row_T < num_tokens)[:, None] & (k_of < K)
    tl.store(weights_ptr + at_TK, tl.where((row_T < valid)[:, None], weight_TK, 0.0), mask=is_at_TK)
    tl.store(ids_ptr + at_TK, ids_TK, mask=is_at_TK)
    # Won: an expert's key that fell to the lowest.
    is_won_TSW = is_read_TSW & (key_TSW == LOWEST)
    word_TW = tl.sum(is_won_TSW.to(tl.int32) << (byte_S * 8)[None, :, None], 1)
    nth_TW = tl.cumsum(word_TW, 0) - word_TW
    nth_TK = (tl.gather(nth_TW, ids_TK % W, 1) >> (ids_TK // W * 8)) & 255
    tl.store(nth_ptr + at_TK, nth_TK.to(tl.uint8), mask=is_at_TK)
    tl.store(hist_ptr + program * W + tl.arange(0, W), tl.sum(word_TW, 0))


@triton.jit(do_not_specialize=["num_programs"])
def sum_before_kernel(
    hist_ptr, before_ptr, num_programs, C: tl.constexpr, STEP: tl.constexpr, WORDS: tl.constexpr, USE_PDL: tl.constexpr
):  # fmt: skip
    """before [num_programs + 1, C] int32 from hist [num_programs, W] words of four bytes; the last row holds the totals."""
    W: tl.constexpr = C // 4
    w = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    shift = tl.arange(0, 4) * 8
    column_WS = w[:, None] + tl.arange(0, 4)[None, :] * W
    wait_for_previous(USE_PDL)
    start_next(USE_PDL)
    seen_WS = tl.zeros((WORDS, 4), tl.int32)
    for first in range(0, num_programs, STEP):
        p = first + tl.arange(0, STEP)
        word_PW = tl.load(hist_ptr + p[:, None] * W + w[None, :], mask=(p < num_programs)[:, None], other=0)
        count_PWS = (word_PW[:, :, None] >> shift[None, None, :]) & 255
        before_PWS = tl.cumsum(count_PWS, 0) - count_PWS + seen_WS[None, :, :]
        at_PWS = p.to(tl.int64)[:, None, None] * C + column_WS[None, :, :]
        tl.store(before_ptr + at_PWS, before_PWS, mask=(p < num_programs)[:, None, None])
        seen_WS += tl.sum(count_PWS, 0)
    tl.store(before_ptr + num_programs.to(tl.int64) * C + column_WS, seen_WS)


@triton.jit(do_not_specialize=["num_tokens", "num_programs"])
def place_many_kernel(
    ids_ptr, nth_ptr, num_valid_ptr, counts_ptr, offsets_ptr, routed_ptr, place_ptr, tiles_ptr, num_tiles_ptr, before_ptr,
    num_tokens, num_programs,
    E: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, T: tl.constexpr, C: tl.constexpr, TILE_ROWS: tl.constexpr,
    USE_PDL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    expert_C = tl.arange(0, C)
    row_T = program * T + tl.arange(0, T)
    wait_for_previous(USE_PDL)
    start_next(USE_PDL)
    valid = valid_rows(num_valid_ptr, num_tokens)
    num_routed = num_tokens * K
    k_of = tl.arange(0, K_PAD)[None, :]
    index_TK = row_T[:, None] * K + k_of
    is_index_TK = (row_T < num_tokens)[:, None] & (k_of < K)
    ids_TK = tl.load(ids_ptr + index_TK.to(tl.int64), mask=is_index_TK, other=0)
    nth_TK = tl.load(nth_ptr + index_TK.to(tl.int64), mask=is_index_TK, other=0).to(tl.int32)
    before_TK = tl.load(before_ptr + (program.to(tl.int64) * C + ids_TK), mask=is_index_TK, other=0)
    total_C = tl.load(before_ptr + (num_programs.to(tl.int64) * C + expert_C))
    offset_C = tl.cumsum(total_C, 0) - total_C
    offset_TK = tl.reshape(tl.gather(offset_C, tl.reshape(ids_TK, (T * K_PAD,)), 0), (T, K_PAD))
    place_TK = tl.where((row_T < valid)[:, None], offset_TK + before_TK + nth_TK, num_routed)
    tl.store(place_ptr + index_TK.to(tl.int64), place_TK, mask=is_index_TK)
    tl.store(routed_ptr + place_TK.to(tl.int64), index_TK, mask=is_index_TK & (row_T < valid)[:, None])
    # Empty places are those from the valid rows' on: whoever has the routed index of that number writes there.
    tl.store(routed_ptr + index_TK.to(tl.int64), tl.zeros_like(index_TK) + num_routed, mask=is_index_TK & (row_T >= valid)[:, None])
    write_tiles(tiles_ptr, expert_C, total_C, program, num_programs, num_tokens, TILE_ROWS)
    if program == num_programs - 1:
        write_summary(counts_ptr, offsets_ptr, num_tiles_ptr, total_C, total_C, expert_C, expert_C < E, E, TILE_ROWS, True)
