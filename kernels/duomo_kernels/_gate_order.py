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
    # Four bytes a thread, though sixteen lie there, and the shape of load_logits: the same layout, so nothing is exchanged between threads.
    if C == 128:
        at_PC = tl.max_contiguous(p[:, None] * C + tl.arange(0, C)[None, :], (1, 4))
        hist_PC = tl.load(hist_ptr + at_PC, mask=(p < num_programs)[:, None], other=0, cache_modifier=".cg")
    else:
        column_SL = tl.arange(0, C // 128)[None, :, None] * 128 + tl.arange(0, 128)[None, None, :]
        at_PSL = tl.max_contiguous(p[:, None, None] * C + column_SL, (1, 1, 4))
        hist_PSL = tl.load(hist_ptr + at_PSL, mask=(p < num_programs)[:, None, None], other=0, cache_modifier=".cg")
        hist_PC = tl.reshape(hist_PSL, (P, C))
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
def write_tiles(tiles_ptr, expert_C, kept_C, program, num_programs, num_tokens, TILE_ROWS: tl.constexpr):
    """Tiles number program, program + num_programs, ... of every expert: one expert with all rows is shared work too."""
    num_C = (kept_C + (TILE_ROWS - 1)) // TILE_ROWS
    first_C = tl.cumsum(num_C, 0) - num_C
    offset_C = tl.cumsum(kept_C, 0) - kept_C
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
def nth_of_expert(rank_TC, row_T, valid, K: tl.constexpr):
    """(1 where a valid row chose the column, how many rows of these did before)."""
    counted_TC = ((rank_TC < K) & (row_T < valid)[:, None]).to(tl.int32)
    return counted_TC, tl.cumsum(counted_TC, 0) - counted_TC


@triton.jit
def first_places(kept_C, T: tl.constexpr, C: tl.constexpr):
    """offset_TC, an expert's first place, in every row: each warp sums along its own rows and waits for no other."""
    kept_TC = tl.broadcast_to(kept_C[None, :], (T, C))
    return tl.cumsum(kept_TC, 1) - kept_TC


@triton.jit
def place_rows(
    routed_ptr, place_ptr, rank_TC, counted_TC, nth_TC, row_T, valid, num_tokens, offset_TC, num_kept, limit, K: tl.constexpr,
    K_PAD: tl.constexpr, T: tl.constexpr, HAS_LIMIT: tl.constexpr,
):  # fmt: skip
    """Write the places of these rows' choices; nth_TC counts all rows before. Returns (routed index_TK, whether it left).

    Chosen by padding or over the limit: place R, and no routed index points back. Empty places are those from num_kept on: whoever has the
    routed index of that number writes R there.
    """
    num_routed = num_tokens * K
    at_TC = tl.where(counted_TC > 0, offset_TC + nth_TC, num_routed)
    if HAS_LIMIT:
        at_TC = tl.where(nth_TC < limit, at_TC, num_routed)
    k_of = tl.arange(0, K_PAD)[None, :]
    place_TK = tl.full((T, K_PAD), -1, tl.int32)
    for k in tl.static_range(K):
        place_TK = tl.where(k_of == k, tl.max(tl.where(rank_TC == k, at_TC, -1), 1)[:, None], place_TK)
    place_TK = tl.where(place_TK < 0, num_routed, place_TK)  # an id of -1: dropped before
    index_TK = row_T[:, None] * K + k_of
    is_index_TK = (row_T < num_tokens)[:, None] & (k_of < K)
    tl.store(place_ptr + index_TK.to(tl.int64), place_TK, mask=is_index_TK)
    tl.store(routed_ptr + place_TK.to(tl.int64), index_TK, mask=is_index_TK & (place_TK < num_routed))
    tl.store(routed_ptr + index_TK.to(tl.int64), tl.zeros_like(index_TK) + num_routed, mask=is_index_TK & (index_TK >= num_kept))
    return index_TK, is_index_TK & (row_T < valid)[:, None] & (place_TK == num_routed)
