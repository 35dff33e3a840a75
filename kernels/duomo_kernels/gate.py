"""Owns the gate: from logits to who goes where, in one kernel up to 1,024 tokens. Knows nothing of the experts' weights.

    score = softmax(logits) or sigmoid(logits); in each row the K best by score (+ bias, within the best groups): GateRule
    counts_E = histogram; places by a stable sort of (expert, routed index); tiles of TILE_ROWS places: Routing

Fused (up to FUSED_TOKENS of _gate_plan): program p chooses for its rows, puts its histogram on a board (_grid_board), reads the others' as
they come and places its own choices, which it still has in registers. Up to SOLO_TOKENS rows are one program, without the board.
Beyond, successive kernels: choose, then place from the ids (_gate_many; _gate_split with groups, bias or a capacity). The experts take
hundreds of microseconds there and a launch about one, and programs as large as throughput asks must not hold multiprocessors and wait.

Deterministic: integer sums and maxima, and float sums in an order that no timing changes. Padding (rows from num_valid on): read as zeros,
so ids are valid; weight 0, place R, in no count.

Legend: T rows of one program in kernels, tokens elsewhere; C columns (_gate_choice), E experts, K experts a token, P programs,
R = tokens * K.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._gate_capacity import Capacity, Overflow, capacity_reference, drop_rows, write_overflow
from ._gate_choice import choose, expert_at, load_bias, load_logits, valid_rows, weigh, write_choice
from ._gate_order import capacity_limit, exchanged, own_tag, place_columns, places_and_tiles, publish, write_order
from ._gate_plan import columns_of, plan_of, split_plan
from ._gate_split import Call
from ._grid_board import board
from ._launch import check, is_interpreted, pdl_options, start_next, wait_for_previous
from ._routing import GateRule, Routing, max_tiles, routing_reference


def gate_reference(
    logits_TE: Tensor,
    rule: GateRule,
    *,
    tile_rows: int,
    bias_E: Tensor | None = None,
    num_valid: int | None = None,
    capacity: Capacity | None = None,
    overflow: Overflow | None = None,
) -> Routing:
    """The same in float64 by full stable sorts; with a capacity, its sequential definition, which fills `overflow`."""
    num_tokens, num_experts = logits_TE.shape
    valid = num_tokens if num_valid is None else min(num_valid, num_tokens)
    logits_TE = torch.where(torch.arange(num_tokens, device=logits_TE.device)[:, None] < valid, logits_TE.double(), 0.0)
    scores_TE = logits_TE.softmax(-1) if rule.scoring == "softmax" else logits_TE.sigmoid()
    is_allowed_TE = torch.ones_like(scores_TE, dtype=torch.bool)
    choice_TE = logits_TE  # of the scores' order, and exact
    if bias_E is not None or rule.num_groups > 1:
        choice_TE = scores_TE if bias_E is None else scores_TE + bias_E.double()
    if rule.num_groups > 1:
        worth_TG = choice_TE.unflatten(-1, (rule.num_groups, -1)).topk(2, -1).values.sum(-1)
        groups = worth_TG.sort(dim=-1, descending=True, stable=True).indices[:, : rule.top_groups]
        is_in_TG = torch.zeros_like(worth_TG, dtype=torch.bool).scatter_(1, groups, True)
        is_allowed_TE = is_in_TG.repeat_interleave(num_experts // rule.num_groups, dim=1)
        choice_TE = choice_TE.masked_fill(~is_allowed_TE, -torch.inf)
    ids_TK = choice_TE.sort(dim=-1, descending=True, stable=True).indices[:, : rule.top_k]
    weights_TK = scores_TE.gather(1, ids_TK)
    if rule.normalise:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    weights_TK = weights_TK * rule.routed_scale
    weights_TK[valid:] = 0
    if capacity is None:
        return routing_reference(ids_TK, weights_TK, num_experts, tile_rows, valid)
    assert overflow is not None, "a capacity needs an Overflow to report to"
    scores_TE = scores_TE.masked_fill(~is_allowed_TE, -1.0)
    return capacity_reference(ids_TK, weights_TK, scores_TE, valid, tile_rows=tile_rows, capacity=capacity, overflow=overflow)


@triton.jit(do_not_specialize=["num_tokens"])
def _fused_kernel(
    logits_ptr, bias_ptr, num_valid_ptr, weights_ptr, ids_ptr, counts_ptr, offsets_ptr, routed_ptr, place_ptr, tiles_ptr, num_tiles_ptr,
    overflow_ptr, dropped_ptr, rerouted_ptr, exceeded_ptr, lost_ptr, hist_ptr, num_tokens,
    E: tl.constexpr, K: tl.constexpr, T: tl.constexpr, C: tl.constexpr, P: tl.constexpr, TILE_ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr, IS_BF16: tl.constexpr, IS_SIGMOID: tl.constexpr, NORMALISE: tl.constexpr, SCALE: tl.constexpr,
    NUM_GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, GROUP_PAD: tl.constexpr,
    HAS_CAPACITY: tl.constexpr, IS_DROPPING: tl.constexpr, NUMERATOR: tl.constexpr, DENOMINATOR: tl.constexpr, WAITS: tl.constexpr,
    USE_PDL: tl.constexpr,
):  # fmt: skip
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    expert_C, is_expert_C = expert_at(tl.arange(0, C), E, NUM_GROUPS, GROUP_PAD)
    bias_C = load_bias(bias_ptr, expert_C, is_expert_C, C)  # a weight: no kernel before this one writes it
    row_T = program * T + tl.arange(0, T)
    wait_for_previous(USE_PDL)
    valid = valid_rows(num_valid_ptr, num_tokens)
    if P > 1:
        tag = own_tag(hist_ptr, program, C)
    logits_TC = load_logits(logits_ptr, row_T, valid, E, NUM_GROUPS, GROUP_PAD, T, C)
    rank_TC, value_TC, peak_T, sum_T = choose(
        logits_TC, bias_C, is_expert_C, T, C, E, K, HAS_BIAS, IS_BF16, IS_SIGMOID, NUM_GROUPS, TOP_GROUPS, GROUP_PAD
    )
    counted_TC = ((rank_TC < K) & (row_T < valid)[:, None]).to(tl.int32)
    total_C = tl.sum(counted_TC, 0)
    if P > 1:
        publish(hist_ptr, total_C, tag, program, C)
    start_next(USE_PDL)
    # All that needs no other program's histogram, while those are on their way.
    weight_TC = weigh(value_TC, peak_T, sum_T, is_expert_C, HAS_BIAS or NUM_GROUPS > 1, IS_SIGMOID, NORMALISE, SCALE)
    write_choice(weights_ptr, ids_ptr, expert_C, rank_TC, weight_TC, row_T, valid, num_tokens, K)
    nth_TC = tl.cumsum(counted_TC, 0) - counted_TC
    if P > 1:
        total_C, before_C = exchanged(hist_ptr, tag, program, num_programs, P, C, WAITS)
        nth_TC += before_C[None, :]
    limit, kept_C, num_kept = num_tokens, total_C, valid * K
    if HAS_CAPACITY:
        limit = capacity_limit(valid, K, E, NUMERATOR, DENOMINATOR)
        if IS_DROPPING:
            kept_C = tl.minimum(total_C, limit)
            num_kept = tl.sum(kept_C, 0)
    offset_TC, first_TC, num_TC = places_and_tiles(kept_C, T, C, TILE_ROWS)
    index_TC, is_over_TC = place_columns(
        routed_ptr, place_ptr, rank_TC, counted_TC, nth_TC, row_T, num_tokens, offset_TC, num_kept, limit, K, IS_DROPPING
    )
    write_order(
        counts_ptr, offsets_ptr, num_tiles_ptr, tiles_ptr, total_C, kept_C, offset_TC, first_TC, num_TC, expert_C, is_expert_C, program,
        num_programs, E, T, C, TILE_ROWS,
    )  # fmt: skip
    if HAS_CAPACITY:
        drop_rows(weights_ptr, lost_ptr, index_TC, is_over_TC, row_T, num_tokens)
        if program == num_programs - 1:
            write_overflow(overflow_ptr, dropped_ptr, rerouted_ptr, exceeded_ptr, total_C, limit, expert_C, is_expert_C, IS_DROPPING)


def empty_routing(num_tokens: int, top_k: int, num_experts: int, tile_rows: int, device: torch.device) -> Routing:
    """Tensors for gate(out=...), not written."""
    num_routed = num_tokens * top_k

    def int32(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    return Routing(
        weights_TK=torch.empty(num_tokens, top_k, dtype=torch.float32, device=device),
        ids_TK=int32(num_tokens, top_k),
        counts_E=int32(num_experts),
        offsets_E1=int32(num_experts + 1),
        routed_R=int32(num_routed),
        place_R=int32(num_routed),
        tiles_M5=int32(max_tiles(num_routed, num_experts, tile_rows), 5),
        num_tiles=int32(1),
        tile_rows=tile_rows,
    )


def _check_out(out: Routing, num_tokens: int, top_k: int, num_experts: int, device: torch.device) -> None:
    num_routed = num_tokens * top_k
    check("weights_TK", out.weights_TK, torch.float32, num_tokens, top_k, device=device)
    check("ids_TK", out.ids_TK, torch.int32, num_tokens, top_k, device=device)
    check("counts_E", out.counts_E, torch.int32, num_experts, device=device)
    check("offsets_E1", out.offsets_E1, torch.int32, num_experts + 1, device=device)
    check("routed_R", out.routed_R, torch.int32, num_routed, device=device)
    check("place_R", out.place_R, torch.int32, num_routed, device=device)
    check("tiles_M5", out.tiles_M5, torch.int32, max_tiles(num_routed, num_experts, out.tile_rows), 5, device=device)
    check("num_tiles", out.num_tiles, torch.int32, 1, device=device)


def _check_rule(rule: GateRule, num_experts: int) -> None:
    assert num_experts <= 512 and rule.top_k <= min(16, num_experts), (num_experts, rule)
    per_group = num_experts // rule.num_groups
    assert per_group * rule.num_groups == num_experts, f"{num_experts} experts in {rule.num_groups} groups"
    is_right = rule.num_groups == 1 or (per_group >= 2 and rule.top_k <= rule.top_groups * per_group)
    assert is_right, f"{rule}: a group is worth its two best, and K must fit into the groups that stay"


def gate(
    logits_TE: Tensor,
    rule: GateRule,
    *,
    tile_rows: int,
    bias_E: Tensor | None = None,
    num_valid: Tensor | None = None,
    capacity: Capacity | None = None,
    overflow: Overflow | None = None,
    is_invariant: bool = False,
    out: Routing | None = None,
) -> Routing:
    """logits [T, E] float32 or bfloat16 (E up to 512, K up to 16) -> Routing; bias [E] float32; num_valid [1] int32 on the device.

    With a capacity, `overflow` (Overflow.empty) takes its counters. is_invariant: a row's weights have the same bits for every T, which
    the fastest kernels beyond FUSED_TOKENS do not promise. Capturable after one eager call.
    """
    (num_tokens, num_experts), device = logits_TE.shape, logits_TE.device
    assert logits_TE.dtype in (torch.float32, torch.bfloat16), f"logits_TE: dtype {logits_TE.dtype}"
    check("logits_TE", logits_TE, logits_TE.dtype, None, None)
    _check_rule(rule, num_experts)
    if bias_E is not None:
        check("bias_E", bias_E, torch.float32, num_experts, device=device)
    if num_valid is not None:
        check("num_valid", num_valid, torch.int32, 1, device=device)
    out = empty_routing(num_tokens, rule.top_k, num_experts, tile_rows, device) if out is None else out
    assert out.tile_rows == tile_rows, (out.tile_rows, tile_rows)
    _check_out(out, num_tokens, rule.top_k, num_experts, device)
    assert (capacity is None) == (overflow is None), "a capacity needs an Overflow to report to"
    if overflow is not None:
        overflow.check(num_tokens, num_experts, device)
    columns, group_pad = columns_of(num_experts, rule.num_groups)
    call = Call(
        logits_TE=logits_TE,
        rule=rule,
        bias_E=bias_E,
        num_valid=num_valid,
        capacity=capacity,
        overflow=overflow,
        out=out,
        group_pad=group_pad,
    )
    plan = plan_of(num_tokens, columns, device)
    if capacity is not None and capacity.overflow == "reroute":
        call.run_rerouted(split_plan(num_tokens, columns))
    elif not plan.is_fused:
        call.run_split(plan, is_invariant)
    else:
        is_solo = plan.programs == 1
        _fused_kernel[(plan.programs,)](
            logits_TE, bias_E, num_valid, out.weights_TK, out.ids_TK, *call.order(), *call.counters(),
            None if is_solo else board(device).take(plan.programs, plan.C), num_tokens,
            E=num_experts, WAITS=not is_interpreted(), T=plan.T, C=plan.C, P=triton.next_power_of_2(plan.programs), TILE_ROWS=tile_rows,
            num_warps=plan.num_warps, maxnreg=plan.max_registers,
            **call.choice_constants(), **call.capacity_constants(capacity), **pdl_options(device),
        )  # fmt: skip
    return out
