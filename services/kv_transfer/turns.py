"""Decides what a thread that both computes pieces of waves and decodes does next. PURE: knows no thread, wave or sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Turn = Literal["step", "group"]  # a decode step; a piece of a wave: layer groups that run without a break


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnView:
    """What waits for the thread. is_decoding: sequences run, so that a step comes soon if none waits now. last: what ran last.

    is_step_older: of a step and a piece that both wait, the step was posted first.
    """

    has_step: bool
    has_group: bool
    is_decoding: bool
    last: Turn
    is_step_older: bool = False


def next_turn(view: TurnView) -> Turn | None:
    """What runs now; None: wait for the next change.

    Steps and pieces alternate while both want to run: between two steps runs at most one piece (also where the piece after it is posted
    before the next step is), between two pieces at most one step. But a piece never overtakes a step that was posted before it: blocks may
    have changed owners in between, and the step still writes as if they had not.
    """
    may_overtake = not (view.has_step and view.is_step_older)
    if view.has_group and ((view.last == "step" and may_overtake) or not (view.has_step or view.is_decoding)):
        return "group"
    return "step" if view.has_step else None
