"""Owns whom prefill announces to decode, and when. PURE: knows no turn, tensor or socket.

Everybody, when what is left of the live waves is one piece (so that grants arrive while it runs; at once when idle). While more is left,
only prompts short enough to overtake a wave, or an announced prompt that waits for its turn. Of each decode replica at most one wave's
worth is asked at a time, in rank order, nobody bypassed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from services.prefill.pieces import advanced, next_piece
from services.prefill.slack import share_left, work_s
from services.prefill.snapshot import Key, Limits, PromptView, Snapshot, WaveView
from services.prefill.wave_costs import CostCurve

OVERTAKING_SHARE = (
    4  # a prompt this many times smaller than a wave may overtake it; larger ones gain more from sharing a wave with each other
)


def may_overtake(prompt: PromptView, wave: WaveView, limits: Limits, costs: CostCurve) -> bool:
    """Whether the prompt is short enough to go before the wave, and where that has several prompts, they together wait less for it than it
    would for what is left of them. By rows while nothing was measured."""
    is_short = OVERTAKING_SHARE * prompt.num_tokens <= wave.num_tokens
    if wave.num_prompts == 1 or not is_short:
        return is_short
    alone_s, all_s = work_s(prompt.num_tokens, limits, costs), work_s(wave.num_tokens, limits, costs)
    if not all_s:
        alone_s, all_s = prompt.num_tokens, wave.num_tokens
    return alone_s * wave.num_prompts < all_s * share_left(wave)


def announcements(ranked: Sequence[PromptView], waves: Sequence[WaveView], snapshot: Snapshot) -> tuple[Key, ...]:
    """ranked: who waits, best first. waves: the live ones, as they stand once the piece that was just chosen has begun."""
    unfinished = [wave for wave in waves if wave.has_more]
    is_near = _is_one_piece(unfinished, snapshot)
    limits, costs = snapshot.limits, snapshot.costs
    overtakable = [*unfinished, *_longest_announced(ranked, limits)]
    overtaking = {prompt.key for prompt in ranked if any(may_overtake(prompt, wave, limits, costs) for wave in overtakable)}
    budgets: dict[tuple[str, bool], _Budget] = {}
    for prompt in ranked:
        if prompt.announced_s is not None:
            budgets.setdefault((prompt.peer, prompt.key in overtaking), _Budget()).take(prompt)
    announce: list[Key] = []
    for prompt in ranked:
        is_overtaking = prompt.key in overtaking
        if prompt.announced_s is None and prompt.is_reachable and (is_near or is_overtaking):
            budget = budgets.setdefault((prompt.peer, is_overtaking), _Budget())
            if budget.admits(prompt, snapshot.limits):
                budget.take(prompt)
                announce.append(prompt.key)
    return tuple(announce)


def _longest_announced(prompts: Sequence[PromptView], limits: Limits) -> list[WaveView]:
    """It waits for its turn, and is the wave that the next one to be announced could go before."""
    longest = max((prompt.num_tokens for prompt in prompts if prompt.announced_s is not None), default=0)
    return [WaveView(wave_id=-1, num_tokens=longest, num_groups=limits.num_groups, target_s=math.inf)] if longest else []


def _is_one_piece(unfinished: Sequence[WaveView], snapshot: Snapshot) -> bool:
    if len(unfinished) != 1:
        return not unfinished
    (wave,) = unfinished
    return not advanced(wave, next_piece(wave, snapshot.limits, snapshot.costs, may_run_on=False)).has_more


@dataclass(slots=True)
class _Budget:
    """What one decode replica has been asked for. Prompts that may overtake have their own: waiting long ones never hold them up."""

    num_prompts: int = 0
    num_tokens: int = 0
    is_full: bool = False

    def take(self, prompt: PromptView) -> None:
        self.num_prompts += 1
        self.num_tokens += prompt.num_tokens

    def admits(self, prompt: PromptView, limits: Limits) -> bool:
        """Once one prompt did not fit, nobody behind it does: announcements keep their order."""
        is_first = self.num_prompts == 0
        is_small = self.num_prompts < limits.max_wave_prompts and self.num_tokens + prompt.num_tokens <= limits.company_tokens
        self.is_full = self.is_full or not (is_first or is_small)
        return not self.is_full
