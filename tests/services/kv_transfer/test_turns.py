"""Whose turn it is, decided and played."""

from __future__ import annotations

import itertools

from services.kv_transfer.turns import Turn, TurnView, next_turn


def view(has_step: bool, has_group: bool, is_decoding: bool, last: Turn) -> TurnView:
    return TurnView(has_step=has_step, has_group=has_group, is_decoding=is_decoding, last=last)


def test_steps_and_groups_alternate_while_both_wait() -> None:
    assert next_turn(view(True, True, True, "group")) == "step"
    assert next_turn(view(True, True, True, "step")) == "group"


def test_a_group_does_not_overtake_a_step_that_was_posted_first() -> None:
    for last in ("step", "group"):
        both = TurnView(has_step=True, has_group=True, is_decoding=True, last=last, is_step_older=True)
        assert next_turn(both) == "step"


def test_what_is_alone_runs() -> None:
    for last in ("step", "group"):
        assert next_turn(view(True, False, True, last)) == "step"
        assert next_turn(view(False, True, False, last)) == "group"
        assert next_turn(view(False, False, False, last)) is None


def test_a_second_group_waits_for_the_step_that_is_being_planned() -> None:
    assert next_turn(view(False, True, True, "group")) is None
    assert next_turn(view(False, True, True, "step")) == "group"


def test_every_view_either_runs_what_waits_or_waits_for_a_step() -> None:
    for has_step, has_group, is_decoding in itertools.product((False, True), repeat=3):
        for last in ("step", "group"):
            turn = next_turn(view(has_step, has_group, is_decoding, last))
            if turn is None:
                assert not has_step and (not has_group or (is_decoding and last == "group"))
            else:
                assert has_step if turn == "step" else has_group


def test_played_out_neither_waits_for_more_than_one_of_the_other() -> None:
    """Steps and groups are posted after random-looking gaps; between two steps of running sequences lies at most one group."""
    for period_step, period_group in itertools.product((1, 2, 3), repeat=2):
        last: Turn = "group"
        steps_due, groups_due, ran = 1, 1, []
        for tick in range(200):
            has_step, has_group = tick >= steps_due, tick >= groups_due
            turn = next_turn(view(has_step, has_group, True, last))
            if turn is None:
                continue
            ran.append(turn)
            last = turn
            if turn == "step":
                steps_due = tick + period_step
            else:
                groups_due = tick + period_group
        runs = [(turn, len(list(run))) for turn, run in itertools.groupby(ran)]
        assert all(length == 1 for turn, length in runs if turn == "group")
        assert {turn for turn, _ in runs} == {"step", "group"}
