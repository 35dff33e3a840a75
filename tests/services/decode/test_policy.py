"""The decode policy: promises are kept, nobody is overtaken, and a simulated pool never stalls or over-allocates."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.decode.policy import (
    DecodeLimits,
    PoolView,
    RunningSequence,
    WaitingLeg,
    blocks_for,
    plan_grants,
    plan_step,
    promised_blocks,
    table_promise,
    victims_in_order,
)

LIMITS = DecodeLimits(num_blocks=64, block_tokens=16, watermark_blocks=4, admit_ahead_tokens=32, max_batch=8, max_preemptions=2)


def leg(leg_id: int, num_tokens: int, max_new_tokens: int = 32, num_choices: int = 1, *, is_protected: bool = False) -> WaitingLeg:
    return WaitingLeg(
        leg_id=leg_id, num_tokens=num_tokens, max_new_tokens=max_new_tokens, num_choices=num_choices, is_protected=is_protected
    )


def pool(num_free_blocks: int = 64, open_promise_blocks: int = 0, num_live_legs: int = 0, num_live_choices: int = 0) -> PoolView:
    return PoolView(
        num_free_blocks=num_free_blocks,
        open_promise_blocks=open_promise_blocks,
        num_live_legs=num_live_legs,
        num_live_choices=num_live_choices,
    )


def running(sequence_id: int, num_tokens: int, num_blocks: int, promised: int = 0, *, priority: int = 0, order: int = 0) -> RunningSequence:
    return RunningSequence(
        sequence_id=sequence_id,
        order=order or sequence_id,
        priority=priority,
        num_tokens=num_tokens,
        num_blocks=num_blocks,
        own_blocks=num_blocks,
        promised_blocks=promised,
        is_protected=False,
    )


@pytest.mark.parametrize(("num_tokens", "expected"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (257, 17)])
def test_blocks_for_rounds_up(num_tokens: int, expected: int) -> None:
    assert blocks_for(num_tokens, 16) == expected


def test_a_promise_covers_prompt_and_admitted_tokens_of_every_choice() -> None:
    assert promised_blocks(leg(0, 17, 256), LIMITS) == 4  # 17 + 32 tokens
    assert promised_blocks(leg(0, 17, 5), LIMITS) == 2  # 17 + 5
    assert promised_blocks(leg(0, 17, 256, num_choices=3), LIMITS) == 1 + 3 * 3  # the full first block is shared
    assert promised_blocks(leg(0, 17, 256, is_protected=True), LIMITS) == blocks_for(17 + 256, 16)


def test_grants_keep_the_order_of_announcement() -> None:
    plan = plan_grants(LIMITS, pool(num_free_blocks=12, num_live_legs=1, num_live_choices=1), [leg(1, 16), leg(2, 160), leg(3, 16)])
    assert [grant.leg_id for grant in plan.grants] == [1]  # 3 would fit, but 2 was announced before


def test_the_watermark_stays_free_unless_the_leg_is_alone() -> None:
    whole_pool = leg(1, 64 * 16 - 32)
    assert [grant.leg_id for grant in plan_grants(LIMITS, pool(), [whole_pool]).grants] == [1]
    assert plan_grants(LIMITS, pool(num_free_blocks=63, num_live_legs=1, num_live_choices=1), [leg(1, 60 * 16 - 32)]).grants == ()


def test_open_promises_are_not_granted_twice() -> None:
    busy = pool(num_free_blocks=20, open_promise_blocks=14, num_live_legs=1, num_live_choices=1)
    assert plan_grants(LIMITS, busy, [leg(1, 16)]).grants == ()  # needs 3 above a watermark of 4, has 6
    assert len(plan_grants(LIMITS, replace(busy, open_promise_blocks=13), [leg(1, 16)]).grants) == 1


def test_what_no_empty_pool_holds_is_refused_and_blocks_nobody() -> None:
    plan = plan_grants(LIMITS, pool(), [leg(1, 64 * 16), leg(2, 16)])
    assert plan.never_fit == (1,)
    assert [grant.leg_id for grant in plan.grants] == [2]


def test_choices_beyond_the_batch_wait_unless_alone() -> None:
    many = leg(1, 16, 1, num_choices=9)
    assert len(plan_grants(LIMITS, pool(), [many]).grants) == 1
    assert plan_grants(LIMITS, pool(num_live_legs=1, num_live_choices=1), [many]).grants == ()


def test_a_step_grows_only_full_tables() -> None:
    plan = plan_step(LIMITS, 10, [running(1, 16, 1, 4), running(2, 17, 1, 4), running(3, 33, 2, 4)])
    assert plan.run == (1, 2, 3)
    assert plan.grow == (2, 3)
    assert plan.preempt == ()


def test_growth_within_a_promise_needs_no_unpromised_block() -> None:
    plan = plan_step(LIMITS, 0, [running(1, 17, 1, 2)])
    assert (plan.run, plan.grow, plan.preempt) == ((1,), (1,), ())


def test_the_newest_of_the_lowest_priority_gives_way() -> None:
    sequences = [
        running(1, 33, 2, 2),
        running(2, 20, 2, 2, priority=1),
        running(3, 20, 2, 2),
        replace(running(4, 20, 2, 2), is_protected=True),
    ]
    plan = plan_step(LIMITS, 0, sequences)
    assert plan.preempt == (3,)
    assert plan.grow == (1,)
    assert plan.run == (1, 2, 4)
    assert [victim.sequence_id for victim in victims_in_order(sequences)] == [2, 1, 3]


def test_a_lone_grower_gives_way_itself() -> None:
    plan = plan_step(LIMITS, 0, [running(1, 33, 2, 2)])
    assert (plan.run, plan.grow, plan.preempt) == ((), (), (1,))


def test_a_victim_that_already_grew_returns_its_block() -> None:
    sequences = [running(1, 33, 2, 2, priority=0, order=9), running(2, 33, 2, 2, priority=1), running(3, 49, 3, 3, priority=1)]
    plan = plan_step(LIMITS, 1, sequences)
    assert plan.preempt == (1,)
    assert plan.grow == (2, 3)


def test_the_oldest_run_where_the_batch_is_full() -> None:
    plan = plan_step(replace(LIMITS, max_batch=2), 5, [running(1, 17, 1, 2), running(2, 5, 1, 2), running(3, 17, 1, 2)])
    assert plan.run == (1, 2)
    assert plan.grow == (1,)


@dataclass
class SimulatedLeg:
    """A leg in the simulated pool: `tables` are block counts beyond the shared prompt blocks, one for each unfinished choice."""

    waiting: WaitingLeg
    num_preemptions: int
    order: int = 0
    shared: int = 0
    promise: int = 0
    tables: dict[int, int] = field(default_factory=dict)
    num_done: dict[int, int] = field(default_factory=dict)

    def held(self) -> int:
        return (self.shared + sum(self.tables.values())) if self.tables else 0

    def open_promise(self) -> int:
        return sum(max(0, self.promise - self.shared - own) for own in self.tables.values())


class SimulatedPool:
    """Runs the policy over counted blocks, as the service does, and checks its invariants at every step."""

    def __init__(self, limits: DecodeLimits, legs: list[WaitingLeg]) -> None:
        self.limits = limits
        self.queue = [SimulatedLeg(waiting=waiting, num_preemptions=0) for waiting in legs]
        self.live: list[SimulatedLeg] = []
        self.num_finished = 0
        self.num_refused = 0
        self.max_preemptions_seen = 0
        self.orders = 0
        self.num_resumed = 0

    def free(self) -> int:
        return self.limits.num_blocks - sum(leg.held() for leg in self.live)

    def unpromised(self) -> int:
        return self.free() - sum(leg.open_promise() for leg in self.live)

    def grant(self) -> None:
        view = PoolView(
            num_free_blocks=self.free(),
            open_promise_blocks=self.free() - self.unpromised(),
            num_live_legs=len(self.live),
            num_live_choices=sum(len(leg.tables) for leg in self.live),
        )
        plan = plan_grants(self.limits, view, [leg.waiting for leg in self.queue])
        granted = {grant.leg_id: grant for grant in plan.grants}
        self.num_refused += len(plan.never_fit)
        still = []
        for waiting in self.queue:
            if waiting.waiting.leg_id in granted:
                self.join(waiting)
            elif waiting.waiting.leg_id not in plan.never_fit:
                still.append(waiting)
        self.queue = still

    def join(self, leg: SimulatedLeg) -> None:
        self.orders += 1
        leg.order = self.orders
        leg.shared = leg.waiting.num_tokens // self.limits.block_tokens
        leg.promise = table_promise(leg.waiting, self.limits)
        own = blocks_for(leg.waiting.num_tokens, self.limits.block_tokens) - leg.shared
        leg.tables = dict.fromkeys(range(leg.waiting.num_choices), own)
        leg.num_done = dict.fromkeys(leg.tables, 0)
        self.live.append(leg)

    def step(self, rng: random.Random) -> None:
        keys: dict[int, tuple[SimulatedLeg, int]] = {}
        sequences = []
        for leg in self.live:
            for choice, own in leg.tables.items():
                keys[len(keys)] = (leg, choice)
                sequences.append(
                    RunningSequence(
                        sequence_id=len(keys) - 1,
                        order=leg.order,
                        priority=leg.waiting.leg_id % 2,
                        num_tokens=leg.waiting.num_tokens + leg.num_done[choice] + 1,
                        num_blocks=leg.shared + own,
                        own_blocks=own + (leg.shared if len(leg.tables) == 1 else 0),
                        promised_blocks=leg.promise,
                        is_protected=leg.waiting.is_protected,
                    )
                )
        plan = plan_step(self.limits, self.unpromised(), sequences)
        assert len(plan.run) <= self.limits.max_batch
        for sequence_id in plan.preempt:
            self.preempt(*keys[sequence_id])
        for sequence_id in plan.grow:
            grown, choice = keys[sequence_id]
            grown.tables[choice] += 1
        assert self.free() >= 0, "over-allocated"
        assert self.unpromised() >= 0, "a promise is broken"
        for sequence_id in plan.run:
            runner, choice = keys[sequence_id]
            runner.num_done[choice] += 1
            capacity = (runner.shared + runner.tables[choice]) * self.limits.block_tokens
            assert runner.waiting.num_tokens + runner.num_done[choice] <= capacity
            if runner.num_done[choice] >= runner.waiting.max_new_tokens or rng.random() < 0.01:
                del runner.tables[choice]
                self.num_finished += 1
        self.live = [leg for leg in self.live if leg.tables]

    def preempt(self, leg: SimulatedLeg, choice: int) -> None:
        assert not leg.waiting.is_protected
        done = leg.num_done[choice]
        del leg.tables[choice]
        num = leg.num_preemptions + 1
        self.max_preemptions_seen = max(self.max_preemptions_seen, num)
        self.num_resumed += 1
        resumed = replace(
            leg.waiting,
            leg_id=1000 + self.num_resumed,
            num_tokens=leg.waiting.num_tokens + done,
            max_new_tokens=leg.waiting.max_new_tokens - done,
            num_choices=1,
            is_protected=num >= self.limits.max_preemptions,
        )
        self.queue.append(SimulatedLeg(waiting=resumed, num_preemptions=num))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    sizes=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 120), st.integers(1, 3)), min_size=1, max_size=24),
    num_blocks=st.integers(8, 40),
    watermark=st.integers(0, 4),
    ahead=st.integers(1, 64),
)
def test_a_pool_never_stalls_nor_over_allocates(
    seed: int, sizes: list[tuple[int, int, int]], num_blocks: int, watermark: int, ahead: int
) -> None:
    limits = replace(LIMITS, num_blocks=num_blocks, watermark_blocks=watermark, admit_ahead_tokens=ahead)
    legs = [leg(number, tokens, new, choices) for number, (tokens, new, choices) in enumerate(sizes)]
    rng = random.Random(seed)
    simulated = SimulatedPool(limits, legs)
    for _ in range(60_000):
        simulated.grant()
        if not simulated.live:
            break
        simulated.step(rng)
    assert not simulated.queue and not simulated.live, "stalled"
    assert simulated.max_preemptions_seen <= limits.max_preemptions
    assert simulated.num_finished + simulated.num_refused >= len(legs)
