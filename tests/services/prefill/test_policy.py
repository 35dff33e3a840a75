"""The prefill policy on scripted snapshots: rank, waves, passing, pieces, announcements, failures, and what it costs to plan."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from duomo.config import PrefillSection
from services.prefill.pieces import Piece
from services.prefill.policy import GATHER_S, MAX_PASSES, PRIORITY_AGE_S, NewWave, NextPiece, Plan, new_wave, plan
from services.prefill.snapshot import Limits, PromptView, Snapshot, WaveView
from services.prefill.wave_costs import CostCurve

LIMITS = Limits.of(
    PrefillSection(max_wave_tokens=256, max_wave_prompts=4, piece_target_s=0.002, ttft_floor_s=0.01, ttft_stretch=4.0, chunk_tokens=32),
    num_groups=4,
    num_blocks=64,
    max_prompt_tokens=1024,
)
EVEN = CostCurve(((1.0, 0.0000625), (256.0, 0.016)))  # a group takes 62.5 us a row: 16 rows a millisecond


def prompt(name: str, num_tokens: int = 16, **changes: object) -> PromptView:
    view = PromptView(
        key=(name, 0),
        peer="d0",
        num_tokens=num_tokens,
        num_blocks=-(-num_tokens // 16),
        priority=0,
        arrived_s=0.0,
        deadline_s=100.0,
        is_reachable=True,
    )
    return replace(view, **changes)  # type: ignore[arg-type]  # the keyword values are checked by the dataclass' users below


def granted(name: str, num_tokens: int = 16, **changes: object) -> PromptView:
    return prompt(name, num_tokens, **({"announced_s": 0.0, "is_granted": True} | changes))


def wave(num_tokens: int, next_group: int = 1, wave_id: int = 0, num_passes: int = 0, target_s: float = 0.0) -> WaveView:
    return WaveView(wave_id=wave_id, num_tokens=num_tokens, next_group=next_group, num_groups=4, num_passes=num_passes, target_s=target_s)


def decide(*prompts: PromptView, now_s: float = 1.0, **facts: object) -> Plan:
    """facts: of the snapshot; without them an idle replica that has measured nothing."""
    idle = Snapshot(prompts=prompts, waves=(), num_free_blocks=64, is_running=False, limits=LIMITS, costs=CostCurve())
    return plan(replace(idle, **facts), now_s)  # type: ignore[arg-type]  # the keyword values are checked by the dataclass' users below


def started(decision: Plan) -> tuple[str, ...]:
    assert isinstance(decision.run, NewWave), decision
    return tuple(name for name, _ in decision.run.keys)


def resumed(decision: Plan) -> int:
    assert isinstance(decision.run, NextPiece), decision
    return decision.run.wave_id


def test_an_idle_replica_announces_at_once_and_runs_only_what_is_granted() -> None:
    assert decide(prompt("a")).announce == (("a", 0),)
    assert decide(prompt("a")).run is None
    assert started(decide(prompt("a", announced_s=0.5), granted("b"))) == ("b",)


def test_nothing_is_announced_to_a_peer_that_cannot_be_reached_yet() -> None:
    decision = decide(prompt("a", is_reachable=False))
    assert decision.announce == () and decision.run is None and decision.wake_s == 100.0


def test_a_wave_takes_as_many_prompts_as_fit_and_bypasses_nobody() -> None:
    assert started(decide(granted("a", 100), granted("b", 150), granted("c", 100), granted("d", 1))) == ("a", "b")
    assert started(decide(*(granted(name, 1) for name in "abcde"))) == tuple("abcd")
    assert decide(granted("a", 160), granted("b", 16), num_free_blocks=9).run is None, "the head waits for blocks and nobody passes it"


def test_a_prompt_beyond_the_wave_limit_goes_alone() -> None:
    assert started(decide(granted("a", 257), granted("b", 1))) == ("a",)


def test_in_chunked_mode_company_ends_at_a_chunk() -> None:
    chunked = replace(LIMITS, mode="chunked")
    assert started(decide(granted("a", 20), granted("b", 12), granted("c", 1), limits=chunked)) == ("a", "b")
    assert started(decide(granted("a", 33), granted("b", 1), limits=chunked)) == ("a",)


def test_a_short_prompt_passes_before_the_next_piece_and_a_long_one_does_not() -> None:
    assert started(decide(granted("s", 50), waves=(wave(200),))) == ("s",)
    assert resumed(decide(granted("l", 51), waves=(wave(200),))) == 0


def test_short_prompts_pass_together_up_to_half_of_the_wave() -> None:
    shorts = [granted(f"s{row}", 50) for row in range(3)]
    assert started(decide(*shorts, waves=(wave(200),))) == ("s0", "s1")


def test_what_passes_a_long_prompt_keeps_to_the_wave_limit_and_to_the_rows_that_memory_holds() -> None:
    """The longest is 1,024 tokens and a wave has 256: memory for 1,536 rows."""
    shorts = [granted(f"s{row}", 100) for row in range(4)]
    assert started(decide(*shorts, waves=(wave(1024),))) == ("s0", "s1"), "a wave's limit, not half of 1,024"
    assert resumed(decide(granted("a", 250), waves=(wave(1024), wave(1000, wave_id=1)))) == 1, "no room for a third"
    assert started(decide(granted("b", 200, num_blocks=1), waves=(wave(1024),))) == ("b",)


def test_the_shortest_rest_goes_first_unless_an_earlier_target_would_be_missed_by_it() -> None:
    long, short = wave(256, target_s=1.2), wave(64, wave_id=1, target_s=1.5)
    assert resumed(decide(waves=(long, short), costs=EVEN)) == 1, "48 ms and 12 ms are left: both make their targets"
    tight = replace(long, target_s=1.055)  # 7 ms of slack, and the short one takes 12
    assert resumed(decide(waves=(tight, short), costs=EVEN)) == 0
    late = replace(long, target_s=1.040)
    assert resumed(decide(waves=(late, short), costs=EVEN)) == 1, "what is missed already waits for what is not"
    urgent = replace(short, target_s=1.05)
    assert resumed(decide(waves=(tight, urgent), costs=EVEN)) == 1, "the earlier target is the short one's"
    nearly = replace(long, next_group=3, num_tokens=32)
    assert resumed(decide(waves=(nearly, short), costs=EVEN)) == 0, "2 ms are left of it"


def test_a_prompt_that_could_pass_waits_where_an_earlier_target_would_be_missed() -> None:
    tight = wave(256, target_s=1.055)
    short = granted("s", 64, arrived_s=0.999)  # due in 0.010 + 4 x 16 ms
    assert resumed(decide(short, waves=(tight,), costs=EVEN)) == 0
    assert started(decide(short, waves=(replace(tight, target_s=1.070),), costs=EVEN)) == ("s",)


def test_a_wave_passed_over_too_often_runs_next_and_the_most_passed_first() -> None:
    waves = (wave(200, num_passes=MAX_PASSES), wave(20, wave_id=1))
    assert resumed(decide(granted("s", 1), waves=waves)) == 0
    assert resumed(decide(waves=(wave(200, num_passes=MAX_PASSES - 1), wave(20, wave_id=1)))) == 1
    several = (wave(200, num_passes=MAX_PASSES), wave(100, wave_id=1, num_passes=MAX_PASSES + 1), wave(20, wave_id=2))
    assert resumed(decide(waves=several)) == 1


def test_a_piece_is_a_group_until_something_is_known_and_then_what_fits_the_target() -> None:
    def groups(decision: Plan) -> tuple[int, int]:
        assert isinstance(decision.run, NextPiece)
        return decision.run.piece.groups

    sixteen = wave(16)  # a millisecond a group: the target holds two, eight targets all three
    assert groups(decide(waves=(sixteen,))) == (1, 2)
    assert groups(decide(waves=(sixteen,), costs=EVEN)) == (1, 4), "nobody waits"
    assert groups(decide(waves=(sixteen,), costs=EVEN, is_decoding=True)) == (1, 3), "a step waits"
    assert groups(decide(prompt("s", 4), waves=(sixteen,), costs=EVEN)) == (1, 3), "a prompt waits that could pass"
    assert groups(decide(prompt("l", 200), waves=(sixteen,), costs=EVEN)) == (1, 4), "a prompt waits that could not"
    assert groups(decide(waves=(sixteen, wave(400, wave_id=1)), costs=EVEN)) == (1, 4), "a longer wave does not pass it"
    assert groups(decide(waves=(wave(256),), costs=EVEN)) == (1, 2), "48 ms: too long for one that might come"
    assert groups(decide(waves=(wave(256),), costs=EVEN, is_decoding=True)) == (1, 2), "one group at least"


def test_the_other_modes_walk_the_grid_in_their_own_order() -> None:
    chunked, whole = replace(LIMITS, mode="chunked"), replace(LIMITS, mode="whole")
    part = WaveView(wave_id=0, num_tokens=90, num_groups=4, num_chunks=3, next_chunk=1, target_s=0.0)
    assert decide(waves=(part,), limits=chunked).run == NextPiece(wave_id=0, piece=Piece(groups=(0, 4), chunks=(1, 2)))
    fresh = wave(90, next_group=0)
    assert decide(waves=(fresh,), limits=whole, is_decoding=True).run == NextPiece(wave_id=0, piece=Piece(groups=(0, 4), chunks=(0, 1)))


@pytest.mark.parametrize(
    ("prompts", "is_decoding", "may_run_on"),
    [
        ((granted("a", 64),), False, True),
        ((granted("a", 64), prompt("b", 16)), False, False),
        ((granted("a", 64), prompt("b", 17)), False, True),
        ((granted("a", 64),), True, False),
    ],
)
def test_a_new_wave_may_run_on_where_no_boundary_would_be_used(
    prompts: tuple[PromptView, ...], is_decoding: bool, may_run_on: bool
) -> None:
    decision = decide(*prompts, is_decoding=is_decoding)
    assert decision.run == NewWave(keys=(("a", 0),), may_run_on=may_run_on)


def test_announcements_come_one_piece_ahead_of_the_turn() -> None:
    for next_group, is_announced in ((1, False), (2, False), (3, True), (4, True)):
        decision = decide(prompt("a", 200), waves=(wave(200, next_group=next_group),), is_running=True)
        assert (decision.announce == (("a", 0),)) is is_announced, next_group
        assert decision.run is None
    assert decide(prompt("s", 10), waves=(wave(200),), is_running=True).announce == (("s", 0),), "a short prompt passes: at once"
    two_groups = wave(16, next_group=2)
    assert decide(prompt("a", 200), waves=(two_groups,), is_running=True, costs=EVEN).announce == (("a", 0),), "two groups fit a piece"


def test_a_short_prompt_is_announced_while_another_short_wave_passes() -> None:
    """Its turn comes when that one is over, before the long wave goes on."""
    assert decide(prompt("s", 40), waves=(wave(250), wave(40, wave_id=1)), is_running=True).announce == (("s", 0),)


def test_one_decode_replica_is_asked_for_at_most_one_wave_and_another_is_not_held_up() -> None:
    held = [prompt(f"h{row}", 1, announced_s=0.9) for row in range(4)]
    decision = decide(*held, prompt("a", arrived_s=0.5), prompt("b", arrived_s=0.5, peer="d1"))
    assert decision.announce == (("b", 0),)


def test_waiting_long_prompts_do_not_hold_up_the_announcement_of_a_short_one() -> None:
    held = [granted(f"h{row}", 128) for row in range(2)]
    assert decide(*held, prompt("s", 8), waves=(wave(250),), is_running=True).announce == (("s", 0),)


def test_no_grant_in_time_is_a_retryable_failure_and_a_missed_deadline_is_not() -> None:
    (failure,) = decide(prompt("a", announced_s=0.0), now_s=5.0).failures
    assert (failure.code, failure.phase, failure.is_retryable) == ("no_grant", "kv.handoff", True)
    (failure,) = decide(granted("a"), now_s=100.0).failures
    assert (failure.code, failure.phase, failure.is_retryable) == ("deadline_exceeded", "prefill.queue", False)
    (failure,) = decide(prompt("a", 16 * 65), now_s=1.0).failures
    assert (failure.code, failure.is_retryable) == ("prompt_too_long", False)
    assert decide(prompt("a", announced_s=0.0), now_s=4.9).wake_s == 5.0


def test_an_idle_replica_gathers_the_grants_of_a_burst_for_a_moment() -> None:
    burst = (granted("a", announced_s=1.0), prompt("b", announced_s=1.0))
    decision = decide(*burst, now_s=1.0 + GATHER_S / 2)
    assert decision.run is None and decision.wake_s == 1.0 + GATHER_S
    assert started(decide(*burst, now_s=1.0 + GATHER_S)) == ("a",)


def test_priority_goes_first_and_age_catches_up() -> None:
    old, urgent = granted("old", 200), granted("urgent", 200, priority=1, arrived_s=1.0)
    assert started(decide(old, urgent, now_s=1.5)) == ("urgent",)
    assert started(decide(old, urgent, now_s=2 * PRIORITY_AGE_S - 0.5 + 1.0)) == ("old",)


def test_of_one_priority_the_earliest_target_goes_first_and_the_late_come_last_shortest_first() -> None:
    long, short = granted("long", 200), granted("short", 100, arrived_s=0.05)  # due at 0.21 and 0.16
    assert started(decide(long, short, now_s=0.1, costs=EVEN)) == ("short",)
    assert started(decide(long, replace(short, arrived_s=0.105), now_s=0.11, costs=EVEN)) == ("long",), "due at 0.21, before 0.215"
    assert started(decide(long, replace(short, arrived_s=0.9), now_s=0.91, costs=EVEN)) == ("short",), "the long one is late"
    assert started(decide(granted("a", 200), granted("b", 100, arrived_s=0.1), now_s=1.9, costs=EVEN)) == ("b",), "both are late"


def test_where_a_limit_is_told_only_what_misses_it_is_late() -> None:
    """Else whoever has just come goes before all who wait for longer than their fair time, and those come after the limit."""
    limits = replace(LIMITS, max_ttft_s=4.0)
    long, short = granted("long", 200), granted("short", 100, arrived_s=0.9)
    assert started(decide(long, short, now_s=0.91, costs=EVEN)) == ("short",), "the long one misses its fair time"
    assert started(decide(long, short, now_s=0.91, costs=EVEN, limits=limits)) == ("long",)
    assert started(decide(long, short, now_s=3.99, costs=EVEN, limits=limits)) == ("short",), "the long one comes after the limit"


def test_a_wave_of_several_prompts_is_overtaken_where_that_saves_more_than_it_costs_them() -> None:
    """The four of a wave of 1,024 together wait 4 times what a prompt takes, which itself would wait for what is left of them."""
    company = replace(wave(1024, next_group=1, target_s=-9.0), num_prompts=4)  # three groups are left, and it is late whatever runs
    short, similar = granted("short", 128), granted("similar", 256)
    assert started(decide(short, waves=(company,), costs=EVEN)) == ("short",)
    assert isinstance(decide(similar, waves=(company,), costs=EVEN).run, NextPiece)
    assert started(decide(similar, waves=(replace(company, num_prompts=1),), costs=EVEN)) == ("similar",), "one prompt waits for it alone"
    assert isinstance(decide(short, waves=(replace(company, next_group=3),), costs=EVEN).run, NextPiece), "little of the wave is left"
    assert started(decide(short, waves=(company,))) == ("short",), "by rows while nothing was measured"
    assert isinstance(decide(similar, waves=(company,)).run, NextPiece)


def test_only_who_could_overtake_is_announced_while_much_of_a_wave_is_left() -> None:
    company = replace(wave(1024, next_group=1), num_prompts=4)
    told = decide(prompt("similar", 256), prompt("short", 128), waves=(company,), costs=EVEN, is_running=True).announce
    assert told == (("short", 0),)


def test_who_may_not_overtake_a_wave_of_several_goes_before_an_announced_prompt_that_waits() -> None:
    company, held = replace(wave(1024, next_group=1), num_prompts=4), prompt("held", 1024, announced_s=0.9)
    assert decide(held, prompt("similar", 256), waves=(company,), costs=EVEN, is_running=True).announce == (("similar", 0),)


def test_a_wave_of_several_keeps_no_boundary_for_who_may_not_overtake_it() -> None:
    four = replace(wave(16), num_prompts=4)  # a millisecond a group, three of them left
    for num_tokens, groups in ((2, (1, 3)), (4, (1, 4))):
        decision = decide(prompt("s", num_tokens), waves=(four,), costs=EVEN)
        assert isinstance(decision.run, NextPiece) and decision.run.piece.groups == groups, num_tokens
    joining = [granted(name, 16, priority=1) for name in "abcd"]
    for num_tokens, may_run_on in ((15, False), (16, True)):
        decision = decide(*joining, prompt("s", num_tokens), costs=EVEN)
        assert decision.run == NewWave(keys=tuple((name, 0) for name in "abcd"), may_run_on=may_run_on), num_tokens


def test_a_new_wave_counts_its_prompts() -> None:
    assert new_wave(0, [granted("a", 20), granted("b", 30)], 50, LIMITS, EVEN).num_prompts == 2


def test_a_plan_for_fifty_waiting_prompts_takes_well_under_half_a_millisecond() -> None:
    """The device is idle meanwhile. Minimum of many: other processes share the cores."""
    waiting = tuple(prompt(f"r{row}", 16 + row, arrived_s=row / 50, announced_s=1.0, is_granted=row % 2 == 0) for row in range(50))
    snapshot = Snapshot(
        prompts=waiting, waves=(wave(256),), num_free_blocks=640, is_running=False, limits=replace(LIMITS, num_blocks=640), costs=EVEN
    )
    times_s = []
    for _ in range(50):
        began_s = time.perf_counter()
        plan(snapshot, 1.01)
        times_s.append(time.perf_counter() - began_s)
    assert min(times_s) < 0.0005, min(times_s)
