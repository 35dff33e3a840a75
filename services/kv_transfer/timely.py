"""Owns how late the kernel may wake a thread. Knows no thread of ours."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

_PR_SET_TIMERSLACK = 29  # prctl(2)


def timely(run: Callable[[], None]) -> Callable[[], None]:
    """`run` for a thread whose sleeps of some 50 us end when they should.

    Linux lets a thread's timers be 50 us late, so that wake-ups fall together; a writer that looks after a write into a card's memory
    sleeps no longer than that. Elsewhere sleeps are as late as they are.
    """

    def timely_run() -> None:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(1), 0, 0, 0)  # nanoseconds; this thread's alone
        run()

    return timely_run
