"""One thread for steps and groups: order, results, errors, cancels and its end."""

from __future__ import annotations

import asyncio
import sys
import threading
import time

import pytest

from services.kv_transfer.step_thread import SWITCH_INTERVAL_S, StepThread
from services.kv_transfer.turns import Turn


def test_steps_and_groups_take_turns_in_one_thread() -> None:
    async def go(order: tuple[Turn, Turn]) -> list[str]:
        thread, hold = StepThread("t"), threading.Event()
        ran: list[str] = []
        names: set[str] = set()

        def work(name: str) -> str:
            ran.append(name)
            names.add(threading.current_thread().name)
            return name

        first = thread.run("step", hold.wait, 60)
        calls = [thread.run(turn, work, f"{turn}{number}") for number in range(3) for turn in order]
        hold.set()
        assert await first
        assert sorted(await asyncio.gather(*calls)) == ["group0", "group1", "group2", "step0", "step1", "step2"]
        thread.close()
        assert names == {"t"}
        return ran

    assert asyncio.run(go(("group", "step"))) == ["group0", "step0", "group1", "step1", "group2", "step2"]
    # what was posted first is not overtaken by a group, whatever ran last
    assert asyncio.run(go(("step", "group"))) == ["step0", "group0", "step1", "group1", "step2", "group2"]


def test_a_second_group_waits_for_the_next_step_as_long_as_one_is_expected() -> None:
    async def go() -> None:
        thread = StepThread("t")
        ran: list[str] = []
        thread.expect_steps(True)
        await thread.run("step", ran.append, "s0")
        await thread.run("group", ran.append, "g0")
        late = thread.run("group", ran.append, "g1")
        await asyncio.sleep(0.05)
        assert ran == ["s0", "g0"] and not late.done()
        await thread.run("step", ran.append, "s1")
        await late
        last = thread.run("group", ran.append, "g2")
        thread.expect_steps(False)
        await last
        assert ran == ["s0", "g0", "s1", "g1", "g2"]
        thread.close()

    asyncio.run(go())


def test_errors_come_back_and_the_thread_goes_on() -> None:
    async def go() -> None:
        thread = StepThread("t")
        with pytest.raises(ZeroDivisionError):
            await thread.run("group", lambda: 1 // 0)
        assert await thread.run("step", sum, (1, 2)) == 3
        thread.close()

    asyncio.run(go())


def test_what_was_cancelled_or_waits_at_the_end_never_runs() -> None:
    async def go() -> None:
        thread, hold, begun = StepThread("t"), threading.Event(), threading.Event()
        ran: list[str] = []

        def hold_on() -> bool:
            begun.set()
            return hold.wait(60)

        running = thread.run("step", hold_on)
        assert await asyncio.to_thread(begun.wait, 60)
        taken_back = thread.run("step", ran.append, "cancelled")
        taken_back.cancel()
        waiting = thread.run("group", ran.append, "waiting")
        closing = asyncio.create_task(asyncio.to_thread(thread.close))
        async with asyncio.timeout(60):
            while not thread._is_closed:
                await asyncio.sleep(0.01)
        assert not closing.done(), "what computes is waited for"
        hold.set()
        await closing
        assert await running
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert ran == []
        thread.close()

    asyncio.run(go())


def test_an_idle_thread_uses_no_processor_time() -> None:
    thread = StepThread("t")
    clock = time.pthread_getcpuclockid(thread._thread.ident or 0)
    before_s = time.clock_gettime(clock)
    time.sleep(0.3)
    assert time.clock_gettime(clock) - before_s < 0.05, "of the processor, whatever else runs"
    thread.close()


def test_a_call_that_hangs_is_left_behind_and_told(caplog: pytest.LogCaptureFixture) -> None:
    began, released = threading.Event(), threading.Event()

    def hang() -> bool:
        began.set()
        return released.wait()

    async def scenario() -> None:
        thread = StepThread("test-step")
        hanging = thread.run("step", hang)
        await asyncio.to_thread(began.wait)
        waiting = thread.run("step", released.wait)
        await asyncio.to_thread(thread.close, 0.05)
        assert "test-step still computes" in caplog.text
        with pytest.raises(asyncio.CancelledError):
            await waiting
        released.set()
        assert await hanging, "what computes is not taken away"

    asyncio.run(scenario())


@pytest.mark.parametrize(("before_s", "after_s"), [(0.005, SWITCH_INTERVAL_S), (0.0001, 0.0001)])
def test_the_event_loop_keeps_the_interpreter_for_a_short_turn_at_most(before_s: float, after_s: float) -> None:
    interval_s = sys.getswitchinterval()
    try:
        sys.setswitchinterval(before_s)
        StepThread("t").close()
        assert sys.getswitchinterval() == pytest.approx(after_s, abs=2e-6)
    finally:
        sys.setswitchinterval(interval_s)
