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

    More than 128 columns are loaded as [T, C // 128, 128]: that leaves a row to one warp. As [T, C], warps would share a row that is wider
    than what 32 lanes load at once, and every maximum would go through shared memory.
    """
    if C == 128:
        expert_C, is_expert_C = expert_at(tl.arange(0, C), E, NUM_GROUPS, GROUP_PAD)
        mask_TC = (row_T < valid)[:, None] & is_expert_C[None, :]
        logits_TC = tl.load(logits_ptr + (row_T.to(tl.int64)[:, None] * E + expert_C[None, :]), mask=mask_TC, other=0).to(tl.float32)
    else:
        column_SL = tl.arange(0, C // 128)[None, :, None] * 128 + tl.arange(0, 128)[None, None, :]
        expert_SL, is_expert_SL = expert_at(column_SL, E, NUM_GROUPS, GROUP_PAD)
        mask_TSL = (row_T < valid)[:, None, None] & is_expert_SL
        logits_TSL = tl.load(logits_ptr + (row_T.to(tl.int64)[:, None, None] * E + expert_SL), mask=mask_TSL, other=0)
        logits_TC = tl.reshape(logits_TSL.to(tl.float32), (T, C))
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
    inner = tl.arange(0, GROUP_PAD)[None, None, :]
    choice_TGI = tl.reshape(choice_TC, (T, G, GROUP_PAD))
    best_TG = tl.max(choice_TGI, 2)
    first_TG = tl.min(tl.where(choice_TGI == best_TG[:, :, None], inner, GROUP_PAD), 2)
    second_TG = tl.max(tl.where(inner == first_TG[:, :, None], float("-inf"), choice_TGI), 2)
    group = tl.arange(0, G)
    worth_TG = tl.where((group < NUM_GROUPS)[None, :], ordered(best_TG + second_TG), LOWEST)
    # A group's position by counting who beats it: G * G comparisons, no further rounds.
    mine, other = worth_TG[:, :, None], worth_TG[:, None, :]
    is_beaten = (other > mine) | ((other == mine) & (group[None, None, :] < group[None, :, None]))
    position_TG = tl.sum(is_beaten.to(tl.int32), 2)
    is_in_TGI = tl.broadcast_to((position_TG < TOP_GROUPS).to(tl.int32)[:, :, None], (T, G, GROUP_PAD))
    return tl.reshape(is_in_TGI, (T, C)) != 0


@triton.jit
def scores(logits_TC, is_expert_TC, IS_SIGMOID: tl.constexpr):
    """Softmax over the row's experts or sigmoid, float32; 0 in columns that are no expert."""
    if IS_SIGMOID:
        score_TC = tl.where(is_expert_TC, 1 / (1 + tl.exp(-logits_TC)), 0.0)
    else:
        peak_T = tl.max(tl.where(is_expert_TC, logits_TC, float("-inf")), 1)
        exp_TC = tl.where(is_expert_TC, tl.exp(logits_TC - peak_T[:, None]), 0.0)
        score_TC = exp_TC / tl.sum(exp_TC, 1)[:, None]
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
    """(rank_TC, value_TC, peak_T, sum_T), of which weigh() makes weights once the histogram is on its way.

    value: the score where the choice needs it (BY_SCORE), else the logit; peak: the row's largest logit; sum: the chosen scores'.
    """
    column = tl.arange(0, C)[None, :]
    is_expert_TC = tl.broadcast_to(is_expert_C[None, :], (T, C))
    # Softmax and sigmoid keep the logits' order, so the scores are needed before the choice only for a bias or for groups' sums.
    BY_SCORE: tl.constexpr = HAS_BIAS or NUM_GROUPS > 1
    IS_PACKED: tl.constexpr = IS_BF16 and not BY_SCORE
    may_win_TC = is_expert_TC
    if BY_SCORE:
        value_TC = scores(logits_TC, is_expert_TC, IS_SIGMOID)
        choice_TC = tl.where(is_expert_TC, value_TC + bias_C[None, :], float("-inf"))
        if NUM_GROUPS > 1:
            may_win_TC = may_win_TC & in_best_groups(choice_TC, T, C, NUM_GROUPS, TOP_GROUPS, GROUP_PAD)
        key_TC = ordered(choice_TC)
    else:
        value_TC = logits_TC
        key_TC = ordered(logits_TC)
        if IS_PACKED:  # the value's 16 bits above, the column below: one maximum finds both
            key_TC = (key_TC & HIGH_HALF) | (65535 - column)
    key_TC = tl.where(may_win_TC, tl.maximum(key_TC, LOWEST + 1), LOWEST)
    peak_T = tl.zeros((T,), tl.float32)
    sum_T = tl.zeros((T,), tl.float32)
    rank_TC = tl.full((T, C), K, tl.int32)
    for k in tl.static_range(K):
        best_T = tl.max(key_TC, 1)
        if IS_PACKED:
            is_best_TC = key_TC == best_T[:, None]
            best = high_half(value_of(best_T & HIGH_HALF))
        else:
            column_T = tl.min(tl.where(key_TC == best_T[:, None], column, C), 1)
            is_best_TC = column == column_T[:, None]
            best = value_of(best_T)
        rank_TC = tl.where(is_best_TC, k, rank_TC)
        key_TC = tl.where(is_best_TC, LOWEST, key_TC)
        if BY_SCORE:  # a sum of bits with one term: an integer's reduction is one instruction, a float's is five
            sum_T += tl.sum(tl.where(is_best_TC, value_TC.to(tl.int32, bitcast=True), 0), 1).to(tl.float32, bitcast=True)
        elif IS_SIGMOID:
            sum_T += 1 / (1 + tl.exp(-best))
        else:
            if k == 0:
                peak_T = best
            sum_T += tl.exp(best - peak_T)
    return rank_TC, value_TC, peak_T, sum_T


@triton.jit
def weigh(
    value_TC, peak_T, sum_T, is_expert_C, BY_SCORE: tl.constexpr, IS_SIGMOID: tl.constexpr, NORMALISE: tl.constexpr, SCALE: tl.constexpr
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
        weight_TC = weight_TC / tl.sum(score_TC, 1)[:, None]
    return weight_TC


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
