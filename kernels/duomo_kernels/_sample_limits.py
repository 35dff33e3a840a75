"""Owns the search for the edge that top-k, top-p and min-p draw through a row, without sorting it. Knows no launcher, no greedy row.

A token's depth (_sampling.py) grows as its logit falls. The edge is closed in by two rounds of PIVOTS depths each: every part of the row
adds up what lies above each pivot (tokens for top-k, weight for top-p: float32, only to choose a bracket, with slack for its rounding).
Then the tokens in the bracket are listed, what lies above is added up exactly for each chunk, and one program for each row finds the edge
exactly among the listed: by order of the logit, and where several share the edge, by lowest ids.

    measured_SRP  float32, R rounds of P pivots    listed_S, list_x_SN, list_id_SN    candidates, in no order
    above_SC, live_SC int64, num_above_SC int32    weight above the bracket, weight within reach, tokens above the bracket, by chunk

A list that overflows (many equal logits, or a top-k of thousands with a top-p) sends its row through its logits again: slower, the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

from duomo_kernels._launch import start_next, wait_for_previous
from duomo_kernels._sampling import adjusted, draw_below, from_order, order, row_limits, row_peak, weigh

ROUNDS = 2
WAYS = tl.constexpr(8)  # parts into which one pass over the candidates cuts what is searched: 3 bits a pass
SLACK = tl.constexpr(2.0**-14)  # float32 sums of up to 2^18 weights, by trees of at most 2^7 roundings: 2^-17, and room
ALL_LISTED_K = tl.constexpr(4096)  # up to here the whole top-k is listed, so that a top-p can be found inside it
LAST_RANK = tl.constexpr(0x7FFFFFFF)
BY_COUNT = tl.constexpr(0)
BY_WEIGHT = tl.constexpr(1)
BY_TIE = tl.constexpr(2)
BY_CHUNK = tl.constexpr(3)


@triton.jit
def _pivots(lo, hi, PIVOTS: tl.constexpr):
    """Depths that cut lo..hi evenly; the last is hi. To the bit what `measure` takes."""
    j = tl.arange(0, PIVOTS)
    base = tl.maximum(lo, 0.0)
    return tl.where(j == PIVOTS - 1, hi, base + (hi - base) * ((j + 1).to(tl.float32) * (1.0 / PIVOTS)))


@triton.jit
def _bracket(measured, row, limits, peak_sum, vocab, DONE: tl.constexpr, ROUNDS: tl.constexpr, PIVOTS: tl.constexpr):
    """(lo, hi]: depths between which the edge lies, after DONE rounds. What is at most lo deep is kept whatever happens."""
    is_greedy, scale, top_k, top_p, min_p, reach = limits
    by_count = top_k > 0
    j = tl.arange(0, PIVOTS)
    # tokens lighter than (1 - top_p) sum / V sum to less than top_p leaves out: the edge lies above
    deepest = tl.log2(vocab / (tl.maximum(1.0 - top_p, 1e-6) * peak_sum)) + 1.0
    is_bounded = (top_k == 0) & (min_p <= 0)
    lo = -1.0
    hi = tl.where(is_bounded, tl.minimum(reach, tl.maximum(deepest, 0.0)), reach)
    slack = tl.where(by_count, 0.0, SLACK)
    total = peak_sum
    for done in tl.static_range(DONE):
        pivot_P = _pivots(lo, hi, PIVOTS)
        sum_P = tl.load(measured + (row * ROUNDS + done) * PIVOTS + j)
        if done == 0:  # with a min-p the total is what lies within its reach
            total = tl.where(min_p > 0, tl.sum(tl.where(j == PIVOTS - 1, sum_P, 0.0), axis=0), peak_sum)
        target = tl.where(by_count, top_k.to(tl.float32), top_p * total)
        lo = tl.maximum(lo, tl.max(tl.where(sum_P < target * (1.0 - slack), pivot_P, -1.0), axis=0))
        hi = tl.minimum(hi, tl.min(tl.where(sum_P >= target * (1.0 + slack), pivot_P, hi), axis=0))
    return lo, hi


@triton.jit
def _list_bracket(measured, row, limits, peak_sum, vocab, ROUNDS: tl.constexpr, PIVOTS: tl.constexpr):
    """The bracket whose tokens are listed."""
    is_greedy, scale, top_k, top_p, min_p, reach = limits
    lo, hi = _bracket(measured, row, limits, peak_sum, vocab, ROUNDS, ROUNDS, PIVOTS)
    has_both = (top_k > 0) & (top_p < 1)
    # top-p's edge may lie anywhere in the top-k
    lo = tl.where(has_both | ((top_k > 0) & (top_k <= ALL_LISTED_K)), -1.0, lo)
    lo = tl.where((top_k == 0) & (top_p >= 1), reach, lo)  # min-p alone: its reach is the edge
    return lo, tl.where((top_k == 0) & (top_p >= 1), reach, hi)


@triton.jit
def measure(
    source, draw, maxima, sums, measured, num_chunks,
    DONE: tl.constexpr, ROUNDS: tl.constexpr, PIVOTS: tl.constexpr, TILE: tl.constexpr, CHUNKS: tl.constexpr,
    ENDINGS: tl.constexpr, PENALISED: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """One part of a row: how much lies above each pivot of round DONE."""
    wait_for_previous(USE_PDL)
    start_next(USE_PDL)
    row = tl.program_id(1)
    logits, vocab, positions, penalties = source
    temperatures, top_ks, top_ps, min_ps, seeds, choices, draw_positions, num_valid = draw
    if row >= tl.load(num_valid):
        return
    limits = row_limits(draw, row, vocab)
    is_greedy, scale, top_k, top_p, min_p, reach = limits
    if is_greedy | ((top_k == 0) & (top_p >= 1)):
        return
    peak, flag, peak_sum = row_peak(maxima, sums, row, scale, num_chunks, CHUNKS)
    if flag != 0:
        return
    lo, hi = _bracket(measured, row, limits, peak_sum, vocab, DONE, ROUNDS, PIVOTS)
    ids = tl.program_id(0) * TILE + tl.arange(0, TILE)
    depth = (peak - adjusted(source, row, ids, ENDINGS, PENALISED)) * scale
    value = tl.where(top_k > 0, 1.0, tl.exp2(-depth))
    base = tl.maximum(lo, 0.0)
    for j in tl.static_range(PIVOTS):  # one pivot after the other: all in one two-dimensional sum spill
        pivot = hi if j == PIVOTS - 1 else base + (hi - base) * ((j + 1.0) / PIVOTS)
        tl.atomic_add(measured + (row * ROUNDS + DONE) * PIVOTS + j, tl.sum(tl.where(depth <= pivot, value, 0.0), axis=0), sem="relaxed")


@triton.jit
def collect(
    source, draw, maxima, sums, measured, above, live, num_above, listed, list_x, list_id, num_chunks,
    ROUNDS: tl.constexpr, PIVOTS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, CAPACITY: tl.constexpr,
    ENDINGS: tl.constexpr, PENALISED: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """One chunk of a row: add up what lies above the bracket, list what lies in it."""
    wait_for_previous(USE_PDL)
    start_next(USE_PDL)
    chunk, row = tl.program_id(0), tl.program_id(1)
    logits, vocab, positions, penalties = source
    temperatures, top_ks, top_ps, min_ps, seeds, choices, draw_positions, num_valid = draw
    if row >= tl.load(num_valid):
        return
    limits = row_limits(draw, row, vocab)
    is_greedy, scale, top_k, top_p, min_p, reach = limits
    if is_greedy | ((top_k == 0) & (top_p >= 1) & (min_p <= 0)):
        return
    peak, flag, peak_sum = row_peak(maxima, sums, row, scale, num_chunks, CHUNKS)
    if flag != 0:
        return
    lo, hi = _list_bracket(measured, row, limits, peak_sum, vocab, ROUNDS, PIVOTS)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = adjusted(source, row, ids, ENDINGS, PENALISED)
    depth = (peak - x) * scale
    weight = tl.where(depth <= reach, weigh(depth), 0)
    is_above = depth <= lo
    at = row * num_chunks + chunk
    tl.store(above + at, tl.sum(tl.where(is_above, weight, 0), axis=0))
    tl.store(live + at, tl.sum(weight, axis=0))
    tl.store(num_above + at, tl.sum(is_above.to(tl.int32), axis=0))
    is_listed = (depth > lo) & (depth <= hi)
    num = tl.sum(is_listed.to(tl.int32), axis=0)
    if num > 0:
        first = tl.atomic_add(listed + row, num, sem="relaxed")
        place = first + tl.cumsum(is_listed.to(tl.int32), axis=0) - 1
        fits = is_listed & (place < CAPACITY)
        to = row.to(tl.int64) * CAPACITY + place
        tl.store(list_x + to, x, mask=fits)
        tl.store(list_id + to, ids, mask=fits)


@triton.jit
def _candidates(start, row, source, found, BLOCK: tl.constexpr, CAPACITY: tl.constexpr, ENDINGS: tl.constexpr, PENALISED: tl.constexpr):
    """(rank int64, growing as the logit falls; weight, 0 where there is none; id; is one) of BLOCK listed tokens, or of the row's."""
    list_x, list_id, num, peak, scale, lo, hi = found
    at = start + tl.arange(0, BLOCK)
    if num > CAPACITY:
        x = adjusted(source, row, at, ENDINGS, PENALISED)
        ids = at
    else:
        x = tl.load(list_x + row.to(tl.int64) * CAPACITY + at, mask=at < num, other=-float("inf"))
        ids = tl.load(list_id + row.to(tl.int64) * CAPACITY + at, mask=at < num, other=0)
    depth = (peak - x) * scale
    is_one = (depth > lo) & (depth <= hi)
    return (~order(x)).to(tl.int64), tl.where(is_one, weigh(depth), 0), ids.to(tl.int64), is_one


@triton.jit
def _survey(
    edge, row, source, found, end, BLOCK: tl.constexpr, CAPACITY: tl.constexpr, ENDINGS: tl.constexpr, PENALISED: tl.constexpr
):  # fmt: skip
    """(tokens before the edge, their weight, tokens at the edge, first rank, last rank) among the candidates."""
    num_before = tl.zeros((BLOCK,), tl.int32)
    before = tl.zeros((BLOCK,), tl.int64)
    num_at = tl.zeros((BLOCK,), tl.int32)
    first = tl.full((BLOCK,), LAST_RANK, tl.int64)
    last = tl.full((BLOCK,), -LAST_RANK - 1, tl.int64)
    start = tl.zeros((), tl.int32)
    while start < end:
        rank, weight, ids, is_one = _candidates(start, row, source, found, BLOCK, CAPACITY, ENDINGS, PENALISED)
        start += BLOCK
        num_before += (is_one & (rank < edge)).to(tl.int32)
        before += tl.where(rank < edge, weight, 0)
        num_at += (is_one & (rank == edge)).to(tl.int32)
        first = tl.where(is_one, tl.minimum(first, rank), first)
        last = tl.where(is_one, tl.maximum(last, rank), last)
    counts = tl.sum(num_before, axis=0), tl.sum(before, axis=0), tl.sum(num_at, axis=0)
    return counts[0], counts[1], counts[2], tl.min(first, axis=0), tl.max(last, axis=0)


@triton.jit
def _search(
    kind, need, lo, hi, edge, edge_id, row, source, found, end, above, num_chunks,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, CAPACITY: tl.constexpr,
    ENDINGS: tl.constexpr, PENALISED: tl.constexpr,
):  # fmt: skip
    """(smallest t in lo..hi at which the candidates up to t sum to `need`, hi where none does; their sum before t).

    BY_COUNT, BY_WEIGHT: t a rank. BY_TIE: t an id, of those at the edge. BY_CHUNK: t a chunk, weights of what is kept, listed or above.
    """
    j = tl.arange(0, WAYS)
    c = tl.arange(0, CHUNKS)
    above_C = tl.load(above + row * num_chunks + c, mask=c < tl.where(kind == BY_CHUNK, num_chunks, 0), other=0)
    before = tl.zeros((), tl.int64)
    while lo < hi:
        step = (hi - lo) // WAYS + 1
        pivot_J = lo + step * (j + 1) - 1
        sum_J = tl.sum(tl.where(c[:, None] <= pivot_J[None, :], above_C[:, None], 0), axis=0)
        start = tl.zeros((), tl.int32)
        while start < end:
            rank, weight, ids, is_one = _candidates(start, row, source, found, BLOCK, CAPACITY, ENDINGS, PENALISED)
            start += BLOCK
            at = tl.where(kind <= BY_WEIGHT, rank, tl.where(kind == BY_TIE, ids, ids // CHUNK))
            is_kept = (rank < edge) | ((rank == edge) & (ids <= edge_id))
            counts = is_one & ((kind == BY_COUNT) | (rank == edge))
            value = tl.where((kind == BY_COUNT) | (kind == BY_TIE), counts.to(tl.int64), weight)
            value = tl.where((kind == BY_CHUNK) & ~is_kept, 0, value)
            sum_J += tl.sum(tl.where(at[:, None] <= pivot_J[None, :], value[:, None], 0), axis=0)
        num_short = tl.minimum(tl.sum((sum_J < need).to(tl.int32), axis=0), WAYS - 1)
        before = tl.maximum(before, tl.max(tl.where(j < num_short, sum_J, 0), axis=0))
        lo = lo + step * num_short
        hi = tl.minimum(lo + step - 1, hi)
    return lo, before


@triton.jit
def choose_within_limits(
    row, source, draw, limits, peak, peak_sum, measured, above, live, num_above, listed, list_x, list_id, num_chunks,
    ROUNDS: tl.constexpr, PIVOTS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, CAPACITY: tl.constexpr,
    ENDINGS: tl.constexpr, PENALISED: tl.constexpr,
):  # fmt: skip
    """(chunk, weight to pass over in it, edge's rank, last id kept at the edge): where a row with limits draws its token.

    Four searches in turn, each where it is needed, in one loop so that the code stands once: top-k's edge, top-p's edge, the last id at
    the edge, the chunk of the draw.
    """
    is_greedy, scale, top_k, top_p, min_p, reach = limits
    logits, vocab, positions, penalties = source
    lo, hi = _list_bracket(measured, row, limits, peak_sum, vocab, ROUNDS, PIVOTS)
    num = tl.load(listed + row)
    found = (list_x, list_id, num, peak, scale, lo, hi)
    end = tl.where(num > CAPACITY, vocab, num)
    c = tl.arange(0, CHUNKS)
    at_C = row * num_chunks + c
    above_sum = tl.sum(tl.load(above + at_C, mask=c < num_chunks, other=0), axis=0)
    above_num = tl.sum(tl.load(num_above + at_C, mask=c < num_chunks, other=0), axis=0)
    live_sum = tl.sum(tl.load(live + at_C, mask=c < num_chunks, other=0), axis=0)
    zero = tl.zeros((), tl.int64)
    # nothing is cut yet: everything within reach lies before the edge
    edge = zero + LAST_RANK
    edge_id = zero + vocab
    point, passed, chunk, kept, need, num_ties = zero, zero, zero, zero, zero, zero
    num_before, before, num_edge, first, last = _survey(edge, row, source, found, end, BLOCK, CAPACITY, ENDINGS, PENALISED)
    has_candidates = num_before > 0
    is_cut = tl.zeros((), tl.int1)
    kind = tl.zeros((), tl.int32)
    while kind <= BY_CHUNK:
        edge_x = tl.where(edge == LAST_RANK, peak, from_order((~edge).to(tl.int32)))
        tie_weight = tl.maximum(weigh((peak - edge_x) * scale), 1)
        is_needed = tl.full((), 1, tl.int1)
        from_t, to_t = first, tl.minimum(last, edge)
        if kind == BY_COUNT:
            need = zero + top_k - above_num
            is_needed = (top_k > 0) & (num_before >= need)
        elif kind == BY_WEIGHT:
            num_ties = tl.where(edge == LAST_RANK, zero, top_k - above_num - num_before)
            kept = above_sum + before + num_ties * tie_weight
            whole = tl.where(top_k > 0, kept, live_sum)
            need = tl.maximum(tl.ceil(top_p.to(tl.float64) * whole.to(tl.float64)).to(tl.int64), 1) - above_sum
            is_needed = (top_p < 1) & (before >= need) & has_candidates
        elif kind == BY_TIE:
            if is_cut:
                num_ties = zero + num_edge
            if (top_p < 1) & (num_ties > 0):
                num_ties = tl.minimum(num_ties, tl.maximum((need - before + tie_weight - 1) // tie_weight, 1))
            kept = above_sum + before + num_ties * tie_weight
            need = num_ties
            is_needed = num_ties < num_edge
            from_t, to_t = zero, zero + vocab - 1
        else:
            point = draw_below(draw, row, kept)
            need = point + 1
            from_t, to_t = zero, zero + num_chunks - 1
        is_cut = is_needed & (kind <= BY_WEIGHT)
        if is_needed:
            t, passed = _search(
                kind, need, from_t, to_t, edge, edge_id, row, source, found, end, above, num_chunks,
                CHUNK, CHUNKS, BLOCK, CAPACITY, ENDINGS, PENALISED,
            )  # fmt: skip
            if kind <= BY_WEIGHT:
                edge = t
                num_before, before, num_edge, f, g = _survey(edge, row, source, found, end, BLOCK, CAPACITY, ENDINGS, PENALISED)
            elif kind == BY_TIE:
                edge_id = t
            else:
                chunk = t
        kind += 1
    return chunk.to(tl.int32), point - passed, edge, edge_id
