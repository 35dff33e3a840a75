"""Owns how work ends in bounds: background tasks for certain, what a replica opened by name and within a limit. Knows no service.

Python 3.11's asyncio.wait_for, through which redis-py sends every command, loses a cancellation that comes between the end of what it
waits for and its own next turn: the task goes on as if nobody had asked. Whoever cancels a task therefore asks until it hears
(end_tasks: one that is in its cleanup has heard), and whoever calls such a library passes the cancellation on (heeding_cancellation).

    async with AsyncExitStack() as ends:
        ends.push_async_callback(closed, "the transfer agent", in_thread(agent.close))
        ends.push_async_callback(closed, "the service", service.stop)

A step that does not end within its limit is told in the log by name and left behind; the next one follows.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any, Final

from duomo.errors import EngineError
from services.kv_transfer.step_thread import CLOSE_LIMIT_S

AGAIN_S: Final = 0.2
TASKS_LIMIT_S: Final = 5.0  # a call to an absent Redis is over after 3 s
STEP_LIMIT_S: Final = 15.0
SERVICE_LIMIT_S: Final = 30.0  # its steps are tasks, sockets and a call to Redis, each with a limit of its own
STEP_THREAD_LIMIT_S: Final = CLOSE_LIMIT_S + STEP_LIMIT_S
PREFILL_LIMIT_S: Final = CLOSE_LIMIT_S + SERVICE_LIMIT_S  # a wave that is being computed is waited for
# Of all steps of a replica, one after the other, where each takes its time: an engine of both services has the most of them.
REPLICA_LIMIT_S: Final = PREFILL_LIMIT_S + SERVICE_LIMIT_S + STEP_THREAD_LIMIT_S + 3 * STEP_LIMIT_S

log = logging.getLogger(__name__)


async def end_tasks(tasks: Iterable[asyncio.Future[Any]], limit_s: float = TASKS_LIMIT_S) -> None:
    """Cancel until every task is done or cleans up; their errors are not raised. limit_s: of the cleanups too, which are not cut.

    What is not done by then is told in the log and left behind.
    """
    every = set(tasks)
    left = {task for task in every if not task.done()}
    end_s = asyncio.get_running_loop().time() + limit_s
    while left:
        for task in left:
            if not _cleans_up(task):
                task.cancel()
        _, left = await asyncio.wait(left, timeout=AGAIN_S)
        if asyncio.get_running_loop().time() >= end_s:
            break
    for task in every - left:
        if not task.cancelled():
            task.exception()  # seen: nobody else asks for it
    if left:
        log.error("not over %g s after they were cancelled, left behind: %s", limit_s, ", ".join(sorted(map(_place_of, left))))


@contextlib.contextmanager
def heeding_cancellation() -> Iterator[None]:
    """Raises CancelledError where this task was cancelled while the body ran, and the body took no notice, or made an error of it."""
    task = asyncio.current_task()
    assert task is not None
    num_asked = task.cancelling()
    try:
        yield
    except Exception as error:
        if task.cancelling() > num_asked:
            raise asyncio.CancelledError from error
        raise
    if task.cancelling() > num_asked:
        raise asyncio.CancelledError


def in_thread(close: Callable[[], object]) -> Callable[[], Awaitable[None]]:
    """`close` as a step for closed(), where it may block. Its thread is a daemon: one that hangs keeps no process alive."""

    async def run() -> None:
        loop = asyncio.get_running_loop()
        over: asyncio.Future[None] = loop.create_future()

        def tell(error: BaseException | None) -> None:
            if over.done():
                return
            if error is None:
                over.set_result(None)
            else:
                over.set_exception(error)

        def work() -> None:
            failure: BaseException | None = None
            try:
                close()
            except BaseException as error:  # the waiter's to judge, as with any executor
                failure = error
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(tell, failure)

        threading.Thread(target=work, name="closing", daemon=True).start()
        await over

    return run


async def closed(name: str, close: Callable[[], Awaitable[None]], limit_s: float = STEP_LIMIT_S) -> None:
    """One step of an end; raises what it raises. Past limit_s it is told in the log, cancelled and left behind: EngineError names it."""
    step = asyncio.ensure_future(close())
    try:
        await asyncio.wait((step,), timeout=limit_s)
        place = _place_of(step)
    finally:
        is_over = step.done()
        await end_tasks((step,), limit_s=2 * AGAIN_S)
    if not is_over:
        error = EngineError(f"closing {name} takes over {limit_s:g} s, in {place}: it is left behind", code="not_closed", phase="start")
        log.error("%s", error.detail)
        raise error
    step.result()


def _cleans_up(task: asyncio.Future[Any]) -> bool:
    """Whether a cancellation has reached the task and a `finally`, `except` or `async with` of its own awaits something.

    A coroutine that awaits there has the CancelledError in hand, which Python shows to its garbage collector alone. What only waits for
    another task (gather) or for an asynchronous generator does not show it.
    """
    return any(isinstance(held, asyncio.CancelledError) for coroutine in _coroutines(task) for held in gc.get_referents(coroutine))


def _place_of(task: asyncio.Future[Any]) -> str:
    """The coroutines that a task is in, outermost first."""
    return " > ".join(coroutine.__qualname__ for coroutine in _coroutines(task)) or repr(task)


def _coroutines(task: asyncio.Future[Any]) -> Iterator[Any]:
    inner: Any = task.get_coro() if isinstance(task, asyncio.Task) else None
    while inner is not None and hasattr(inner, "cr_await"):
        yield inner
        inner = inner.cr_await
