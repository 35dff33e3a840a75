"""Owns what a gate does when an expert gets more than its share: its definition, its counters, the kernels' parts. Knows no logits' source.

    limit = ceil(factor * valid tokens * K / E), in exact fractions; an expert's first `limit` assignments by routed index stay, the
    others overflow

    drop      overflow leaves: place R, weight 0; the weights that stay are not renormalised
    residual  as drop; the layer adds lost_T[t] * x[t], so that a token keeps what its lost experts would have weighed
    reroute   overflow, in order of routed index, goes to the least loaded (then lowest) expert that is under the limit, that the token does
              not have, in a group that it may use, and whose score is at least `near` times the chosen one's; dropped where there is none.
              Loads start at what stays. Its weight becomes weight * new score / chosen score. (LASER, arXiv 2510.03293, moves tokens among
              near-tied scores so too.)
    error     nothing moves; `exceeded` says so. The host reads it after the step

Legend: T rows of one program in kernels, C columns (_gate_choice), E experts, K experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._gate_choice import chosen_before, expert_at, in_best_groups, load_bias, load_logits, scores, valid_rows
from ._gate_order import capacity_limit, totals
from ._launch import check, wait_for_previous
from ._routing import Routing, max_tiles, routing_reference

MAX_DENOMINATOR = 1000  # of the factor as a fraction: 1.1 means 11/10, not the binary number next to it


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """factor 1 is an expert's even share. near: the least share of the chosen score at which reroute takes another expert."""

    factor: float
    overflow: Literal["drop", "residual", "reroute", "error"] = "drop"
    near: float = 0.8

    def __post_init__(self) -> None:
        assert self.factor > 0 and 0 < self.near <= 1, self

    @property
    def fraction(self) -> Fraction:
        return Fraction(self.factor).limit_denominator(MAX_DENOMINATOR)


@dataclass(frozen=True, kw_only=True, slots=True)
class Overflow:
    """What a gate with a capacity reports, written whole by each call. The caller owns the tensors.

    overflow_E [E]: assignments over the limit; dropped, rerouted, exceeded [1] int32; lost_T [T] float32: weight that a token lost.
    """

    overflow_E: Tensor
    dropped: Tensor
    rerouted: Tensor
    exceeded: Tensor
    lost_T: Tensor

    @classmethod
    def empty(cls: type[Overflow], num_tokens: int, num_experts: int, device: torch.device) -> Overflow:
        ones = [torch.empty(1, dtype=torch.int32, device=device) for _ in range(3)]
        return cls(
            overflow_E=torch.empty(num_experts, dtype=torch.int32, device=device),
            dropped=ones[0],
            rerouted=ones[1],
            exceeded=ones[2],
            lost_T=torch.empty(num_tokens, dtype=torch.float32, device=device),
        )

    def check(self, num_tokens: int, num_experts: int, device: torch.device) -> None:
        check("overflow_E", self.overflow_E, torch.int32, num_experts, device=device)
        for name in ("dropped", "rerouted", "exceeded"):
            check(name, getattr(self, name), torch.int32, 1, device=device)
        check("lost_T", self.lost_T, torch.float32, num_tokens, device=device)


def capacity_reference(
    ids_TK: Tensor, weights_TK: Tensor, scores_TE: Tensor, valid: int, *, tile_rows: int, capacity: Capacity, overflow: Overflow
) -> Routing:
    """The definition above, step by step. scores_TE: below 0 where the token may not go."""
    (num_tokens, top_k), num_experts = ids_TK.shape, scores_TE.shape[1]
    share = capacity.fraction * valid * top_k / num_experts
    limit = -(-share.numerator // share.denominator)
    ids, weights = ids_TK.flatten().tolist(), weights_TK.double().flatten().tolist()
    loads, over, kept = [0] * num_experts, [], [False] * len(ids)
    counts = [ids[: valid * top_k].count(e) for e in range(num_experts)]
    for i in range(valid * top_k):
        kept[i] = loads[ids[i]] < limit or capacity.overflow == "error"
        loads[ids[i]] += kept[i]
        if not kept[i]:
            over.append(i)
    lost, rerouted = [0.0] * num_tokens, 0
    for i in over:
        token = i // top_k
        to = None
        if capacity.overflow == "reroute":
            near = capacity.near * scores_TE[token, ids[i]]
            taken = set(ids[token * top_k : (token + 1) * top_k])
            open_to = [e for e in range(num_experts) if e not in taken and loads[e] < limit and scores_TE[token, e] >= near]
            to = min(open_to, key=lambda e: loads[e], default=None)
        if to is None:
            lost[token] += weights[i]
            weights[i] = 0.0
        else:
            weights[i] *= float(scores_TE[token, to] / scores_TE[token, ids[i]])
            ids[i], kept[i] = to, True
            loads[to] += 1
            rerouted += 1
    excess = [max(count - limit, 0) for count in counts]
    overflow.overflow_E.copy_(torch.tensor(excess))
    overflow.dropped.fill_(0 if capacity.overflow == "error" else len(over) - rerouted)
    overflow.rerouted.fill_(rerouted)
    overflow.exceeded.fill_(int(sum(excess) > 0))
    overflow.lost_T.copy_(torch.tensor(lost))
    return _routing_of(ids, weights, kept, counts, tile_rows, ids_TK)


def _routing_of(ids: list[int], weights: list[float], kept: list[bool], counts: list[int], tile_rows: int, like_TK: Tensor) -> Routing:
    """routing_reference of those that stay, with their indices among all."""
    num_routed, stays = len(ids), [i for i in range(len(ids)) if kept[i]]
    compact = torch.tensor([ids[i] for i in stays], dtype=torch.int64).reshape(-1, 1)
    part = routing_reference(compact, compact, len(counts), tile_rows)
    places = [num_routed] * num_routed
    for i, place in zip(stays, part.place_R.tolist(), strict=True):
        places[i] = place
    routed = [stays[j] for j in part.routed_R.tolist()] + [num_routed] * (num_routed - len(stays))
    rows = max_tiles(num_routed, len(counts), tile_rows)
    tiles = part.tiles_M5.tolist()[: int(part.num_tiles)]

    def int32(values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=like_TK.device)

    return Routing(
        weights_TK=torch.tensor(weights, dtype=torch.float32, device=like_TK.device).reshape(like_TK.shape),
        ids_TK=int32(ids).reshape(like_TK.shape),
        counts_E=int32(counts),
        offsets_E1=part.offsets_E1.to(like_TK.device),
        routed_R=int32(routed),
        place_R=int32(places),
        tiles_M5=int32(tiles + [[0] * 5] * (rows - len(tiles))).reshape(-1, 5),
        num_tiles=part.num_tiles.to(like_TK.device),
        tile_rows=tile_rows,
    )


@triton.jit
def drop_rows(weights_ptr, lost_ptr, index_TK, is_over_TK, row_T, num_tokens):
    """Take the weights of what left and say how much each token lost."""
    tl.debug_barrier()  # other threads of this program may have written the weights
    weight_TK = tl.load(weights_ptr + index_TK.to(tl.int64), mask=is_over_TK, other=0)
    tl.store(lost_ptr + row_T, tl.sum(weight_TK, 1), mask=row_T < num_tokens)
    tl.debug_barrier()
    tl.store(weights_ptr + index_TK.to(tl.int64), tl.zeros_like(weight_TK), mask=is_over_TK)


@triton.jit
def write_overflow(overflow_ptr, dropped_ptr, rerouted_ptr, exceeded_ptr, total_C, limit, expert_C, is_expert_C, IS_DROPPING: tl.constexpr):
    """The counters where nothing is rerouted."""
    over_C = tl.maximum(total_C - limit, 0)
    num_over = tl.sum(over_C, 0)
    tl.store(overflow_ptr + expert_C, over_C, mask=is_expert_C)
    tl.store(dropped_ptr, num_over if IS_DROPPING else 0)
    tl.store(rerouted_ptr, 0)
    tl.store(exceeded_ptr, (num_over > 0).to(tl.int32))


@triton.jit(do_not_specialize=["num_programs", "num_tokens"])
def reroute_kernel(
    logits_ptr, bias_ptr, num_valid_ptr, weights_ptr, ids_ptr, marked_ptr, place_ptr, counts_ptr,
    overflow_ptr, dropped_ptr, rerouted_ptr, exceeded_ptr, lost_ptr, hist_ptr, num_programs, num_tokens,
    E: tl.constexpr, K: tl.constexpr, T: tl.constexpr, C: tl.constexpr, P: tl.constexpr, NEAR: tl.constexpr,
    NUMERATOR: tl.constexpr, DENOMINATOR: tl.constexpr, IS_WIDE: tl.constexpr, HAS_BIAS: tl.constexpr, IS_SIGMOID: tl.constexpr,
    NUM_GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, GROUP_PAD: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """One program, in order. ids and weights change in place; marked [T, K] is ids with -1 where dropped."""
    NOBODY: tl.constexpr = 2147483647
    column_C = tl.arange(0, C)
    expert_C, is_expert_C = expert_at(tl.arange(0, C), E, NUM_GROUPS, GROUP_PAD)
    wait_for_previous(USE_PDL)
    valid = valid_rows(num_valid_ptr, num_tokens)
    bias_C = load_bias(bias_ptr, expert_C, is_expert_C, C)
    total_C, _ = totals(hist_ptr, 0, num_programs, P, C, IS_WIDE)
    limit = capacity_limit(valid, K, E, NUMERATOR, DENOMINATOR)
    load_C = tl.minimum(total_C, limit)
    seen_C = tl.zeros((C,), tl.int32)
    num_rerouted = 0
    for first_row in range(0, num_tokens, T):
        row_T = first_row + tl.arange(0, T)
        rank_TC = chosen_before(ids_ptr, row_T, row_T < num_tokens, expert_C, is_expert_C, K, T, C)
        counted_TC = ((rank_TC < K) & (row_T < valid)[:, None]).to(tl.int32)
        nth_TC = seen_C[None, :] + tl.cumsum(counted_TC, 0) - counted_TC
        seen_C += tl.sum(counted_TC, 0)
        index_TC = row_T[:, None] * K + rank_TC
        is_over_TC = (counted_TC > 0) & (nth_TC >= limit)
        tl.store(marked_ptr + index_TC.to(tl.int64), tl.broadcast_to(expert_C[None, :], (T, C)), mask=rank_TC < K)
        tl.debug_barrier()  # before single threads overwrite some of it below
        logits_TC = load_logits(logits_ptr, row_T, valid, E, NUM_GROUPS, GROUP_PAD, T, C)
        is_expert_TC = tl.broadcast_to(is_expert_C[None, :], (T, C))
        score_TC = tl.where(is_expert_TC, scores(logits_TC, is_expert_TC, T, C, IS_SIGMOID), -1.0)
        if NUM_GROUPS > 1:
            choice_TC = tl.where(is_expert_TC, score_TC + bias_C[None, :], float("-inf"))
            score_TC = tl.where(in_best_groups(choice_TC, T, C, NUM_GROUPS, TOP_GROUPS, GROUP_PAD), score_TC, -1.0)
        taken_TC = (rank_TC < K).to(tl.int32)
        lost_T = tl.zeros((T,), tl.float32)
        index = tl.min(tl.min(tl.where(is_over_TC, index_TC, NOBODY), 1), 0)
        while index < NOBODY:
            is_row_T = row_T == index // K
            score_C = tl.sum(tl.where(is_row_T[:, None], score_TC, 0.0), 0)
            taken_C = tl.sum(tl.where(is_row_T[:, None], taken_TC, 0), 0)
            chosen_score = tl.sum(tl.sum(tl.where(is_over_TC & (index_TC == index), score_TC, 0.0), 1), 0)
            is_open_C = (taken_C == 0) & (load_C < limit) & (score_C >= NEAR * chosen_score) & (score_C >= 0)
            best = tl.min(tl.where(is_open_C, load_C * C + column_C, NOBODY), 0)
            is_found = best < NOBODY
            is_to_C = (column_C == best % C) & is_found
            weight = tl.load(weights_ptr + index)
            moved = weight * (tl.sum(tl.where(is_to_C, score_C, 0.0), 0) / chosen_score)
            expert = tl.sum(tl.where(is_to_C, expert_C, 0), 0)
            tl.store(weights_ptr + index, tl.where(is_found, moved, 0.0))
            tl.store(ids_ptr + index, expert, mask=is_found)
            tl.store(marked_ptr + index, tl.where(is_found, expert, -1))
            tl.store(place_ptr + index, num_tokens * K, mask=is_found == 0)
            load_C += is_to_C.to(tl.int32)
            taken_TC += (is_row_T[:, None] & is_to_C[None, :]).to(tl.int32)
            lost_T += tl.where(is_row_T & (is_found == 0), weight, 0.0)
            num_rerouted += is_found.to(tl.int32)
            index = tl.min(tl.min(tl.where(is_over_TC & (index_TC > index), index_TC, NOBODY), 1), 0)
        tl.store(lost_ptr + row_T, lost_T, mask=row_T < num_tokens)
    over_C = tl.maximum(total_C - limit, 0)
    num_over = tl.sum(over_C, 0)
    tl.store(counts_ptr + expert_C, total_C, mask=is_expert_C)
    tl.store(overflow_ptr + expert_C, over_C, mask=is_expert_C)
    tl.store(dropped_ptr, num_over - num_rerouted)
    tl.store(rerouted_ptr, num_rerouted)
    tl.store(exceeded_ptr, (num_over > 0).to(tl.int32))


@triton.jit(do_not_specialize=["num_tokens", "chunks"])
def count_kernel(
    ids_ptr, num_valid_ptr, hist_ptr, num_tokens, chunks,
    E: tl.constexpr, K: tl.constexpr, T: tl.constexpr, C: tl.constexpr, NUM_GROUPS: tl.constexpr, GROUP_PAD: tl.constexpr,
    USE_PDL: tl.constexpr,
):  # fmt: skip
    """Histograms of ids [T, K] that may be -1."""
    program = tl.program_id(0)
    expert_C, is_expert_C = expert_at(tl.arange(0, C), E, NUM_GROUPS, GROUP_PAD)
    wait_for_previous(USE_PDL)
    valid = valid_rows(num_valid_ptr, num_tokens)
    count_C = tl.zeros((C,), tl.int32)
    for chunk in range(chunks):
        row_T = (program * chunks + chunk) * T + tl.arange(0, T)
        rank_TC = chosen_before(ids_ptr, row_T, row_T < valid, expert_C, is_expert_C, K, T, C)
        count_C += tl.sum((rank_TC < K).to(tl.int32), 0)
    tl.store(hist_ptr + program * C + tl.arange(0, C), count_C.to(hist_ptr.dtype.element_ty))
