"""Owns how a gate's rows are spread over programs. Knows no kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ._launch import is_interpreted, num_sms

SOLO_TOKENS = 8  # one program, which waits for nobody, up to 128 columns
FUSED_TOKENS = 1024
WAVE_ROWS = (4, 8)  # of a program of several, one row a warp: the fewest of which all programs are resident
SPLIT_ELEMENTS = 4096  # 4 rows of 128 columns a warp hide each other's latency; more and the kernel that places them spills
MAX_PROGRAMS = 128  # histograms that each program reads at once: 16 KiB where E is 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """P programs of `chunks` chunks of T rows; C columns, of a group group_pad."""

    T: int
    C: int
    group_pad: int
    programs: int
    chunks: int
    num_warps: int
    is_fused: bool = False
    max_registers: int | None = None

    @property
    def is_wide(self) -> bool:
        """Whether a program can count more than a byte holds: 128 programs of 255 rows also keep all counts in 16 bits."""
        return self.T * self.chunks > 255

    @property
    def run(self) -> int:
        """Successive programs' histograms that a warp adds up in the bytes of a word."""
        padded: int = triton.next_power_of_2(self.programs)
        at_most: int = triton.next_power_of_2(255 // self.T + 1) // 2
        return max(1, min(padded // self.num_warps, at_most))

    def histograms(self, device: torch.device) -> Tensor:
        """Scratch [P, C] for one call."""
        return torch.empty(self.programs, self.C, dtype=torch.int32 if self.is_wide else torch.uint8, device=device)


def plan_of(num_tokens: int, num_experts: int, num_groups: int, device: torch.device) -> Plan:
    """One program, one kernel whose programs wait for each other, or several kernels (so in the interpreter, which cannot wait)."""
    columns, group_pad = columns_of(num_experts, num_groups, 32)
    if num_tokens <= 4 or (num_tokens <= SOLO_TOKENS and columns <= 128):
        rows = 1 if num_tokens == 1 and columns <= 256 else 4 if num_tokens <= 4 else SOLO_TOKENS  # one warp has registers for 256
        return Plan(T=rows, C=columns, group_pad=group_pad, programs=1, chunks=1, num_warps=rows, is_fused=True)
    if num_tokens <= (FUSED_TOKENS if columns <= 256 else FUSED_TOKENS // 2) and not is_interpreted():
        for rows in WAVE_ROWS if columns <= 256 else WAVE_ROWS[1:]:  # the words of 128 programs of 512 columns spill
            programs = triton.cdiv(num_tokens, rows)
            if programs <= min(num_sms(device), MAX_PROGRAMS):
                # 128 registers: two grids of 8 warps fit beside each other (_grid_board says why that matters).
                return Plan(
                    T=rows, C=columns, group_pad=group_pad, programs=programs, chunks=1, num_warps=rows, is_fused=True, max_registers=128
                )
    return split_plan(num_tokens, num_experts, num_groups)


def split_plan(num_tokens: int, num_experts: int, num_groups: int) -> Plan:
    """Chunks grow with the rows, programs do not: every program reads all histograms."""
    columns, group_pad = columns_of(num_experts, num_groups, 128)
    rows = SPLIT_ELEMENTS // columns
    chunks = triton.cdiv(num_tokens, rows * MAX_PROGRAMS)
    return Plan(T=rows, C=columns, group_pad=group_pad, programs=triton.cdiv(num_tokens, rows * chunks), chunks=chunks, num_warps=8)


def columns_of(num_experts: int, num_groups: int, least: int) -> tuple[int, int]:
    """(C, columns of a group). At least as many as the lanes that hold a row: 32, one float32 each, or 128, four each."""
    groups = triton.next_power_of_2(num_groups)
    group_pad = max(triton.next_power_of_2(triton.cdiv(num_experts, num_groups)), least // groups)
    return groups * group_pad, group_pad
