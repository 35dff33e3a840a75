"""Owns the stable order by expert: from counts to offsets, places and tiles, in registers. Knows nothing of how experts were chosen.

Each program has a histogram of its rows, hist_PC; a program's first place in an expert is the expert's offset plus the counts of the
programs before it. Integer sums only: the order depends on no timing. Columns C as in _gate_choice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._routing import GROUP_TILES as _GROUP_TILES

GROUP_TILES = tl.constexpr(_GROUP_TILES)


@triton.jit
def totals(hist_ptr, program, num_programs, P: tl.constexpr, C: tl.constexpr, IS_WIDE: tl.constexpr):
    """(counts of all programs, counts of the programs before this one) from hist [num_programs, C], P a power of two above it.

    Both come out of one sum: the total in the low half of a word, the part before in the high half. .cg: only L2 has what others wrote.
    """
    p = tl.arange(0, P)
    at_PC = p[:, None] * C + tl.arange(0, C)[None, :]
    hist_PC = tl.load(hist_ptr + at_PC, mask=(p < num_programs)[:, None], other=0, cache_modifier=".cg")
    if IS_WIDE:
        word_C = tl.sum(hist_PC.to(tl.int64) * tl.where(p < program, (1 << 32) + 1, 1).to(tl.int64)[:, None], 0)
        total_C, before_C = (word_C & 0xFFFFFFFF).to(tl.int32), (word_C >> 32).to(tl.int32)
    else:
        word_C = tl.sum(hist_PC.to(tl.int32) * tl.where(p < program, 65537, 1)[:, None], 0)
        total_C, before_C = word_C & 0xFFFF, word_C >> 16
    return total_C, before_C


@triton.jit
def capacity_limit(valid, K: tl.constexpr, E: tl.constexpr, NUMERATOR: tl.constexpr, DENOMINATOR: tl.constexpr):
    """ceil(factor * valid * K / E), exactly: the factor is a fraction."""
    places = valid.to(tl.int64) * (K * NUMERATOR)
    return ((places + (E * DENOMINATOR - 1)) // (E * DENOMINATOR)).to(tl.int32)


@triton.jit
def write_summary(
    counts_ptr,
    offsets_ptr,
    num_tiles_ptr,
    total_C,
    kept_C,
    expert_C,
    is_expert_C,
    E: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    COUNTS: tl.constexpr,
):
    """What has one value an expert; one program's work. COUNTS: counts too (else an earlier kernel wrote them)."""
    if COUNTS:
        tl.store(counts_ptr + expert_C, total_C, mask=is_expert_C)
    tl.store(offsets_ptr + expert_C, tl.cumsum(kept_C, 0) - kept_C, mask=is_expert_C)
    tl.store(offsets_ptr + E, tl.sum(kept_C, 0))
    tl.store(num_tiles_ptr, tl.sum((kept_C + (TILE_ROWS - 1)) // TILE_ROWS, 0))


@triton.jit
def write_tiles(tiles_ptr, expert_C, kept_C, offset_C, program, num_programs, num_tokens, TILE_ROWS: tl.constexpr):
    """Tiles number program, program + num_programs, ... of every expert: one expert with all rows is shared work too."""
    num_C = (kept_C + (TILE_ROWS - 1)) // TILE_ROWS
    first_C = tl.cumsum(num_C, 0) - num_C
    for j in range(program, (num_tokens + TILE_ROWS - 1) // TILE_ROWS, num_programs):  # a token is at most once with an expert
        is_tile_C = j < num_C
        at_C = tiles_ptr + (first_C + j).to(tl.int64) * 5
        group = j // GROUP_TILES * GROUP_TILES
        tl.store(at_C, expert_C, mask=is_tile_C)
        tl.store(at_C + 1, offset_C + j * TILE_ROWS, mask=is_tile_C)
        tl.store(at_C + 2, tl.minimum(kept_C - j * TILE_ROWS, TILE_ROWS), mask=is_tile_C)
        tl.store(at_C + 3, first_C + group, mask=is_tile_C)
        tl.store(at_C + 4, tl.minimum(num_C - group, GROUP_TILES), mask=is_tile_C)


@triton.jit
def place_rows(
    routed_ptr, place_ptr, rank_TC, row_T, valid, num_tokens, before_C, offset_C, limit, K: tl.constexpr, HAS_LIMIT: tl.constexpr
):
    """Write the places of these rows' chosen columns; before_C counts earlier rows. Returns what was chosen, routed index and whether it left.

    Chosen by padding or over the limit: place R, and no routed index points back.
    """
    num_routed = num_tokens * K
    is_chosen_TC = (rank_TC < K) & (row_T < num_tokens)[:, None]
    is_counted_TC = is_chosen_TC & (row_T < valid)[:, None]
    counted_TC = is_counted_TC.to(tl.int32)
    nth_TC = before_C[None, :] + tl.cumsum(counted_TC, 0) - counted_TC
    is_kept_TC = is_counted_TC
    if HAS_LIMIT:
        is_kept_TC = is_counted_TC & (nth_TC < limit)
    index_TC = row_T[:, None] * K + rank_TC
    at_TC = offset_C[None, :] + nth_TC
    tl.store(place_ptr + index_TC.to(tl.int64), tl.where(is_kept_TC, at_TC, num_routed), mask=is_chosen_TC)
    tl.store(routed_ptr + at_TC.to(tl.int64), index_TC, mask=is_kept_TC)
    return index_TC, is_counted_TC, is_kept_TC


@triton.jit
def clear_tail(routed_ptr, first_row, num_kept, num_tokens, K: tl.constexpr, K_PAD: tl.constexpr, T: tl.constexpr):
    """R in the empty places among those that number like these rows' routed indices."""
    i = tl.arange(0, T * K_PAD)
    place = first_row * K + i
    is_empty = (i < T * K) & (place < num_tokens * K) & (place >= num_kept)
    tl.store(routed_ptr + place.to(tl.int64), tl.full((T * K_PAD,), 0, tl.int32) + num_tokens * K, mask=is_empty)
