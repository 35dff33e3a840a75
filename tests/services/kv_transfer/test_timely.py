"""The writer's sleeps: which thread may be woken how late."""

import ctypes
import sys
import threading

import pytest

from services.kv_transfer.timely import timely

_PR_GET_TIMERSLACK = 30


@pytest.mark.skipif(sys.platform != "linux", reason="timer slack is Linux's")
def test_a_timely_thread_alone_is_woken_when_it_asks() -> None:
    def slack_ns() -> int:
        return int(ctypes.CDLL(None).prctl(_PR_GET_TIMERSLACK, 0, 0, 0, 0))

    before_ns, seen_ns = slack_ns(), []
    thread = threading.Thread(target=timely(lambda: seen_ns.append(slack_ns())))
    thread.start()
    thread.join()
    assert seen_ns == [1] and slack_ns() == before_ns > 1
