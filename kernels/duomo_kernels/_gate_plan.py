"""Owns how a gate's rows are spread over programs. Knows no kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ._launch import is_interpreted, num_sms

SOLO_TOKENS = 16  # one row a warp in one program, which waits for nobody
FUSED_TOKENS = 1024  # 8 or 16 rows in each of at most 64 programs, one row a warp: an H100 has 132 multiprocessors
SPLIT_ELEMENTS = 4096  # 4 rows of 128 columns a warp hide each other's latency; more and the kernel that places them spills
MAX_PROGRAMS = 128  # histograms that each program reads at once: 16 KiB where E is 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """P programs of `chunks` chunks of T rows; C columns."""

    T: int
    C: int
    programs: int
    chunks: int
    num_warps: int
    is_fused: bool = False
    max_registers: int | None = None

    @property
    def is_wide(self) -> bool:
        """Whether a program can count more than a byte holds: 128 programs of 255 rows also keep all counts in 16 bits."""
        return self.T * self.chunks > 255

    def histograms(self, device: torch.device) -> Tensor:
        """Scratch [P, C] for one call."""
        return torch.empty(self.programs, self.C, dtype=torch.int32 if self.is_wide else torch.uint8, device=device)


def plan_of(num_tokens: int, columns: int, device: torch.device) -> Plan:
    """One program, one kernel whose programs wait for each other, or several kernels (so in the interpreter, which cannot wait)."""
    if num_tokens <= SOLO_TOKENS:
        rows = 1 if num_tokens == 1 and columns <= 256 else 8 if num_tokens <= 8 else SOLO_TOKENS  # one warp has registers for 256
        return Plan(T=rows, C=columns, programs=1, chunks=1, num_warps=rows if columns <= 128 else min(rows, 8), is_fused=True)
    rows = 8 if columns <= 256 and (columns > 128 or num_tokens <= 256) else 16
    programs = triton.cdiv(num_tokens, rows)
    if columns > 512 or num_tokens > (FUSED_TOKENS if columns <= 128 else 512) or programs > num_sms(device) or is_interpreted():
        return split_plan(num_tokens, columns)
    # At least two grids fit on an H100 beside each other (_grid_board says why that matters): with 128 columns four programs a
    # multiprocessor, with 256 two, with 512 one, but half as many programs.
    # Sixteen rows where eight would make so many histograms that their reading spills.
    registers = 64 if columns <= 128 else 128
    return Plan(T=rows, C=columns, programs=programs, chunks=1, num_warps=rows, is_fused=True, max_registers=registers)


def split_plan(num_tokens: int, columns: int) -> Plan:
    """Chunks grow with the rows, programs do not: every program reads all histograms."""
    rows = SPLIT_ELEMENTS // columns
    chunks = triton.cdiv(num_tokens, rows * MAX_PROGRAMS)
    return Plan(T=rows, C=columns, programs=triton.cdiv(num_tokens, rows * chunks), chunks=chunks, num_warps=8)


def columns_of(num_experts: int, num_groups: int) -> tuple[int, int]:
    """(C, columns of a group). At least 128 columns: four float32 of each of 32 lanes, so that a warp holds a row whole."""
    groups = triton.next_power_of_2(num_groups)
    group_pad = max(triton.next_power_of_2(triton.cdiv(num_experts, num_groups)), 128 // groups)
    return groups * group_pad, group_pad
