"""Owns a softmax gate's choice inside a kernel, by counting: each program ranks the experts of one token. Knows no rows and no output.

    rank[e] = how many experts e' have a larger logit, or an equal one and a lower index        chosen: rank < K, best first

One comparison of all pairs of experts instead of K rounds that wait for each other. NaN ranks last, with padding: ids stay distinct and
in range. CACHE is ".cg" where a kernel reads logits before its own wait: from L2, never a stale line of L1.

Legend: B experts padded to a power of two BE, K experts a token padded to BK, S rivals compared at once, X any shape.
"""

from __future__ import annotations

import triton
import triton.language as tl

RIVALS = tl.constexpr(128)  # compared at once with all others: bounds the unrolled code where there are many experts


@triton.jit
def logits_at(logits_ptr, token, expert_X, E: tl.constexpr, CACHE: tl.constexpr):
    """The token's logits at these experts; NaN and padding rank last, so that ids stay distinct and in range."""
    found_X = tl.load(logits_ptr + token * E + expert_X, mask=expert_X < E, other=float("-inf"), cache_modifier=CACHE)
    return tl.where(found_X == found_X, found_X, float("-inf"))


@triton.jit
def all_logits(logits_ptr, token, E: tl.constexpr, BE: tl.constexpr, CACHE: tl.constexpr):
    """The token's logits [BE], through a maximum of equal copies: a bare load of so few Triton repeats for each pair that is compared."""
    COPIES: tl.constexpr = 256 // BE if BE < 256 else 1
    expert_CB = tl.zeros([COPIES, 1], tl.int32) + tl.arange(0, BE)[None, :]
    return tl.max(logits_at(logits_ptr, token, expert_CB, E, CACHE), axis=0)


@triton.jit
def ranks(logits_ptr, token, logit_B, E: tl.constexpr, BE: tl.constexpr, CACHE: tl.constexpr):
    """How many experts beat each: a larger logit, or an equal one and a lower index."""
    expert_B = tl.arange(0, BE)
    rank_B = tl.zeros([BE], tl.int32)
    STEP: tl.constexpr = BE if BE < RIVALS else RIVALS
    for first in range(0, BE, STEP):
        rival_S = first + tl.arange(0, STEP)
        rival_logit_S = logit_B if STEP == BE else logits_at(logits_ptr, token, rival_S, E, CACHE)
        is_larger = rival_logit_S[:, None] > logit_B[None, :]
        is_first = (rival_logit_S[:, None] == logit_B[None, :]) & (rival_S[:, None] < expert_B[None, :])
        rank_B += tl.sum((is_larger | is_first).to(tl.int32), axis=0)
    return rank_B


@triton.jit
def choices(logits_ptr, token, scale, E: tl.constexpr, BE: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, NORMALISE: tl.constexpr):
    """(ranks of all experts [BE], ids of the chosen [BK], weights of the chosen [BK]), best first."""
    expert_B = tl.arange(0, BE)
    logit_B = all_logits(logits_ptr, token, E, BE, ".cg")
    rank_B = ranks(logits_ptr, token, logit_B, E, BE, ".cg")
    best = tl.max(logit_B, axis=0)
    score_B = tl.exp(logit_B - best)
    total = tl.sum(tl.where(rank_B < K, score_B, 0.0) if NORMALISE else score_B, axis=0)
    is_kth = rank_B[None, :] == tl.arange(0, BK)[:, None]
    id_K = tl.max(tl.where(is_kth, expert_B[None, :], 0), axis=1)
    weight_K = tl.max(tl.where(is_kth, score_B[None, :], 0.0), axis=1) / total * scale
    return rank_B, id_K, weight_K


@triton.jit
def four_experts(rank_B, first, BE: tl.constexpr):
    """The ids at ranks first .. first + 3, 16 bits each in one int64: one sum for four."""
    place_B = rank_B - first
    is_one = (place_B >= 0) & (place_B < 4)
    return tl.sum(tl.where(is_one, tl.arange(0, BE).to(tl.int64) << ((place_B & 3) * 16).to(tl.int64), 0), axis=0)
