"""Owns the gate as one kernel: choose, show each other histograms, place. Knows no launcher.

A warp has one row or a few; what K choices yield (ids, weights, places) lies in its lanes, round k's in lane k.

Legend: T rows of one program, C columns (_gate_choice), W words of S columns (_gate_exchange), L lanes, E experts, K experts a token,
P programs, a power of two, RUN of which a warp adds up in bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._gate_capacity import drop_rows
from ._gate_choice import LANES, choose, expert_at, in_lanes, load_bias, load_logits, valid_rows, weigh_chosen
from ._gate_exchange import exchanged, halves, own_tag, packed, publish
from ._gate_order import capacity_limit
from ._gate_words import first_of_words, places_of_lanes, write_summary_of_words, write_tiles_of_words
from ._launch import start_next, wait_for_previous


@triton.jit(do_not_specialize=["num_tokens"])
def fused_kernel(
    logits_ptr, bias_ptr, num_valid_ptr, weights_ptr, ids_ptr, counts_ptr, offsets_ptr, routed_ptr, place_ptr, tiles_ptr, num_tiles_ptr,
    overflow_ptr, dropped_ptr, rerouted_ptr, exceeded_ptr, lost_ptr, board_ptr, num_tokens,
    E: tl.constexpr, K: tl.constexpr, T: tl.constexpr, C: tl.constexpr, P: tl.constexpr, RUN: tl.constexpr, TILE_ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr, IS_BF16: tl.constexpr, IS_SIGMOID: tl.constexpr, NORMALISE: tl.constexpr, SCALE: tl.constexpr,
    NUM_GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, GROUP_PAD: tl.constexpr,
    HAS_CAPACITY: tl.constexpr, IS_DROPPING: tl.constexpr, NUMERATOR: tl.constexpr, DENOMINATOR: tl.constexpr, WAITS: tl.constexpr,
    USE_PDL: tl.constexpr,
):  # fmt: skip
    S: tl.constexpr = C // LANES if C < 256 else 8
    W: tl.constexpr = C // S
    BY_SCORE: tl.constexpr = HAS_BIAS or NUM_GROUPS > 1
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    expert_C, is_expert_C = expert_at(tl.arange(0, C), E, NUM_GROUPS, GROUP_PAD)
    bias_C = load_bias(bias_ptr, expert_C, is_expert_C, C)  # a weight: no kernel before this one writes it
    row_T = program * T + tl.arange(0, T)
    wait_for_previous(USE_PDL)
    valid = valid_rows(num_valid_ptr, num_tokens)
    logits_TC = load_logits(logits_ptr, row_T, valid, E, NUM_GROUPS, GROUP_PAD, T, C)
    if P > 1:
        tag, is_read = own_tag(board_ptr, program, W, S)
        is_expert_C = is_expert_C & is_read
    _, value_TC, peak_T, sum_T, won_TC, column_TL, best_TL = choose(
        logits_TC, bias_C, is_expert_C, T, C, E, K, HAS_BIAS, IS_BF16, IS_SIGMOID, NUM_GROUPS, TOP_GROUPS, GROUP_PAD
    )
    word_TW = packed((won_TC & (row_T < valid)[:, None]).to(tl.int32), T, W, S)
    if P > 1:
        publish(board_ptr, word_TW, tag, program, T, W)
    start_next(USE_PDL)  # not before: its programs would be in the way of those that others wait for
    # All that needs no other program's histogram, while those are on their way.
    lane = tl.arange(0, LANES)[None, :]
    index_TL = row_T[:, None] * K + lane
    is_index_TL = (row_T < num_tokens)[:, None] & (lane < K)
    at_TL = in_lanes(index_TL)
    is_valid_TL = (row_T < valid)[:, None] & (lane < K)
    weight_TL = weigh_chosen(
        logits_TC, value_TC, best_TL, column_TL, peak_T, sum_T, is_expert_C, T, C, K, BY_SCORE, IS_SIGMOID, NORMALISE, SCALE
    )
    tl.store(weights_ptr + at_TL, tl.where(is_valid_TL, weight_TL, 0.0), mask=is_index_TL)
    tl.store(ids_ptr + at_TL, expert_at(column_TL, E, NUM_GROUPS, GROUP_PAD)[0], mask=is_index_TL)
    nth_TW = tl.cumsum(word_TW, 0) - word_TW
    if P > 1:
        even_TW, odd_TW, even_before_TW, odd_before_TW = exchanged(board_ptr, tag, program, num_programs, P, RUN, T, W, S, WAITS)
    else:
        even_TW, odd_TW = halves(tl.broadcast_to(tl.sum(word_TW, 0)[None, :], (T, W)), S)
        even_before_TW, odd_before_TW = tl.zeros_like(even_TW), tl.zeros_like(even_TW)
    limit, num_kept = num_tokens, valid * K
    if HAS_CAPACITY:
        limit = capacity_limit(valid, K, E, NUMERATOR, DENOMINATOR)
    first_TW, kept_T = first_of_words(even_TW, odd_TW, limit, S, TILE_ROWS, IS_DROPPING)
    if IS_DROPPING:
        num_kept = kept_T[:, None]
    num_routed = num_tokens * K
    place_TL = places_of_lanes(
        column_TL, nth_TW, even_TW, odd_TW, even_before_TW, odd_before_TW, first_TW, limit, num_routed, T, S, TILE_ROWS, IS_DROPPING
    )
    place_TL = tl.where(is_valid_TL, place_TL, num_routed)
    tl.store(place_ptr + at_TL, place_TL, mask=is_index_TL)
    tl.store(routed_ptr + in_lanes(place_TL), index_TL, mask=is_index_TL & (place_TL < num_routed))
    # Empty places are those from num_kept on: whoever has the routed index of that number writes there.
    tl.store(routed_ptr + at_TL, tl.zeros_like(index_TL) + num_routed, mask=is_index_TL & (index_TL >= num_kept))
    if program * TILE_ROWS < num_tokens:  # a token is at most once with an expert: beyond, nobody has that many tiles
        write_tiles_of_words(
            tiles_ptr, even_TW, odd_TW, first_TW, limit, program, num_programs, E, NUM_GROUPS, GROUP_PAD, T, W, S, TILE_ROWS, IS_DROPPING
        )
    if program == num_programs - 1:
        write_summary_of_words(
            counts_ptr, offsets_ptr, num_tiles_ptr, overflow_ptr, dropped_ptr, rerouted_ptr, exceeded_ptr, even_TW, odd_TW, first_TW, limit,
            E, NUM_GROUPS, GROUP_PAD, T, W, S, TILE_ROWS, HAS_CAPACITY, IS_DROPPING,
        )  # fmt: skip
    if HAS_CAPACITY:
        drop_rows(weights_ptr, lost_ptr, index_TL, is_valid_TL & (place_TL == num_routed), row_T, num_tokens)
