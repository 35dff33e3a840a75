"""Owns when a first token is due and how much of a wave is left, in seconds. PURE: knows no turn and no clock.

A prompt's target is its arrival + ttft_floor_s + ttft_stretch times what it would take alone; a wave's is the least of its prompts'. Its
slack is its target, less now, less what is left of it to compute: below zero it is late whatever runs. While nothing was measured, work
counts as nothing.
"""

from __future__ import annotations

from services.prefill.snapshot import Limits, PromptView, WaveView
from services.prefill.wave_costs import CostCurve


def work_s(num_tokens: int, limits: Limits, costs: CostCurve) -> float:
    """What a wave of so many rows takes from its first layer to its last, alone. Seconds."""
    if limits.mode != "chunked" or num_tokens <= limits.chunk_tokens:
        return limits.num_groups * (costs.group_s(num_tokens) or 0.0)
    return limits.num_groups * limits.num_chunks_of(num_tokens) * (costs.group_s(limits.chunk_tokens) or 0.0)


def left_s(wave: WaveView, limits: Limits, costs: CostCurve) -> float:
    """What is left of a wave to begin. Seconds."""
    return work_s(wave.num_tokens, limits, costs) * share_left(wave)


def share_left(wave: WaveView) -> float:
    """How much of a wave is left to begin, 0 to 1."""
    num_left = (wave.num_groups - wave.next_group) * wave.num_chunks - wave.next_chunk * (wave.num_groups if wave.has_more else 0)
    return num_left / (wave.num_groups * wave.num_chunks)


def target_s(prompt: PromptView, limits: Limits, costs: CostCurve) -> float:
    """When the prompt's first token is due."""
    return due_s(prompt.arrived_s, work_s(prompt.num_tokens, limits, costs), limits)


def due_s(arrived_s: float, alone_s: float, limits: Limits) -> float:
    """When the first token of a prompt that takes alone_s by itself is due."""
    return arrived_s + limits.ttft_floor_s + limits.ttft_stretch * alone_s


def slack_s(wave: WaveView, limits: Limits, costs: CostCurve, now_s: float) -> float:
    return wave.target_s - now_s - left_s(wave, limits, costs)
