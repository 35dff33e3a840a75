"""A thousand random traces and a recorded one against the policy: everybody ends, nobody starves, memory and passes keep their bounds."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from duomo.config import PrefillSection
from services.prefill import policy
from services.prefill.pieces import ALONE_TARGETS, advanced
from services.prefill.policy import GATHER_S, MAX_PASSES, PRIORITY_AGE_S
from services.prefill.replay import Machine, Replayed, Run, TracePrompt, replay, trace_of_json
from services.prefill.snapshot import Limits, Mode

NUM_TRACES = 1000
MODES: tuple[Mode, ...] = ("layered", "chunked", "whole")
LONGEST = 131072
GPU = Machine(
    row_s=1e-6, least_s=1.25e-3, boundary_s=2e-4, blocks_back_s=1e-3
)  # four groups: 5 ms for any short prompt, 33 ms for 8,192 tokens
RECORDED = Path(__file__).parent / "traces" / "cpu_pair.json"


def limits_of(mode: Mode, num_blocks: int = 4096, num_groups: int = 4, **changes: object) -> Limits:
    section = PrefillSection.model_validate({"mode": mode, **changes})
    return Limits.of(section, num_groups=num_groups, num_blocks=num_blocks, max_prompt_tokens=LONGEST)


def drawn_trace(draw: random.Random) -> tuple[TracePrompt, ...]:
    """Bursts and single arrivals of 1 token to 128k, most of them short; late, missing and instant grants; cancels at any time."""
    span_s = draw.choice([0.02, 0.3, 3.0])
    bursts = [draw.uniform(0, span_s) for _ in range(3)]
    longest = draw.choice([10, 13, 17])
    trace = []
    for row in range(draw.randint(1, 24)):
        grant = draw.choice([0.0, 0.0003, 0.0003, 0.002, 0.05, 4.9, None])
        trace.append(
            TracePrompt(
                name=f"r{row}",
                at_s=draw.choice(bursts) if draw.random() < 0.5 else draw.uniform(0, span_s),
                num_tokens=max(1, int(2 ** draw.uniform(0, longest))),
                priority=draw.choice([0, 0, 0, 1, 2]),
                peer=draw.choice(["d0", "d0", "d1", "d2"]),
                grant_after_s=grant,
                cancel_after_s=draw.uniform(0, 0.2) if draw.random() < 0.1 else None,
                remaining_s=draw.uniform(0.01, 3.0) if draw.random() < 0.1 else 300.0,
            )
        )
    return tuple(trace)


def check_ends(found: Replayed, limits: Limits, machine: Machine) -> None:
    """Whoever is granted, not cancelled and not short of time gets its token; everybody gets an answer."""
    assert found.ended.keys() == found.trace.keys()
    for name, ended in found.ended.items():
        prompt = found.trace[name]
        allowed = {"done"}
        if -(-prompt.num_tokens // machine.block_tokens) > limits.num_blocks:
            allowed = {"prompt_too_long"}
        elif prompt.grant_after_s is None or prompt.grant_after_s >= limits.grant_timeout_s:
            allowed = {"no_grant"}
        if prompt.cancel_after_s is not None:
            allowed.add("cancelled")
        if prompt.remaining_s < 300.0:
            allowed.add("deadline_exceeded")
        assert ended.how in allowed, (prompt, ended)


def check_grid(found: Replayed) -> None:
    """The pieces of a wave cover its groups and chunks once, in order; only a wave that nobody wants any more ends early."""
    for wave_id, formed in found.waves.items():
        view = formed
        for run in found.runs:
            if run.wave_id == wave_id:
                view = advanced(view, run.piece)
        is_unwanted = all(found.ended[name].how in ("cancelled", "deadline_exceeded") for name in found.names[wave_id])
        assert not view.has_more or is_unwanted, (formed, view)


def check_thread(found: Replayed) -> None:
    """One piece at a time, and none is held back while a wave is live."""
    for run, following in pairwise(found.runs):
        assert following.planned_s >= run.ended_s
        if run.num_live > 1:
            assert following.planned_s == run.ended_s, "the thread rests although a wave is live"


def check_live(found: Replayed, limits: Limits) -> None:
    """Live waves halve, so they are few; together they keep to the rows that memory holds."""
    for run in found.runs:
        largest = max(found.waves[other.wave_id].num_tokens for other in found.runs)
        assert run.num_live <= math.log2(largest) + 1
        assert run.num_live == 1 or run.live_tokens <= limits.max_live_tokens
    assert found.least_free_blocks >= 0


def check_passes(found: Replayed) -> None:
    """The bound of the policy's first lines, in pieces and in time."""
    most_live = max((run.num_live for run in found.runs), default=1)
    assert found.most_passes <= MAX_PASSES + most_live - 1
    longest_s = max((run.ended_s - run.planned_s for run in found.runs), default=0.0)
    for wave_id in found.waves:
        own = [run for run in found.runs if run.wave_id == wave_id]
        for run, following in pairwise(own):
            assert following.planned_s - run.ended_s <= (MAX_PASSES + most_live - 1) * longest_s + 1e-9


def check_rank(found: Replayed) -> None:
    """A granted prompt is not passed by one that came PRIORITY_AGE_S later for each level of priority, and once more."""
    first_of: dict[int, Run] = {}
    for run in found.runs:
        first_of.setdefault(run.wave_id, run)
    for wave_id, run in first_of.items():
        if run.num_live > 1:
            continue  # it passes a live wave: only the short may, and check_passes bounds it
        joined = set(found.names[wave_id])
        for name, granted_s in found.granted_s.items():
            waits, started_s = found.trace[name], found.ended[name].started_s
            is_waiting = granted_s <= run.planned_s and name not in joined and found.ended[name].at_s > run.planned_s
            if not is_waiting or (started_s is not None and started_s <= run.planned_s):
                continue
            for other in (found.trace[one] for one in joined):
                margin_s = PRIORITY_AGE_S * (1 + max(other.priority - waits.priority, 0))
                assert other.at_s - waits.at_s < margin_s + 1e-9, (waits, other)


def check_pieces(found: Replayed, limits: Limits, machine: Machine) -> None:
    """A layered piece is one group, or what eight targets hold."""
    if limits.mode != "layered":
        return
    for run in found.runs:
        took_s = run.ended_s - run.started_s
        assert run.piece.num_groups == 1 or took_s <= ALONE_TARGETS * limits.piece_target_s * 1.01, run


def check(found: Replayed, limits: Limits, machine: Machine) -> None:
    check_ends(found, limits, machine)
    check_grid(found)
    check_thread(found)
    check_live(found, limits)
    check_passes(found)
    check_rank(found)
    check_pieces(found, limits, machine)


@pytest.mark.parametrize("part", range(10))
def test_a_thousand_random_traces_of_all_modes(part: int) -> None:
    for seed in range(part * NUM_TRACES // 10, (part + 1) * NUM_TRACES // 10):
        draw = random.Random(seed)
        mode = MODES[seed % 3]
        limits = limits_of(mode, num_blocks=draw.choice([2048, 4096, 100_000]), num_groups=draw.choice([1, 4, 16]), max_wave_prompts=4)
        machine = replace(GPU, step_s=draw.choice([0.0, 0.006]), decode_s=0.5)
        found = replay(drawn_trace(draw), limits, machine)
        try:
            check(found, limits, machine)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, {mode}: {error}") from error


def test_the_checks_see_a_policy_that_starves(monkeypatch: pytest.MonkeyPatch) -> None:
    shorts = [TracePrompt(name=f"s{row}", at_s=0.002 * row, num_tokens=64) for row in range(400)]
    trace = (TracePrompt(name="long", at_s=0.0, num_tokens=8192), *shorts)
    limits = limits_of("layered")
    found = replay(trace, limits, GPU)
    check(found, limits, GPU)
    assert found.most_passes >= MAX_PASSES, "the bound is never reached here: the trace shows nothing"
    assert found.ttft_s("long") < 0.4
    monkeypatch.setattr(policy, "MAX_PASSES", 10**9)
    starving = replay(trace, limits, GPU)
    with pytest.raises(AssertionError):
        check_passes(starving)


def test_late_waves_do_not_starve_each_other() -> None:
    """Far more than the machine can do, for a while: short prompts go first, and the last long one ends with the work."""
    longs = [TracePrompt(name=f"l{row}", at_s=0.01 * row, num_tokens=8192) for row in range(20)]
    shorts = [TracePrompt(name=f"s{row}", at_s=0.004 * row, num_tokens=256) for row in range(250)]
    limits = limits_of("layered")
    found = replay((*longs, *shorts), limits, GPU)
    check(found, limits, GPU)
    assert all(following.planned_s - run.ended_s <= GATHER_S for run, following in pairwise(found.runs)), "the thread rested"
    long_s, short_s = (sorted(found.ttft_s(one.name) for one in kind) for kind in (longs, shorts))
    assert short_s[len(short_s) // 2] < 0.1 * long_s[len(long_s) // 2]


def admitted(seed: int, pace: float, limit_s: float) -> list[TracePrompt]:
    """Of three times what a machine of that pace can do, prompts of 384 to 640 tokens: those that a gateway lets in. By arrival all
    would end in time, 15% and half a full wave ahead of it."""
    draw, at_s, busy_until_s = random.Random(seed), 0.0, 0.0
    trace: list[TracePrompt] = []
    while at_s < 40.0:
        at_s += draw.expovariate(3 * pace / 512)
        num_tokens = draw.randint(384, 640)
        ends_s = max(busy_until_s, at_s) + num_tokens / pace
        if (ends_s - at_s + 1024 / pace) * 1.15 <= limit_s:
            busy_until_s = ends_s
            trace.append(TracePrompt(name=f"r{len(trace)}", at_s=at_s, num_tokens=num_tokens))
    return trace


def test_what_is_let_in_under_overload_comes_in_time_where_the_limit_is_told() -> None:
    """A wave takes over a second. Prompts as long as its own do not overtake it again and again, and who has just come does not go before
    those who have missed their fair time and can still make the limit: where that is not told, a third and more come late."""
    pace, limit_s = 1600.0, 4.0
    machine = Machine(row_s=1 / pace / 4, least_s=5e-3, boundary_s=2e-3, blocks_back_s=1e-3, block_tokens=16)
    untold = limits_of("layered", num_blocks=512)
    shares = []
    for limits in (replace(untold, max_ttft_s=limit_s), untold):
        in_time: list[bool] = []
        for seed in range(4):
            trace = admitted(seed, pace, limit_s)
            found = replay(trace, limits, machine)
            check(found, limits, machine)
            in_time += [found.ttft_s(prompt.name) <= limit_s for prompt in trace]
        shares.append(sum(in_time) / len(in_time))
    told_share, untold_share = shares
    assert told_share > 0.8, shares
    assert untold_share < 0.7, f"the trace shows nothing: {shares}"


@pytest.mark.parametrize("num_groups", [4, 16])
@pytest.mark.parametrize("is_decoding", [False, True])
def test_a_short_prompt_among_long_ones_waits_for_one_piece_at_most(is_decoding: bool, num_groups: int) -> None:
    """Back-to-back prompts of 8,192 tokens, of 256 now and then: their TTFT's p95 is a grant, a long piece and their own, at most."""
    machine = replace(GPU, step_s=0.006, decode_s=100.0) if is_decoding else GPU
    machine = replace(machine, row_s=machine.row_s * 4 / num_groups, least_s=machine.least_s * 4 / num_groups)
    limits = limits_of("layered", num_groups=num_groups)
    step_s = machine.step_s if is_decoding and num_groups == 16 else 0.0  # longer than a piece there, and one lies behind each
    pieces = {8192: 0, 256: 0}
    waited_s: list[float] = []
    pieces_s: list[float] = []
    for seed in range(40):
        draw = random.Random(seed)
        longs = [TracePrompt(name=f"l{row}", at_s=(0.033 + 0.0002 * (num_groups - 4)) * row, num_tokens=8192) for row in range(30)]
        shorts = [TracePrompt(name=f"s{row}", at_s=0.1 * row + draw.uniform(0, 0.05), num_tokens=256) for row in range(1, 9)]
        found = replay((*longs, *shorts), limits, machine)
        check(found, limits, machine)
        groups_s = [run.ended_s - run.planned_s for run in found.runs if found.waves[run.wave_id].num_tokens == 8192]
        for run in found.runs:
            pieces[found.waves[run.wave_id].num_tokens] += 1
        for short in shorts:
            wave_id = next(wave_id for wave_id, names in found.names.items() if short.name in names)
            own_s = sum(run.ended_s - run.planned_s for run in found.runs if run.wave_id == wave_id)
            assert short.grant_after_s is not None
            waited_s.append(found.ttft_s(short.name) - own_s - short.grant_after_s)
            pieces_s.append(max(groups_s) + step_s)
    waited = sorted(wait_s / piece_s for wait_s, piece_s in zip(waited_s, pieces_s, strict=True))
    assert waited[int(0.95 * len(waited))] <= 1.0 + 1e-9
    assert waited[-1] <= 4, (
        "where a long wave would miss an earlier target for it, it waits for that one's rest: what draws like these meet"
    )
    assert pieces[8192] >= 40 * 30 * num_groups and pieces[256] >= 40 * 8, (
        "waves of both kinds ran, and the long ones kept their boundaries"
    )


def test_beside_decode_a_piece_keeps_to_the_target() -> None:
    machine = replace(GPU, least_s=2e-4, step_s=0.006, decode_s=100.0)
    limits = limits_of("layered", num_groups=16)
    trace = [TracePrompt(name=f"r{row}", at_s=0.05 * row, num_tokens=tokens) for row, tokens in enumerate((500, 64, 900, 2000, 8000, 64))]
    found = replay(trace, limits, machine)
    check(found, limits, machine)
    beside = [run for run in found.runs if run.started_s - run.planned_s > machine.step_s]
    assert len(beside) > 20
    for run in beside:
        took_s = run.ended_s - run.started_s
        assert run.piece.num_groups == 1 or took_s <= limits.piece_target_s * 1.01, run
    assert any(run.piece.num_groups > 1 for run in beside), "no piece of several groups: the trace shows nothing"


def test_modes_walk_the_same_prompts_in_their_own_pieces() -> None:
    trace = (TracePrompt(name="a", at_s=0.0, num_tokens=2000),)
    found = {mode: replay(trace, limits_of(mode), GPU) for mode in MODES}
    assert [run.piece.chunks for run in found["chunked"].runs] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert [run.piece.groups for run in found["chunked"].runs] == [(0, 4)] * 4
    assert [run.piece.groups for run in found["whole"].runs] == [(0, 4)]
    assert [run.piece.groups for run in found["layered"].runs] == [(0, 1), (1, 4)], "nothing is known before the first group is measured"
    assert found["chunked"].ttft_s("a") > 2 * found["layered"].ttft_s("a"), "the weights are read four times"


def test_a_prompt_beyond_the_wave_limit_crosses_each_group_in_chunks() -> None:
    found = replay((TracePrompt(name="a", at_s=0.0, num_tokens=100_000),), limits_of("layered"), GPU)
    assert {run.piece.chunks for run in found.runs} == {(0, 13)}
    assert [run.piece.groups for run in found.runs] == [(0, 1), (1, 2), (2, 3), (3, 4)]


@pytest.mark.parametrize("mode", MODES)
def test_a_recorded_trace(mode: Mode) -> None:
    """Recorded from a pair on a CPU by tests/services/prefill/record_trace.py."""
    trace = trace_of_json(RECORDED.read_bytes())
    assert len(trace) >= 40
    machine = Machine(row_s=4e-5, least_s=1e-3, boundary_s=2e-4, blocks_back_s=1e-3, block_tokens=16)
    limits = limits_of(mode, num_blocks=512)
    found = replay(trace, limits, machine)
    check(found, limits, machine)
    assert sum(ended.how == "done" for ended in found.ended.values()) >= 0.8 * len(trace)


def test_a_trace_with_a_wrong_field_is_refused_by_its_name() -> None:
    with pytest.raises(msgspec.ValidationError, match="num_tokens"):
        trace_of_json('[{"name": "a", "at_s": 0.0, "num_tokens": "many"}]')
