"""The prefill policy on scripted and random traces: order, overtaking, announcements, and that every prompt ends."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from services.prefill.policy import (
    GATHER_S,
    MAX_PASSES,
    PRIORITY_AGE_S,
    Key,
    Limits,
    NewWave,
    NextGroup,
    Plan,
    PromptView,
    Snapshot,
    WaveView,
    plan,
)

LIMITS = Limits(max_wave_tokens=256, max_wave_prompts=4, num_groups=4, num_blocks=64, grant_timeout_s=5.0)


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


def wave(num_tokens: int, next_group: int = 1, wave_id: int = 0, num_passes: int = 0) -> WaveView:
    return WaveView(wave_id=wave_id, num_tokens=num_tokens, next_group=next_group, num_groups=4, num_passes=num_passes)


def decide(
    *prompts: PromptView,
    waves: tuple[WaveView, ...] = (),
    free: int = 64,
    is_running: bool = False,
    now_s: float = 1.0,
    limits: Limits = LIMITS,
) -> Plan:
    return plan(Snapshot(prompts=prompts, waves=waves, num_free_blocks=free, is_running=is_running, limits=limits), now_s)


def test_an_idle_replica_announces_at_once_and_runs_only_what_is_granted() -> None:
    assert decide(prompt("a")).announce == (("a", 0),)
    assert decide(prompt("a")).run is None
    assert decide(prompt("a", announced_s=0.5), granted("b")).run == NewWave(keys=(("b", 0),))


def test_nothing_is_announced_to_a_peer_that_cannot_be_reached_yet() -> None:
    decision = decide(prompt("a", is_reachable=False))
    assert decision.announce == () and decision.run is None and decision.wake_s == 100.0


def test_a_wave_takes_as_many_prompts_as_fit_and_bypasses_nobody() -> None:
    assert decide(granted("a", 100), granted("b", 150), granted("c", 100), granted("d", 1)).run == NewWave(keys=(("a", 0), ("b", 0)))
    assert decide(*(granted(name, 1) for name in "abcde")).run == NewWave(keys=tuple((name, 0) for name in "abcd"))
    assert decide(granted("a", 160), granted("b", 16), free=9).run is None, "the head waits for blocks and nobody passes it"


def test_a_prompt_beyond_the_wave_limit_goes_alone() -> None:
    assert decide(granted("a", 257), granted("b", 1)).run == NewWave(keys=(("a", 0),))


def test_a_short_prompt_overtakes_before_the_next_group_and_a_long_one_does_not() -> None:
    assert decide(granted("s", 50), waves=(wave(200),)).run == NewWave(keys=(("s", 0),))
    assert decide(granted("l", 51), waves=(wave(200),)).run == NextGroup(wave_id=0)


def test_short_prompts_overtake_together_up_to_half_of_the_wave() -> None:
    shorts = [granted(f"s{row}", 50) for row in range(3)]
    assert decide(*shorts, waves=(wave(200),)).run == NewWave(keys=(("s0", 0), ("s1", 0)))


def test_a_wave_passed_over_too_often_runs_next() -> None:
    waves = (wave(200, num_passes=MAX_PASSES), wave(20, wave_id=1))
    assert decide(granted("s", 1), waves=waves).run == NextGroup(wave_id=0)
    assert decide(waves=(wave(200, num_passes=MAX_PASSES - 1), wave(20, wave_id=1))).run == NextGroup(wave_id=1)


def test_announcements_come_one_group_ahead_of_the_turn() -> None:
    for next_group, is_announced in ((1, False), (2, False), (3, True), (4, True)):
        decision = decide(prompt("a", 200), waves=(wave(200, next_group=next_group),), is_running=True)
        assert (decision.announce == (("a", 0),)) is is_announced, next_group
        assert decision.run is None
    assert decide(prompt("s", 10), waves=(wave(200),), is_running=True).announce == (("s", 0),), "a short prompt overtakes: at once"


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
    assert decide(*burst, now_s=1.0 + GATHER_S).run == NewWave(keys=(("a", 0),))


def test_priority_goes_first_and_age_catches_up() -> None:
    old, urgent = granted("old", 200), granted("urgent", 200, priority=1, arrived_s=1.0)
    assert decide(old, urgent, now_s=1.5).run == NewWave(keys=(("urgent", 0),))
    assert decide(old, urgent, now_s=2 * PRIORITY_AGE_S - 0.5 + 1.0).run == NewWave(keys=(("old", 0),))


@dataclass(slots=True)
class Arrival:
    name: str
    at_s: float
    num_tokens: int
    priority: int
    peer: str
    grant_after_s: float  # more than the grant timeout: never granted


@dataclass
class Simulation:
    """Runs a trace against the policy with a virtual clock: a group of n tokens takes n ms, its blocks come back a little later."""

    limits: Limits
    arrivals: list[Arrival]
    now_s: float = 0.0
    waiting: dict[Key, PromptView] = field(default_factory=dict)
    grants: dict[Key, float] = field(default_factory=dict)
    waves: dict[int, tuple[WaveView, tuple[PromptView, ...]]] = field(default_factory=dict)
    blocks_back: list[tuple[float, int]] = field(default_factory=list)
    ended: dict[Key, str] = field(default_factory=dict)
    runs: list[tuple[int, float]] = field(default_factory=list)  # (wave, start)
    gaps: dict[int, int] = field(default_factory=dict)
    running: tuple[int, float] | None = None
    num_free: int = 0

    def run(self) -> None:
        self.num_free = self.limits.num_blocks
        arrivals = sorted(self.arrivals, key=lambda arrival: arrival.at_s)
        for _ in range(200_000):
            self._events(arrivals)
            decision = plan(self._snapshot(), self.now_s)
            self._apply(decision)
            times = [arrivals[0].at_s] if arrivals else []
            times += [self.running[1]] if self.running else []
            times += list(self.grants.values()) + [at_s for at_s, _ in self.blocks_back]
            times += [decision.wake_s] if decision.wake_s is not None else []
            if not times:
                return
            assert min(times) >= self.now_s
            self.now_s = min(times)
        raise AssertionError("the trace does not end")

    def _snapshot(self) -> Snapshot:
        return Snapshot(
            prompts=tuple(self.waiting.values()),
            waves=tuple(view for view, _ in self.waves.values()),
            num_free_blocks=self.num_free,
            is_running=self.running is not None,
            limits=self.limits,
        )

    def _events(self, arrivals: list[Arrival]) -> None:
        while arrivals and arrivals[0].at_s <= self.now_s:
            new = arrivals.pop(0)
            view = prompt(new.name, new.num_tokens, priority=new.priority, arrived_s=new.at_s, deadline_s=new.at_s + 1e6, peer=new.peer)
            self.waiting[view.key] = view
        for key in [key for key, at_s in self.grants.items() if at_s <= self.now_s]:
            del self.grants[key]
            if key in self.waiting:
                self.waiting[key] = replace(self.waiting[key], is_granted=True)
        for back in [back for back in self.blocks_back if back[0] <= self.now_s]:
            self.blocks_back.remove(back)
            self.num_free += back[1]
        if self.running is not None and self.running[1] <= self.now_s:
            self._group_ended(self.running[0])

    def _group_ended(self, wave_id: int) -> None:
        self.running = None
        view, prompts = self.waves[wave_id]
        if view.next_group == view.num_groups:
            del self.waves[wave_id]
            for done in prompts:
                self.ended[done.key] = "done"
                self.blocks_back.append((self.now_s + 0.005, done.num_blocks))

    def _apply(self, decision: Plan) -> None:
        for failure in decision.failures:
            self.ended[failure.key] = failure.code
            del self.waiting[failure.key]
            self.grants.pop(failure.key, None)
        for key in decision.announce:
            assert self.waiting[key].announced_s is None
            self.waiting[key] = replace(self.waiting[key], announced_s=self.now_s)
            delay_s = next(arrival.grant_after_s for arrival in self.arrivals if arrival.name == key[0])
            if delay_s < self.limits.grant_timeout_s:
                self.grants[key] = self.now_s + delay_s
        if decision.run is None:
            return
        assert self.running is None, "a group started while one was running"
        if isinstance(decision.run, NewWave):
            prompts = tuple(self.waiting.pop(key) for key in decision.run.keys)
            assert prompts and all(one.is_granted for one in prompts), "only granted prompts run"
            self.num_free -= sum(one.num_blocks for one in prompts)
            assert self.num_free >= 0, "blocks over-committed"
            num_tokens = sum(one.num_tokens for one in prompts)
            assert len(prompts) == 1 or num_tokens <= self.limits.max_wave_tokens
            wave_id = len(self.runs)
            self.waves[wave_id] = (
                WaveView(wave_id=wave_id, num_tokens=num_tokens, next_group=0, num_groups=self.limits.num_groups, num_passes=0),
                prompts,
            )
        else:
            wave_id = decision.run.wave_id
        for other_id, (view, prompts) in self.waves.items():
            is_chosen = other_id == wave_id
            changed = (
                replace(view, next_group=view.next_group + 1, num_passes=0) if is_chosen else replace(view, num_passes=view.num_passes + 1)
            )
            self.waves[other_id] = (changed, prompts)
            assert changed.num_passes <= MAX_PASSES + len(self.waves), "a live wave starves"
        self.runs.append((wave_id, self.now_s))
        self.running = (wave_id, self.now_s + self.waves[wave_id][0].num_tokens / 1000)


arrivals_of = st.lists(
    st.tuples(
        st.floats(0, 2),
        st.integers(1, 300),
        st.integers(0, 2),
        st.sampled_from(["d0", "d1"]),
        st.sampled_from([0.0, 0.001, 0.05, 1.0, 9.0]),
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=120, deadline=None)
@given(trace=arrivals_of, num_groups=st.integers(1, 5), num_blocks=st.integers(19, 64))
def test_every_prompt_of_any_trace_ends_and_no_wave_starves(
    trace: list[tuple[float, int, int, str, float]], num_groups: int, num_blocks: int
) -> None:
    arrivals = [Arrival(f"r{row}", *values) for row, values in enumerate(trace)]
    simulation = Simulation(replace(LIMITS, num_groups=num_groups, num_blocks=num_blocks), arrivals)
    simulation.run()
    expected = {(one.name, 0): "done" if one.grant_after_s < LIMITS.grant_timeout_s else "no_grant" for one in arrivals}
    assert simulation.ended == expected
    assert simulation.num_free == num_blocks and not simulation.waves


@settings(max_examples=60, deadline=None)
@given(at_s=st.floats(0.01, 0.7), num_tokens=st.integers(1, 62))
def test_a_short_prompt_waits_at_most_one_group_of_a_long_wave(at_s: float, num_tokens: int) -> None:
    long, short = Arrival("long", 0.0, 250, 0, "d0", 0.0), Arrival("short", at_s, num_tokens, 0, "d0", 0.0005)
    simulation = Simulation(LIMITS, [long, short])
    simulation.run()
    short_wave = next(wave_id for wave_id, _ in simulation.runs if wave_id != 0)
    started_s = next(start_s for wave_id, start_s in simulation.runs if wave_id == short_wave)
    assert started_s - at_s <= 0.250 + 0.001


def test_a_stream_of_short_prompts_cannot_starve_a_long_one() -> None:
    shorts = [Arrival(f"s{row}", row * 0.01, 16, 1, "d0", 0.0) for row in range(300)]
    simulation = Simulation(LIMITS, [Arrival("long", 0.05, 250, 0, "d0", 0.0), *shorts])
    simulation.run()
    starts = [start_s for wave_id, start_s in simulation.runs if simulation.runs[wave_id][0] == wave_id]
    assert simulation.ended[("long", 0)] == "done" and starts
    finished_before_long = list(simulation.ended).index(("long", 0))
    assert finished_before_long < 250, "the long prompt waited for all short ones"
