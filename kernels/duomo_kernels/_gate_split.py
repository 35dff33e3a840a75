"""Owns a gate's call where one kernel is not the way: choose, then place, with rerouting in between. Knows no barrier.

The parts are those of the fused kernel; ids in memory stand where it keeps them in registers. Each program does `chunks` chunks of T rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._gate_capacity import Capacity, Overflow, count_kernel, drop_rows, reroute_kernel, write_overflow
from ._gate_choice import choose, chosen_before, expert_at, load_bias, load_logits, valid_rows, weigh, write_choice
from ._gate_many import choose_many_kernel, place_many_kernel, sum_before_kernel
from ._gate_order import capacity_limit, first_places, nth_of_expert, place_rows, totals, write_summary, write_tiles
from ._gate_plan import Plan
from ._launch import pdl_options, start_next, wait_for_previous
from ._routing import GateRule, Routing

MANY_ELEMENTS = 4096  # of a program of _gate_many: 16 in each of 256 threads, so that four programs share a multiprocessor


@triton.jit(do_not_specialize=["num_tokens", "chunks"])
def _choose_kernel(
    logits_ptr, bias_ptr, num_valid_ptr, weights_ptr, ids_ptr, hist_ptr, num_tokens, chunks,
    E: tl.constexpr, K: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
    HAS_BIAS: tl.constexpr, IS_BF16: tl.constexpr, IS_SIGMOID: tl.constexpr, NORMALISE: tl.constexpr, SCALE: tl.constexpr,
    NUM_GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, GROUP_PAD: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    expert_C, is_expert_C = expert_at(tl.arange(0, C), E, NUM_GROUPS, GROUP_PAD)
    bias_C = load_bias(bias_ptr, expert_C, is_expert_C, C)
    wait_for_previous(USE_PDL)
    valid = valid_rows(num_valid_ptr, num_tokens)
    count_C = tl.zeros((C,), tl.int32)
    for chunk in range(chunks):
        row_T = (program * chunks + chunk) * T + tl.arange(0, T)
        logits_TC = load_logits(logits_ptr, row_T, valid, E, NUM_GROUPS, GROUP_PAD, T, C)
        rank_TC, value_TC, peak_T, sum_T, _, _, _ = choose(
            logits_TC, bias_C, is_expert_C, T, C, E, K, HAS_BIAS, IS_BF16, IS_SIGMOID, NUM_GROUPS, TOP_GROUPS, GROUP_PAD
        )
        weight_TC = weigh(value_TC, peak_T, sum_T, is_expert_C, T, C, HAS_BIAS or NUM_GROUPS > 1, IS_SIGMOID, NORMALISE, SCALE)
        write_choice(weights_ptr, ids_ptr, expert_C, rank_TC, weight_TC, row_T, valid, num_tokens, K)
        count_C += tl.sum(((rank_TC < K) & (row_T < valid)[:, None]).to(tl.int32), 0)
    start_next(USE_PDL)
    tl.store(hist_ptr + program * C + tl.arange(0, C), count_C.to(hist_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["num_tokens", "chunks"])
def _place_kernel(
    ids_ptr, num_valid_ptr, weights_ptr, counts_ptr, offsets_ptr, routed_ptr, place_ptr, tiles_ptr, num_tiles_ptr,
    overflow_ptr, dropped_ptr, rerouted_ptr, exceeded_ptr, lost_ptr, hist_ptr, num_tokens, chunks,
    E: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, T: tl.constexpr, C: tl.constexpr, P: tl.constexpr, TILE_ROWS: tl.constexpr,
    NUM_GROUPS: tl.constexpr, GROUP_PAD: tl.constexpr, IS_WIDE: tl.constexpr, COUNTS: tl.constexpr,
    HAS_CAPACITY: tl.constexpr, IS_DROPPING: tl.constexpr, NUMERATOR: tl.constexpr, DENOMINATOR: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    expert_C, is_expert_C = expert_at(tl.arange(0, C), E, NUM_GROUPS, GROUP_PAD)
    wait_for_previous(USE_PDL)
    start_next(USE_PDL)
    valid = valid_rows(num_valid_ptr, num_tokens)
    total_C, before_C = totals(hist_ptr, program, num_programs, P, C, IS_WIDE)
    limit, kept_C = num_tokens, total_C
    if HAS_CAPACITY:
        limit = capacity_limit(valid, K, E, NUMERATOR, DENOMINATOR)
        if IS_DROPPING:
            kept_C = tl.minimum(total_C, limit)
    num_kept = tl.sum(kept_C, 0)
    offset_TC = first_places(kept_C, T, C)
    for chunk in range(chunks):
        row_T = (program * chunks + chunk) * T + tl.arange(0, T)
        rank_TC = chosen_before(ids_ptr, row_T, row_T < num_tokens, expert_C, is_expert_C, K, T, C)
        counted_TC, nth_TC = nth_of_expert(rank_TC, row_T, valid, K)
        index_TK, is_over_TK = place_rows(
            routed_ptr,
            place_ptr,
            rank_TC,
            counted_TC,
            before_C[None, :] + nth_TC,
            row_T,
            valid,
            num_tokens,
            offset_TC,
            num_kept,
            limit,
            K,
            K_PAD,
            T,
            IS_DROPPING,
        )
        before_C += tl.sum(counted_TC, 0)
        if HAS_CAPACITY:
            drop_rows(weights_ptr, lost_ptr, index_TK, is_over_TK, row_T, num_tokens)
    write_tiles(tiles_ptr, expert_C, kept_C, program, num_programs, num_tokens, TILE_ROWS)
    if program == num_programs - 1:
        write_summary(counts_ptr, offsets_ptr, num_tiles_ptr, total_C, kept_C, expert_C, is_expert_C, E, TILE_ROWS, COUNTS)
        if HAS_CAPACITY:
            write_overflow(overflow_ptr, dropped_ptr, rerouted_ptr, exceeded_ptr, total_C, limit, expert_C, is_expert_C, IS_DROPPING)


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One call's checked tensors, and the launches that it becomes where it is not one kernel."""

    logits_TE: Tensor
    rule: GateRule
    bias_E: Tensor | None
    num_valid: Tensor | None
    capacity: Capacity | None
    overflow: Overflow | None
    out: Routing

    def run_split(self, plan: Plan, is_invariant: bool) -> None:
        if self.is_plain and not is_invariant:
            return self._run_many(plan)
        hist_PC = plan.histograms(self.logits_TE.device)
        self._choose(plan, hist_PC)
        self._place(plan, hist_PC, self.out.ids_TK, self.capacity)

    @property
    def is_plain(self) -> bool:
        """Whether _gate_many knows all that is asked."""
        return self.rule.num_groups == 1 and self.bias_E is None and self.capacity is None and self.logits_TE.shape[1] <= 128

    def _run_many(self, plan: Plan) -> None:
        (num_tokens, num_experts), device, out = self.logits_TE.shape, self.logits_TE.device, self.out
        columns = max(triton.next_power_of_2(num_experts), 64)
        rows = MANY_ELEMENTS // columns
        programs = triton.cdiv(num_tokens, rows)
        hist_PW = torch.empty(programs, columns // 4, dtype=torch.int32, device=device)
        before_PC = torch.empty(programs + 1, columns, dtype=torch.int32, device=device)
        nth_TK = torch.empty(num_tokens, self.rule.top_k, dtype=torch.uint8, device=device)
        pdl, choice = pdl_options(device), self.choice_constants(plan)
        shape = {"E": num_experts, "K": self.rule.top_k, "K_PAD": triton.next_power_of_2(self.rule.top_k), "T": rows, "C": columns}
        choose_many_kernel[(programs,)](
            self.logits_TE, self.num_valid, out.weights_TK, out.ids_TK, nth_TK, hist_PW, num_tokens, num_warps=8,
            **shape, **{name: choice[name] for name in ("IS_BF16", "IS_SIGMOID", "NORMALISE", "SCALE")}, **pdl,
        )  # fmt: skip
        sum_before_kernel[(columns // 16,)](hist_PW, before_PC, programs, C=columns, STEP=512, WORDS=4, num_warps=8, **pdl)
        place_many_kernel[(programs,)](
            out.ids_TK, nth_TK, self.num_valid, *self.order(), before_PC, num_tokens, programs, TILE_ROWS=out.tile_rows, num_warps=8,
            **shape, **pdl,
        )  # fmt: skip

    def run_rerouted(self, plan: Plan) -> None:
        """Choose; one program moves the overflow in order; count and place what came of it."""
        assert self.capacity is not None
        (num_tokens, num_experts), device = self.logits_TE.shape, self.logits_TE.device
        hist_PC, moved_PC = plan.histograms(device), plan.histograms(device)
        marked_TK = torch.empty_like(self.out.ids_TK)
        self._choose(plan, hist_PC)
        constants = self.capacity_constants(self.capacity)
        rule = {name: value for name, value in self.choice_constants(plan).items() if name not in ("IS_BF16", "NORMALISE", "SCALE")}
        reroute_kernel[(1,)](
            self.logits_TE, self.bias_E, self.num_valid, self.out.weights_TK, self.out.ids_TK, marked_TK, self.out.place_R,
            self.out.counts_E, *self.counters(), hist_PC, plan.programs, num_tokens,
            E=num_experts, T=8, C=plan.C, P=triton.next_power_of_2(plan.programs), NEAR=self.capacity.near,
            NUMERATOR=constants["NUMERATOR"], DENOMINATOR=constants["DENOMINATOR"], IS_WIDE=plan.is_wide, num_warps=4,
            **rule, **pdl_options(device),
        )  # fmt: skip
        count_kernel[(plan.programs,)](
            marked_TK, self.num_valid, moved_PC, num_tokens, plan.chunks,
            E=num_experts, K=self.rule.top_k, T=plan.T, C=plan.C, NUM_GROUPS=self.rule.num_groups, GROUP_PAD=plan.group_pad,
            num_warps=plan.num_warps, **pdl_options(device),
        )  # fmt: skip
        self._place(plan, moved_PC, marked_TK, None)

    def _choose(self, plan: Plan, hist_PC: Tensor) -> None:
        _choose_kernel[(plan.programs,)](
            self.logits_TE, self.bias_E, self.num_valid, self.out.weights_TK, self.out.ids_TK, hist_PC, self.logits_TE.shape[0],
            plan.chunks, E=self.logits_TE.shape[1], T=plan.T, C=plan.C, num_warps=plan.num_warps,
            **self.choice_constants(plan), **pdl_options(hist_PC.device),
        )  # fmt: skip

    def _place(self, plan: Plan, hist_PC: Tensor, ids_TK: Tensor, capacity: Capacity | None) -> None:
        """ids of -1 are placed nowhere; counts are written unless what was chosen was then rerouted."""
        _place_kernel[(plan.programs,)](
            ids_TK, self.num_valid, self.out.weights_TK, *self.order(), *self.counters(), hist_PC, self.logits_TE.shape[0], plan.chunks,
            E=self.logits_TE.shape[1], K=self.rule.top_k, K_PAD=triton.next_power_of_2(self.rule.top_k), T=plan.T, C=plan.C,
            P=triton.next_power_of_2(plan.programs), TILE_ROWS=self.out.tile_rows, NUM_GROUPS=self.rule.num_groups,
            GROUP_PAD=plan.group_pad, IS_WIDE=plan.is_wide, COUNTS=ids_TK is self.out.ids_TK, num_warps=plan.num_warps,
            **self.capacity_constants(capacity), **pdl_options(hist_PC.device),
        )  # fmt: skip

    def order(self) -> tuple[Tensor, ...]:
        out = self.out
        return out.counts_E, out.offsets_E1, out.routed_R, out.place_R, out.tiles_M5, out.num_tiles

    def counters(self) -> tuple[Tensor | None, ...]:
        over = self.overflow
        return (None,) * 5 if over is None else (over.overflow_E, over.dropped, over.rerouted, over.exceeded, over.lost_T)

    def choice_constants(self, plan: Plan) -> dict[str, int | float | bool]:
        rule = self.rule
        return {
            "K": rule.top_k,
            "HAS_BIAS": self.bias_E is not None,
            "IS_BF16": self.logits_TE.dtype == torch.bfloat16,
            "IS_SIGMOID": rule.scoring == "sigmoid",
            "NORMALISE": rule.normalise,
            "SCALE": rule.routed_scale,
            "NUM_GROUPS": rule.num_groups,
            "TOP_GROUPS": rule.top_groups,
            "GROUP_PAD": plan.group_pad,
        }

    def capacity_constants(self, capacity: Capacity | None) -> dict[str, int | float | bool]:
        share = Fraction(1) if capacity is None else capacity.fraction
        return {
            "HAS_CAPACITY": capacity is not None,
            "IS_DROPPING": capacity is not None and capacity.overflow != "error",
            "NUMERATOR": share.numerator,
            "DENOMINATOR": share.denominator,
        }
