"""Owns the one thread that computes: decode steps, pieces of waves, or both by turns (turns.py). Knows neither model nor request.

    thread = StepThread("engine-step")
    output = await thread.run("step", worker.run, step)      # from an event loop; one call computes at a time
    thread.expect_steps(True)                                # sequences run: hold a second piece back until the next step is here
    thread.close()                                           # waits for the call that computes, in bounds; those that wait are cancelled

Of each kind calls run in the order in which they came.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import ParamSpec, TypeVar

from services.kv_transfer.timely import timely
from services.kv_transfer.turns import Turn, TurnView, next_turn

CLOSE_LIMIT_S = 60.0  # longer than any step or piece; a hung device never answers
# How long the event loop may keep Python's interpreter once the step thread wants it back. Python's own 5 ms is most of a decode step, and
# the device waits for its next launch meanwhile (docs/decisions/0007-one-process.md says what was measured).
SWITCH_INTERVAL_S = 0.0005

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class StepThread:
    """Whoever makes it closes it. A daemon: a process that ends does not wait for it. From then on threads take shorter turns."""

    def __init__(self, name: str) -> None:
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_INTERVAL_S))
        self._changed = threading.Condition()
        self._waiting: dict[Turn, deque[tuple[int, Callable[[], None]]]] = {"step": deque(), "group": deque()}
        self._posts = itertools.count()
        self._futures: set[Future[object]] = set()
        self._last: Turn = "group"
        self._is_decoding = False
        self._is_closed = False
        self._thread = threading.Thread(target=timely(self._main), name=name, daemon=True)
        self._thread.start()

    def run(self, turn: Turn, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        """Call this in the thread when its turn has come. On the running event loop; cancelling takes back what has not begun."""
        future: Future[T] = Future()
        with self._changed:
            assert not self._is_closed, "the step thread is closed"
            self._waiting[turn].append((next(self._posts), partial(_fulfil, future, partial(call, *args, **kwargs))))
            self._futures.add(future)  # type: ignore[arg-type]  # only ever cancelled
            self._changed.notify()
        future.add_done_callback(self._futures.discard)
        return asyncio.wrap_future(future)

    @property
    def is_decoding(self) -> bool:
        """Whether steps are expected: what runs beside them should be short."""
        return self._is_decoding

    def expect_steps(self, is_decoding: bool) -> None:
        """Whether the next step comes soon. Must be taken back when it does not: until then a second piece is held back."""
        if is_decoding != self._is_decoding:
            with self._changed:
                self._is_decoding = is_decoding
                self._changed.notify()

    def close(self, limit_s: float = CLOSE_LIMIT_S) -> None:
        """Wait for the call that computes, then end the thread; one that hangs is left behind, told in the log. Safe to call twice."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join(limit_s)
        if self._thread.is_alive():
            log.error("%s still computes after %.0f s: its process ends without it", self._thread.name, limit_s)
        for future in list(self._futures):
            future.cancel()

    def _main(self) -> None:
        while (call := self._next()) is not None:
            call()
            del call  # what it computed with is not kept until the next one comes

    def _next(self) -> Callable[[], None] | None:
        with self._changed:
            while not self._is_closed:
                steps, groups = self._waiting["step"], self._waiting["group"]
                view = TurnView(
                    has_step=bool(steps),
                    has_group=bool(groups),
                    is_decoding=self._is_decoding,
                    last=self._last,
                    is_step_older=bool(steps and groups) and steps[0][0] < groups[0][0],
                )
                turn = next_turn(view)
                if turn is not None:
                    self._last = turn
                    return self._waiting[turn].popleft()[1]
                self._changed.wait()
            return None


def _fulfil(future: Future[T], call: Callable[[], T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except BaseException as error:  # the caller's to judge, as with any executor
        future.set_exception(error)
    else:
        future.set_result(result)
