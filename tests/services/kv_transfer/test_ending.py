"""Ends in bounds: a cancellation that a library lost, a step that never returns, and what the log says of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine

import pytest
import uvloop

from duomo.errors import EngineError, PeerError
from services.kv_transfer.ending import AGAIN_S, closed, end_tasks, heeding_cancellation, in_thread


async def deaf(num_times: int) -> None:
    """As a library does: takes no notice of so many cancellations."""
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            num_times -= 1
            if num_times < 0:
                raise


async def fail() -> None:
    raise ValueError("of its own")


def test_tasks_end_though_a_cancellation_was_lost() -> None:
    async def go() -> None:
        tasks = [asyncio.create_task(work) for work in (deaf(1), deaf(0), fail(), asyncio.sleep(0))]
        await asyncio.sleep(0.01)
        async with asyncio.timeout(30):
            await end_tasks(tasks)
        assert [task.cancelled() for task in tasks] == [True, True, False, False]
        await end_tasks(())

    asyncio.run(go())


@pytest.mark.parametrize("how", ["elsewhere", "after an error"])
def test_a_lost_cancellation_is_overcome_wherever_the_task_went_on(how: str) -> None:
    """Also where it waits in a handler: of another error than its own cancellation."""
    went_on: list[bool] = []

    async def elsewhere() -> None:
        await asyncio.Event().wait()

    async def after_an_error() -> None:
        try:
            raise PeerError("gone")
        except PeerError:
            await asyncio.Event().wait()

    async def work(answer: asyncio.Future[None]) -> None:
        await asyncio.wait_for(answer, 60)
        went_on.append(True)
        await (elsewhere() if how == "elsewhere" else after_an_error())

    async def go() -> None:
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting = asyncio.create_task(work(answer))
        await asyncio.sleep(0.01)
        answer.set_result(None)  # the task's next turn is due, and its cancellation comes before it
        async with asyncio.timeout(30):
            await end_tasks((waiting,), limit_s=30)
        assert waiting.cancelled()
        assert went_on or sys.version_info >= (3, 12), "it was not lost: the test shows nothing"

    asyncio.run(go())


async def cleans_up_last(cleanup: Callable[[], Awaitable[None]]) -> None:
    try:
        await asyncio.sleep(60)
    finally:
        await cleanup()


async def cleans_up_as_a_context(cleanup: Callable[[], Awaitable[None]]) -> None:
    async with contextlib.AsyncExitStack() as ends:
        ends.push_async_callback(cleanup)
        await asyncio.sleep(60)


async def cleans_up_in_a_step(cleanup: Callable[[], Awaitable[None]]) -> None:
    async with contextlib.AsyncExitStack() as ends:
        ends.push_async_callback(closed, "x", cleanup, 30)
        await asyncio.sleep(60)


async def cleans_up_in_a_group(cleanup: Callable[[], Awaitable[None]]) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(cleans_up_last(cleanup))


async def lost_then_cleans_up(cleanup: Callable[[], Awaitable[None]]) -> None:
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.sleep(60)
    await cleans_up_last(cleanup)


@pytest.mark.parametrize("work", [cleans_up_last, cleans_up_as_a_context, cleans_up_in_a_step, cleans_up_in_a_group, lost_then_cleans_up])
@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_cleanup_that_takes_its_time_is_not_cut(
    work: Callable[[Callable[[], Awaitable[None]]], Coroutine[object, object, None]],
    loop: Callable[[], asyncio.AbstractEventLoop],
    caplog: pytest.LogCaptureFixture,
) -> None:
    happened: list[str] = []

    async def cleanup() -> None:
        for _ in range(5):
            await asyncio.sleep(AGAIN_S / 2)
        happened.append("whole")

    async def go() -> None:
        task = asyncio.create_task(work(cleanup))
        await asyncio.sleep(0.01)
        await end_tasks((task,), limit_s=30)
        assert task.cancelled()

    with caplog.at_level(logging.ERROR), asyncio.Runner(loop_factory=loop) as runner:
        runner.run(go())
    assert happened == ["whole"] and not caplog.records


def test_a_task_that_never_ends_is_left_behind_by_name(caplog: pytest.LogCaptureFixture) -> None:
    async def go() -> None:
        stubborn, other = asyncio.create_task(deaf(4)), asyncio.create_task(asyncio.sleep(60))
        await asyncio.sleep(0.01)
        await end_tasks((stubborn, other), limit_s=0.3)
        assert other.cancelled() and not stubborn.done()
        await end_tasks((stubborn,))
        assert stubborn.cancelled()

    with caplog.at_level(logging.ERROR):
        asyncio.run(go())
    (record,) = caplog.records
    assert "not over 0.3 s after they were cancelled, left behind: deaf" in record.message


@pytest.mark.parametrize("ends_in_error", [False, True])
def test_a_cancellation_that_the_body_lost_is_raised_after_it(ends_in_error: bool) -> None:
    async def work() -> None:
        with heeding_cancellation():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(60)
            if ends_in_error:
                raise PeerError("an error that the caller would take for an answer")

    async def go() -> None:
        task = asyncio.create_task(work())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(go())


def test_nobodys_cancellation_is_raised() -> None:
    """Errors and limits of the body stay what they are, also in a task that was cancelled before."""

    async def work() -> str:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        with pytest.raises(PeerError), heeding_cancellation():
            raise PeerError("gone")
        with pytest.raises(TimeoutError), heeding_cancellation():
            async with asyncio.timeout(0.01):
                await asyncio.sleep(60)
        with heeding_cancellation():
            return "an answer"

    async def go() -> None:
        task = asyncio.create_task(work())
        await asyncio.sleep(0)
        task.cancel()
        assert await task == "an answer"

    asyncio.run(go())


def test_a_step_that_hangs_is_told_by_name_and_the_next_ones_follow(caplog: pytest.LogCaptureFixture) -> None:
    release = threading.Event()
    happened: list[str] = []

    async def service() -> None:
        await deaf(0)

    async def directory() -> None:
        happened.append("directory")

    async def go() -> None:
        async with contextlib.AsyncExitStack() as ends:
            ends.push_async_callback(closed, "the directory", directory)
            ends.push_async_callback(closed, "the agent", in_thread(release.wait), 0.2)
            ends.push_async_callback(closed, "the service", service, 0.2)

    with caplog.at_level(logging.ERROR), pytest.raises(EngineError, match="closing the agent takes over"):
        asyncio.run(go())
    release.set()
    assert happened == ["directory"]
    told = [record.message for record in caplog.records]
    assert len(told) == 2
    assert told[0].startswith("closing the service takes over 0.2 s, in ") and "service > deaf" in told[0]
    assert told[1].startswith("closing the agent takes over 0.2 s")


def test_a_step_raises_its_own_error_and_hears_of_its_callers_end() -> None:
    def refuse() -> None:
        raise OSError("no such file")

    async def go() -> None:
        with pytest.raises(ValueError, match="of its own"):
            await closed("a", fail)
        with pytest.raises(OSError, match="no such file"):
            await closed("b", in_thread(refuse))
        await closed("c", in_thread(lambda: None))
        waiting = asyncio.create_task(closed("d", lambda: asyncio.sleep(60)))
        await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(go())


LEFT_BEHIND = """
import asyncio, threading
from duomo.errors import EngineError
from services.kv_transfer.ending import closed, in_thread

async def main():
    try:
        await closed("the agent", in_thread(threading.Event().wait), 0.1)
    except EngineError:
        print("told")

asyncio.run(main())
"""


def test_a_step_left_behind_keeps_no_process_alive() -> None:
    done = subprocess.run([sys.executable, "-c", LEFT_BEHIND], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "told\n"), done.stderr
