"""Ends in bounds: a cancellation that a library lost, a step that never returns, and what the log says of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import subprocess
import sys
import threading
import time

import pytest

from duomo.errors import EngineError, PeerError
from services.kv_transfer.ending import closed, end_tasks, heeding_cancellation, in_thread


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
        async with asyncio.timeout(3):
            await end_tasks(tasks)
        assert [task.cancelled() for task in tasks] == [True, True, False, False]
        await end_tasks(())

    asyncio.run(go())


def test_a_task_that_never_ends_is_left_behind_by_name(caplog: pytest.LogCaptureFixture) -> None:
    async def go() -> None:
        stubborn, other = asyncio.create_task(deaf(4)), asyncio.create_task(asyncio.sleep(60))
        await asyncio.sleep(0.01)
        began_s = time.monotonic()
        await end_tasks((stubborn, other), limit_s=0.3)
        assert time.monotonic() - began_s < 2
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
        await deaf(1)

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
    done = subprocess.run([sys.executable, "-c", LEFT_BEHIND], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (0, "told\n"), done.stderr
