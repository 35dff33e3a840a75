"""Owns the gate: from logits to who goes where, in one kernel up to 1,024 tokens. Knows nothing of the experts' weights.

    score = softmax(logits) or sigmoid(logits); in each row the K best by score (+ bias, within the best groups): GateRule
    counts_E = histogram; places by a stable sort of (expert, routed index); tiles of TILE_ROWS places: Routing

Fused (up to FUSED_TOKENS of _gate_plan; _gate_fused): program p chooses for its rows, puts its histogram on a board (_grid_board), reads
the others' as they come and places its own choices, which it still has in registers. A few rows are one program, without the board.
Beyond, successive kernels: choose, then place from the ids (_gate_many; _gate_split with groups, bias or a capacity). The experts take
hundreds of microseconds there and a launch about one, and programs as large as throughput asks must not hold multiprocessors and wait.

Deterministic: integer sums and maxima, and float sums in an order that no timing changes. Padding (rows from num_valid on): read as zeros,
so ids are valid; weight 0, place R, in no count.

Legend: tokens T, experts E, experts a token K, R = T * K.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ._gate_capacity import Capacity, Overflow, capacity_reference
from ._gate_exchange import board_dtype
from ._gate_fused import fused_kernel
from ._gate_plan import plan_of, split_plan
from ._gate_split import Call
from ._grid_board import board
from ._launch import check, is_interpreted, pdl_options
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
    call = Call(logits_TE=logits_TE, rule=rule, bias_E=bias_E, num_valid=num_valid, capacity=capacity, overflow=overflow, out=out)
    plan = plan_of(num_tokens, num_experts, rule.num_groups, device)
    if capacity is not None and capacity.overflow == "reroute":
        call.run_rerouted(split_plan(num_tokens, num_experts, rule.num_groups))
    elif not plan.is_fused:
        call.run_split(plan, is_invariant)
    else:
        is_solo = plan.programs == 1
        fused_kernel[(plan.programs,)](
            logits_TE, bias_E, num_valid, out.weights_TK, out.ids_TK, *call.order(), *call.counters(),
            None if is_solo else board(device).take(plan.programs, plan.C).view(board_dtype(plan.C)), num_tokens,
            E=num_experts, WAITS=not is_interpreted(), T=plan.T, C=plan.C, P=triton.next_power_of_2(plan.programs), RUN=plan.run,
            TILE_ROWS=tile_rows, num_warps=plan.num_warps, maxnreg=plan.max_registers,
            **call.choice_constants(plan), **call.capacity_constants(capacity), **pdl_options(device),
        )  # fmt: skip
    return out
