"""The line: who goes first, that nobody starves, the weights of all, those that leave, and who is last."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from services.prefill.policy import PRIORITY_AGE_S as PREFILL_AGE_S
from services.router.pending import PendingLeg
from services.router.waiting import PRIORITY_AGE_S, Rank, WaitingLine, Weight, rank


@dataclass(eq=False)
class Waiter:
    """What the line asks of one that waits."""

    rank: Rank
    owner: object = field(default_factory=object)
    weight: Weight = Weight(work_tokens=10, num_blocks=2, num_choices=1)


def came(at_s: float, priority: int = 0, *, was_running: bool = False) -> Waiter:
    return Waiter(rank(received_s=at_s, priority=priority, was_running=was_running))


def drained(line: WaitingLine[Waiter]) -> list[Waiter]:
    order = []
    while (head := line.head()) is not None:
        order.append(head)
        line.pop_head()
    return order


def test_first_come_first_served_within_a_level_and_those_that_ran_before_all() -> None:
    line: WaitingLine[Waiter] = WaitingLine()
    first, second, third, again, urgent = came(1.0), came(2.0), came(3.0), came(9.0, was_running=True), came(4.0, 1)
    for waiter in (first, second, third, again, urgent):
        line.join(waiter)
    assert list(line) == [again, first, second, urgent, third], "a level is worth two seconds: 4 - 2 comes to 2, and later"
    assert line.last() is third and len(line) == 5 and (line.work_tokens, line.num_blocks, line.num_choices) == (50, 10, 5)
    assert drained(line) == [again, first, second, urgent, third]
    assert line.last() is None and (line.work_tokens, line.num_blocks, line.num_choices) == (0, 0, 0)


def test_what_is_ahead_of_a_level_is_what_would_be_served_before_it() -> None:
    line: WaitingLine[Waiter] = WaitingLine()
    for waiter in (came(1.0), came(2.0), came(9.0, was_running=True), came(3.0)):
        line.join(waiter)
    urgent, late = came(3.5, 1), came(4.0)
    assert [line.ahead_of(waiter.rank).num_choices for waiter in (urgent, late)] == [2, 4]
    assert line.ahead_of(late.rank) == Weight(work_tokens=40, num_blocks=8, num_choices=4)


def test_levels_are_worth_as_much_as_in_prefills_queue() -> None:
    assert PRIORITY_AGE_S == PREFILL_AGE_S


@given(
    arrivals=st.lists(st.tuples(st.floats(0, 100, allow_nan=False), st.integers(-100, 100)), min_size=1, max_size=60),
)
def test_nobody_is_passed_by_who_came_much_later(arrivals: list[tuple[float, int]]) -> None:
    """The bound of starvation: PRIORITY_AGE_S for each level between them."""
    line: WaitingLine[Waiter] = WaitingLine()
    waiters = {}
    for at_s, priority in sorted(arrivals):
        waiter = came(at_s, priority)
        waiters[id(waiter)] = (at_s, priority)
        line.join(waiter)
    order = [waiters[id(waiter)] for waiter in drained(line)]
    for place, (before_s, before_priority) in enumerate(order):
        for after_s, after_priority in order[place + 1 :]:
            assert before_s - after_s <= PRIORITY_AGE_S * max(before_priority - after_priority, 0) + 1e-6
            if before_priority == after_priority:
                assert before_s <= after_s, "fair within a level"


def test_thousands_leave_and_nothing_of_them_is_kept() -> None:
    line: WaitingLine[Waiter] = WaitingLine()
    waiters = [came(float(number)) for number in range(20_000)]
    for waiter in waiters:
        line.join(waiter)
    for waiter in waiters[1:]:
        assert line.forget(waiter.owner) == [waiter]
    assert len(line) == 1 and line.head() is waiters[0] and len(line._heap) <= 70, "their prompts would stay in memory"
    assert line.forget(waiters[0].owner) == [waiters[0]] and line.head() is None and line.forget(object()) == []


def test_a_leg_that_joins_again_is_there_once() -> None:
    line: WaitingLine[Waiter] = WaitingLine()
    waiter = came(1.0)
    line.join(waiter)
    line.pop_head()
    line.join(waiter)
    assert len(line) == 1 and drained(line) == [waiter]


class LineMachine(RuleBasedStateMachine):
    """Beside a plain list that is sorted."""

    def __init__(self) -> None:
        super().__init__()
        self.line: WaitingLine[Waiter] = WaitingLine()
        self.plain: list[Waiter] = []
        self.owners = [object() for _ in range(8)]

    @rule(at_s=st.integers(0, 50), priority=st.integers(-3, 3), ran=st.booleans(), owner=st.integers(0, 7), work=st.integers(0, 99))
    def joins(self, at_s: int, priority: int, ran: bool, owner: int, work: int) -> None:
        weight = Weight(work_tokens=work, num_blocks=work // 16, num_choices=1)
        waiter = Waiter(rank(received_s=at_s, priority=priority, was_running=ran), self.owners[owner], weight)
        self.line.join(waiter)
        self.plain.append(waiter)
        self.plain.sort(key=lambda one: one.rank)

    @rule()
    def is_placed(self) -> None:
        if self.plain:
            assert self.line.head() is self.plain.pop(0)
            self.line.pop_head()

    @rule(owner=st.integers(0, 7))
    def leaves(self, owner: int) -> None:
        gone = self.line.forget(self.owners[owner])
        assert {id(one) for one in gone} == {id(one) for one in self.plain if one.owner is self.owners[owner]}
        self.plain = [one for one in self.plain if one.owner is not self.owners[owner]]

    @invariant()
    def is_the_same(self) -> None:
        assert list(self.line) == self.plain and len(self.line) == len(self.plain)
        assert self.line.head() is (self.plain[0] if self.plain else None)
        assert self.line.last() is (self.plain[-1] if self.plain else None)
        assert self.line.work_tokens == sum(one.weight.work_tokens for one in self.plain)
        assert self.line.num_blocks == sum(one.weight.num_blocks for one in self.plain)
        for own in (rank(received_s=20, priority=priority, was_running=False) for priority in (-2, 0, 2)):
            ahead = sum(one.weight.work_tokens for one in self.plain if one.rank <= own)
            assert self.line.ahead_of(own).work_tokens == ahead, "who waits behind it is not counted"


TestLine = LineMachine.TestCase
TestLine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_where_a_pool_has_no_replica_the_client_is_told_whether_it_had_been_served() -> None:
    """Whoever sees the end of D first, prefill or the gateway, the answer is the same."""
    fresh = PendingLeg(flight=object(), choices=(), is_resume=False)
    assert [fresh.without_replica(pool).code for pool in ("prefill", "decode")] == ["no_prefill_replica", "no_decode_replica"]
    again = PendingLeg(flight=object(), choices=(), is_resume=False, cause="decode replica d0 is gone")
    lost = again.without_replica("decode")
    assert lost.code == "replica_lost" and "decode replica d0 is gone" in lost.detail
