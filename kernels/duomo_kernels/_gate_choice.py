"""Owns how rows of logits become K experts and their weights, in registers. Knows neither order, capacity nor any other row.

A program holds rows as [T, C]: C columns, a power of two, where column c is expert c, or, in groups, group c // GROUP_PAD's expert
number c % GROUP_PAD; columns that are no expert never win. What was chosen is rank_TC, the round in which a column won, K where it did not.

Scores compare as int32 keys of the same order, so that every bit pattern, NaN too, yields K distinct experts, and a warp that holds a whole
row takes the maximum with one instruction (redux), which floats do not have on sm_90.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-2147483648)  # below every real key: won rounds and columns that are no expert
HIGH_HALF = tl.constexpr(-65536)  # a bf16 value is the high half of its float32
LANES = tl.constexpr(32)


@triton.jit
def expert_at(column, E: tl.constexpr, NUM_GROUPS: tl.constexpr, GROUP_PAD: tl.constexpr):
    """(the expert of a column, whether it is one). Ascending, so that the lowest column is the lowest expert."""
    if NUM_GROUPS == 1 or E == NUM_GROUPS * GROUP_PAD:  # apart, because Triton sees no contiguous addresses behind a division
        expert = column
        is_expert = column < E
    else:
        expert = column // GROUP_PAD * (E // NUM_GROUPS) + column % GROUP_PAD
        is_expert = (column % GROUP_PAD < E // NUM_GROUPS) & (column < NUM_GROUPS * GROUP_PAD)
    return expert, is_expert


@triton.jit
def load_logits(
    logits_ptr, row_T, valid, E: tl.constexpr, NUM_GROUPS: tl.constexpr, GROUP_PAD: tl.constexpr, T: tl.constexpr, C: tl.constexpr
):
    """[T, C] float32; zeros in padding.

    More than 128 columns are loaded as [T, LANES, H, 4], said to be contiguous along lanes too: that leaves a row to one warp and columns
    that follow each other to one lane. As [T, C], warps would share a row that is wider than what 32 lanes load at once, and every maximum
    would go through shared memory.
    """
    if C <= 128:
        expert_C, is_expert_C = expert_at(tl.arange(0, C), E, NUM_GROUPS, GROUP_PAD)
        mask_TC = (row_T < valid)[:, None] & is_expert_C[None, :]
        logits_TC = tl.load(logits_ptr + (row_T.to(tl.int64)[:, None] * E + expert_C[None, :]), mask=mask_TC, other=0).to(tl.float32)
    else:
        H: tl.constexpr = C // LANES // 4
        word_LH = tl.arange(0, LANES)[:, None] * H + tl.arange(0, H)[None, :]
        column_LH4 = word_LH[None, :, :, None] * 4 + tl.arange(0, 4)[None, None, None, :]
        expert_LH4, is_expert_LH4 = expert_at(column_LH4, E, NUM_GROUPS, GROUP_PAD)
        at_TLH4 = tl.max_contiguous(row_T.to(tl.int64)[:, None, None, None] * E + expert_LH4, (1, 2, 1, 4 if E % 4 == 0 else 1))
        logits_TLH4 = tl.load(logits_ptr + at_TLH4, mask=(row_T < valid)[:, None, None, None] & is_expert_LH4, other=0)
        logits_TC = tl.reshape(logits_TLH4.to(tl.float32), (T, C))
    return logits_TC


@triton.jit
def valid_rows(num_valid_ptr, num_tokens):
    valid = num_tokens
    if num_valid_ptr is not None:
        valid = tl.maximum(tl.minimum(tl.load(num_valid_ptr), num_tokens), 0)
    return valid


@triton.jit
def load_bias(bias_ptr, expert_C, is_expert_C, C: tl.constexpr):
    bias_C = tl.zeros((C,), tl.float32)
    if bias_ptr is not None:
        bias_C = tl.load(bias_ptr + expert_C, mask=is_expert_C, other=0)
    return bias_C


@triton.jit
def ordered(x):
    """float32 -> int32 of the same order; both zeros are 0."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == 0, 0, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def value_of(key):
    """The float32 whose ordered() is key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def high_half(x):
    """A float32 without its low 16 bits, which a packed key spoils."""
    return (x.to(tl.int32, bitcast=True) & HIGH_HALF).to(tl.float32, bitcast=True)


@triton.jit
def in_best_groups(
    choice_TC, T: tl.constexpr, C: tl.constexpr, NUM_GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, GROUP_PAD: tl.constexpr
):
    """Whether a column's group is among the TOP_GROUPS best by the sum of its two best choices. Columns that are no expert hold -inf."""
    G: tl.constexpr = C // GROUP_PAD
    choice_TGI = tl.reshape(choice_TC, (T, G, GROUP_PAD))
    best_TG = tl.max(choice_TGI, 2)
    is_best_TGI = choice_TGI == best_TG[:, :, None]
    next_TG = tl.max(tl.where(is_best_TGI, float("-inf"), choice_TGI), 2)
    second_TG = tl.where(tl.sum(is_best_TGI.to(tl.int32), 2) > 1, best_TG, next_TG)
    group = tl.arange(0, G)[None, :]
    worth_TG = tl.where(group < NUM_GROUPS, ordered(best_TG + second_TG), LOWEST)
    # A group's position by counting who beats it, one group after the other: none waits for the one before.
    position_TG = tl.zeros((T, G), tl.int32)
    for g in tl.static_range(NUM_GROUPS):
        other_T = tl.max(tl.where(group == g, worth_TG, LOWEST), 1)[:, None]
        position_TG += ((other_T > worth_TG) | ((other_T == worth_TG) & (group > g))).to(tl.int32)
    is_in_TGI = tl.broadcast_to((position_TG < TOP_GROUPS).to(tl.int32)[:, :, None], (T, G, GROUP_PAD))
    return tl.reshape(is_in_TGI, (T, C)) != 0


@triton.jit
def row_sum(x_TC, T: tl.constexpr, C: tl.constexpr):
    """Sums of rows, neighbours first: the same bits in every layout, and with zeros behind or between, so whatever C a plan takes."""
    for level in tl.static_range(1, 10):  # up to 512 columns
        if C >> level > 0:
            x_TC = tl.sum(tl.reshape(x_TC, (T, C >> level, 2)), 2)
    return tl.reshape(x_TC, (T,))


@triton.jit
def scores(logits_TC, is_expert_TC, T: tl.constexpr, C: tl.constexpr, IS_SIGMOID: tl.constexpr):
    """Softmax over the row's experts or sigmoid, float32; 0 in columns that are no expert."""
    if IS_SIGMOID:
        score_TC = tl.where(is_expert_TC, 1 / (1 + tl.exp(-logits_TC)), 0.0)
    else:
        peak_T = tl.max(tl.where(is_expert_TC, logits_TC, float("-inf")), 1)
        exp_TC = tl.where(is_expert_TC, tl.exp(logits_TC - peak_T[:, None]), 0.0)
        score_TC = exp_TC / row_sum(exp_TC, T, C)[:, None]
    return score_TC


@triton.jit
def choose(
    logits_TC,
    bias_C,
    is_expert_C,
    T: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_BF16: tl.constexpr,
    IS_SIGMOID: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUP_PAD: tl.constexpr,
):
    """(rank_TC, value_TC, peak_T, sum_T, won_TC, column_TL, best_TL); what a caller does not use costs nothing.

    value: the score where the choice needs it (BY_SCORE), else the logit; peak: the row's largest logit; sum: the chosen scores';
    won: whether a column was chosen; column, best: lane k has the column that won round k and its key's value (the logit, unless BY_SCORE).
    """
    lane = tl.arange(0, LANES)[None, :]
    column_TL = tl.zeros((T, LANES), tl.int32)
    best_TL = tl.zeros((T, LANES), tl.float32)
    is_expert_TC = tl.broadcast_to(is_expert_C[None, :], (T, C))
    # Softmax and sigmoid keep the logits' order, so the scores are needed before the choice only for a bias or for groups' sums.
    BY_SCORE: tl.constexpr = HAS_BIAS or NUM_GROUPS > 1
    IS_PACKED: tl.constexpr = IS_BF16 and not BY_SCORE
    may_win_TC = is_expert_TC
    if BY_SCORE:
        value_TC = scores(logits_TC, is_expert_TC, T, C, IS_SIGMOID)
        choice_TC = tl.where(is_expert_TC, value_TC + bias_C[None, :], float("-inf"))
        if NUM_GROUPS > 1:
            may_win_TC = may_win_TC & in_best_groups(choice_TC, T, C, NUM_GROUPS, TOP_GROUPS, GROUP_PAD)
        key_TC = ordered(choice_TC)
    else:
        value_TC = logits_TC
        key_TC = ordered(logits_TC)
        if IS_PACKED:  # the value's 16 bits above, the column below: one maximum finds both
            key_TC = (key_TC & HIGH_HALF) | (65535 - tl.arange(0, C)[None, :])
    key_TC = tl.where(may_win_TC, tl.maximum(key_TC, LOWEST + 1), LOWEST)
    peak_T = tl.zeros((T,), tl.float32)
    sum_T = tl.zeros((T,), tl.float32)
    # By lanes of R columns each: a maximum of registers, then one of the warp; what a row has but once then lies once in each lane.
    R: tl.constexpr = C // LANES
    key_TLR, column_LR = tl.reshape(key_TC, (T, LANES, R)), tl.reshape(tl.arange(0, C), (LANES, R))[None, :, :]
    bits_TLR = tl.reshape(value_TC.to(tl.int32, bitcast=True), (T, LANES, R))
    rank_TLR = tl.full((T, LANES, R), K, tl.int32)
    for k in tl.static_range(K):
        best_T = tl.max(tl.max(key_TLR, 2), 1)
        if IS_PACKED:
            is_best_TLR = key_TLR == best_T[:, None, None]
            column_T = 65535 - (best_T & 65535)
            best = high_half(value_of(best_T & HIGH_HALF))
        else:
            column_T = tl.min(tl.min(tl.where(key_TLR == best_T[:, None, None], column_LR, C), 2), 1)
            is_best_TLR = column_LR == column_T[:, None, None]
            best = value_of(best_T)
        rank_TLR = tl.where(is_best_TLR, k, rank_TLR)
        key_TLR = tl.where(is_best_TLR, LOWEST, key_TLR)
        column_TL = tl.where(lane == k, column_T[:, None], column_TL)
        best_TL = tl.where(lane == k, best[:, None], best_TL)
        if BY_SCORE:  # a sum of bits with one term: an integer's reduction is one instruction, a float's is five
            sum_T += tl.sum(tl.sum(tl.where(is_best_TLR, bits_TLR, 0), 2), 1).to(tl.float32, bitcast=True)
        elif IS_SIGMOID:
            sum_T += 1 / (1 + tl.exp(-best))
        else:
            if k == 0:
                peak_T = best
            sum_T += tl.exp(best - peak_T)
    won_TC = tl.reshape(key_TLR == LOWEST, (T, C)) & may_win_TC
    return tl.reshape(rank_TLR, (T, C)), value_TC, peak_T, sum_T, won_TC, column_TL, best_TL


@triton.jit
def weigh(
    value_TC, peak_T, sum_T, is_expert_C, T: tl.constexpr, C: tl.constexpr, BY_SCORE: tl.constexpr, IS_SIGMOID: tl.constexpr,
    NORMALISE: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Weights of all columns, from what choose() returned; those of the chosen are what the gate gives."""
    if BY_SCORE:
        score_TC = value_TC
    elif IS_SIGMOID:
        score_TC = 1 / (1 + tl.exp(-value_TC))
    else:
        score_TC = tl.where(is_expert_C[None, :], tl.exp(value_TC - peak_T[:, None]), 0.0)
    weight_TC = score_TC * SCALE
    if NORMALISE:  # 1e-20 as DeepSeek-V3: no division by zero where every chosen score underflows
        weight_TC = weight_TC / (sum_T + 1e-20)[:, None]
    elif not (BY_SCORE or IS_SIGMOID):
        weight_TC = weight_TC / row_sum(score_TC, T, C)[:, None]
    return weight_TC


@triton.jit
def in_lanes(at_TL):
    """Addresses of scattered stores, said to lie as lanes do, each at a multiple of one: Triton then keeps one value a lane and writes no
    two at once."""
    return tl.max_contiguous(tl.multiple_of(at_TL.to(tl.int64), (1, 1)), (1, LANES))


@triton.jit
def at_columns(x_TC, column_TL, T: tl.constexpr, C: tl.constexpr):
    """x of these columns, int32: one shuffle for each of a lane's columns."""
    R: tl.constexpr = C // LANES
    r_R = tl.arange(0, R)[None, None, :]
    x_TLR = tl.reshape(x_TC, (T, LANES, R))
    found_TL = tl.zeros((T, LANES), tl.int32)
    for r in tl.static_range(R):
        x_TL = tl.sum(tl.where(r_R == r, x_TLR, 0), 2)  # a lane's column number r, no sum in truth
        found_TL = tl.where(column_TL % R == r, tl.gather(x_TL, column_TL // R, 1), found_TL)
    return found_TL


@triton.jit
def weigh_chosen(
    logits_TC, value_TC, best_TL, column_TL, peak_T, sum_T, is_expert_C, T: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    BY_SCORE: tl.constexpr, IS_SIGMOID: tl.constexpr, NORMALISE: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """weigh() of the chosen alone: lane k has the weight of round k's column."""
    if BY_SCORE:
        score_TL = at_columns(value_TC.to(tl.int32, bitcast=True), column_TL, T, C).to(tl.float32, bitcast=True)
        if NORMALISE:  # in choose()'s order; a sum of bits with one term is one instruction
            lane = tl.arange(0, LANES)[None, :]
            sum_T = tl.zeros_like(sum_T)
            for k in tl.static_range(K):
                sum_T += tl.sum(tl.where(lane == k, score_TL.to(tl.int32, bitcast=True), 0), 1).to(tl.float32, bitcast=True)
    elif IS_SIGMOID:
        score_TL = 1 / (1 + tl.exp(-best_TL))
    else:
        score_TL = tl.exp(best_TL - peak_T[:, None])
    weight_TL = score_TL * SCALE
    if NORMALISE:  # 1e-20 as DeepSeek-V3: no division by zero where every chosen score underflows
        weight_TL = weight_TL / (sum_T + 1e-20)[:, None]
    elif not (BY_SCORE or IS_SIGMOID):
        exp_TC = tl.where(is_expert_C[None, :], tl.exp(logits_TC - peak_T[:, None]), 0.0)
        weight_TL = weight_TL / row_sum(exp_TC, T, C)[:, None]
    return weight_TL


@triton.jit
def chosen_before(ids_ptr, row_T, is_row_T, expert_C, is_expert_C, K: tl.constexpr, T: tl.constexpr, C: tl.constexpr):
    """rank_TC of experts chosen by an earlier kernel, from ids [T, K]; an id of -1 is nobody's."""
    rank_TC = tl.full((T, C), K, tl.int32)
    for k in tl.static_range(K):
        id_T = tl.load(ids_ptr + row_T.to(tl.int64) * K + k, mask=is_row_T, other=-1)
        rank_TC = tl.where((expert_C[None, :] == id_T[:, None]) & is_expert_C[None, :], k, rank_TC)
    return rank_TC


@triton.jit
def write_choice(weights_ptr, ids_ptr, expert_C, rank_TC, weight_TC, row_T, valid, num_tokens, K: tl.constexpr):
    """Weights and ids of these rows, each by the thread that has its column: nothing moves between threads. Weight 0 in padding.

    Scattered stores (here and in _gate_order) are said to lie in fours, as a row's loads do: Triton then keeps the loads' layout, where
    otherwise all would move through shared memory. Their masks, of which it knows nothing, keep it from writing four at once.
    """
    at_TC = tl.max_contiguous(tl.multiple_of(row_T.to(tl.int64)[:, None] * K + rank_TC, (1, 4)), (1, 4))
    is_at_TC = (row_T < num_tokens)[:, None] & (rank_TC < K)
    tl.store(weights_ptr + at_TC, tl.where((row_T < valid)[:, None], weight_TC, 0.0), mask=is_at_TC)
    tl.store(ids_ptr + at_TC, tl.broadcast_to(expert_C[None, :], rank_TC.shape), mask=is_at_TC)
