"""Owns the stable order by expert where columns are halves of words: from counts to places and tiles. Knows no choice and no board.

All is [T, W], every row alike: each warp works on its own copy, and nothing moves between warps. A word's columns are taken one after the
other, so nothing moves between lanes but one sum and what a lane asks of another.

    start of a word's column s = sum of (kept, tiles) of the words before (first_TW) + of its columns before s

Both halves of one int32: kept below, tiles above, for at most 32,768 places.

Legend: T rows of one program, W words of S columns (_gate_exchange), E experts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._gate_choice import expert_at, in_lanes
from ._gate_exchange import column_of
from ._gate_order import GROUP_TILES


@triton.jit
def _size(even_TW, odd_TW, limit, s: tl.constexpr, TILE_ROWS: tl.constexpr, IS_DROPPING: tl.constexpr):
    """(what stays of column s, tiles, both in one)."""
    kept_TW = column_of(even_TW, odd_TW, s)
    if IS_DROPPING:
        kept_TW = tl.minimum(kept_TW, limit)
    num_TW = (kept_TW + (TILE_ROWS - 1)) // TILE_ROWS
    return kept_TW, num_TW, kept_TW | (num_TW << 16)


@triton.jit
def first_of_words(even_TW, odd_TW, limit, S: tl.constexpr, TILE_ROWS: tl.constexpr, IS_DROPPING: tl.constexpr):
    """(kept and tiles of the words before each, all that is kept [T])."""
    sum_TW = tl.zeros(even_TW.shape, tl.int32)
    for s in tl.static_range(S):
        sum_TW += _size(even_TW, odd_TW, limit, s, TILE_ROWS, IS_DROPPING)[2]
    return tl.cumsum(sum_TW, 1) - sum_TW, tl.sum(sum_TW & 0xFFFF, 1)


@triton.jit
def places_of_lanes(
    column_TL, nth_TW, even_TW, odd_TW, even_before_TW, odd_before_TW, first_TW, limit, num_routed, T: tl.constexpr, S: tl.constexpr,
    TILE_ROWS: tl.constexpr, IS_DROPPING: tl.constexpr,
):  # fmt: skip
    """The place of the column that each lane names, num_routed where it is over the limit."""
    place_TL = tl.zeros(column_TL.shape, tl.int32)
    for s in tl.static_range(S):
        nth_s_TW = ((nth_TW >> (8 * s)) & 255).to(tl.int32) + column_of(even_before_TW, odd_before_TW, s)
        place_TW = (first_TW & 0xFFFF) + nth_s_TW
        if IS_DROPPING:
            place_TW = tl.where(nth_s_TW < limit, place_TW, num_routed)
        place_TL = tl.where(column_TL % S == s, tl.gather(place_TW, column_TL // S, 1), place_TL)
        first_TW += _size(even_TW, odd_TW, limit, s, TILE_ROWS, IS_DROPPING)[2]
    return place_TL


@triton.jit
def write_tiles_of_words(
    tiles_ptr, even_TW, odd_TW, first_TW, limit, program, num_programs, E: tl.constexpr, NUM_GROUPS: tl.constexpr, GROUP_PAD: tl.constexpr,
    T: tl.constexpr, W: tl.constexpr, S: tl.constexpr, TILE_ROWS: tl.constexpr, IS_DROPPING: tl.constexpr,
):  # fmt: skip
    """Row t writes tile number program + t * num_programs of every expert: as many rows as tokens, and no expert has more tiles."""
    j_TW = tl.broadcast_to(program + num_programs * tl.arange(0, T)[:, None], (T, W))
    group_TW = j_TW // GROUP_TILES * GROUP_TILES
    word_TW = tl.broadcast_to(tl.arange(0, W)[None, :], (T, W))
    for s in tl.static_range(S):
        kept_TW, num_TW, both_TW = _size(even_TW, odd_TW, limit, s, TILE_ROWS, IS_DROPPING)
        is_tile_TW = j_TW < num_TW
        start_TW = first_TW >> 16
        at_TW = tiles_ptr + in_lanes((start_TW + j_TW) * 5)
        tl.store(at_TW, expert_at(word_TW * S + s, E, NUM_GROUPS, GROUP_PAD)[0], mask=is_tile_TW)
        tl.store(at_TW + 1, (first_TW & 0xFFFF) + j_TW * TILE_ROWS, mask=is_tile_TW)
        tl.store(at_TW + 2, tl.minimum(kept_TW - j_TW * TILE_ROWS, TILE_ROWS), mask=is_tile_TW)
        tl.store(at_TW + 3, start_TW + group_TW, mask=is_tile_TW)
        tl.store(at_TW + 4, tl.minimum(num_TW - group_TW, GROUP_TILES), mask=is_tile_TW)
        first_TW += both_TW


@triton.jit
def write_summary_of_words(
    counts_ptr, offsets_ptr, num_tiles_ptr, overflow_ptr, dropped_ptr, rerouted_ptr, exceeded_ptr, even_TW, odd_TW, first_TW, limit,
    E: tl.constexpr, NUM_GROUPS: tl.constexpr, GROUP_PAD: tl.constexpr, T: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
    TILE_ROWS: tl.constexpr, HAS_CAPACITY: tl.constexpr, IS_DROPPING: tl.constexpr,
):  # fmt: skip
    """What has one value an expert, and the counters of a capacity where nothing is rerouted; one program's work."""
    word_TW = tl.broadcast_to(tl.arange(0, W)[None, :], (T, W))
    is_mine_TW = tl.broadcast_to(tl.arange(0, T)[:, None] == 0, (T, W))
    over_TW = tl.zeros((T, W), tl.int32)
    tl.store(offsets_ptr, 0)
    for s in tl.static_range(S):
        expert_TW, is_expert_TW = expert_at(word_TW * S + s, E, NUM_GROUPS, GROUP_PAD)
        is_mine_s_TW = is_mine_TW & is_expert_TW
        at_TW = in_lanes(expert_TW)
        total_TW = column_of(even_TW, odd_TW, s)
        first_TW += _size(even_TW, odd_TW, limit, s, TILE_ROWS, IS_DROPPING)[2]
        tl.store(counts_ptr + at_TW, total_TW, mask=is_mine_s_TW)
        tl.store(offsets_ptr + 1 + at_TW, first_TW & 0xFFFF, mask=is_mine_s_TW)
        tl.store(num_tiles_ptr + in_lanes(expert_TW - (E - 1)), first_TW >> 16, mask=is_mine_s_TW & (expert_TW == E - 1))
        if HAS_CAPACITY:
            over_s_TW = tl.maximum(total_TW - limit, 0)
            tl.store(overflow_ptr + at_TW, over_s_TW, mask=is_mine_s_TW)
            over_TW += tl.where(is_mine_s_TW, over_s_TW, 0)
    if HAS_CAPACITY:
        num_over = tl.sum(over_TW)
        tl.store(dropped_ptr, num_over if IS_DROPPING else 0)
        tl.store(rerouted_ptr, 0)
        tl.store(exceeded_ptr, (num_over > 0).to(tl.int32))
