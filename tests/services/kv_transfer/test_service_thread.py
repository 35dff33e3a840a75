"""Owns the checks of ServiceThread: start, failure, stand-still and stop are seen from the host's side."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack

import pytest

from duomo.errors import EngineError, ModelError
from services.kv_transfer.ending import AGAIN_S, closed
from services.kv_transfer.service_thread import ServiceThread


async def at_once() -> None:
    return None


async def never() -> None:
    await asyncio.Event().wait()


@pytest.fixture(autouse=True)
def _thawed() -> Iterator[None]:
    """A test's process goes on to other tests, whose garbage is to be collected."""
    yield
    gc.unfreeze()


def test_what_a_ready_process_holds_is_no_longer_collected() -> None:
    """A full collection walks what was made since alone."""

    async def run(stop: asyncio.Event) -> None:
        await stop.wait()

    many = [[index] for index in range(50_000)]
    thread = ServiceThread("decode-8", run, at_once)
    thread.start(timeout_s=60)
    try:
        assert gc.get_freeze_count() > len(many)
        assert sum(len(gc.get_objects(generation)) for generation in range(3)) < len(many)
    finally:
        asyncio.run(thread.stop(timeout_s=60))


def test_runs_in_its_own_thread_and_drains_on_stop() -> None:
    seen: list[str] = []

    async def run(stop: asyncio.Event) -> None:
        seen.append(threading.current_thread().name)
        await stop.wait()
        await asyncio.sleep(0.05)
        seen.append("drained")

    thread = ServiceThread("decode-7", run, at_once)
    thread.start(timeout_s=60)
    thread.check()
    assert asyncio.run(thread.stop(timeout_s=60))
    assert seen == ["decode-7", "drained"]
    with pytest.raises(EngineError, match="has ended"):
        thread.check()


def test_a_failing_start_raises_the_services_own_exception() -> None:
    async def run(stop: asyncio.Event) -> None:
        raise ModelError("model.layers.3.mlp.gate.weight is missing")

    with pytest.raises(ModelError, match="layers.3"):
        ServiceThread("prefill-1", run, never).start(timeout_s=60)


def test_a_failing_readiness_check_ends_the_service() -> None:
    ended = threading.Event()

    async def run(stop: asyncio.Event) -> None:
        try:
            await stop.wait()
        finally:
            ended.set()

    async def broken() -> None:
        raise EngineError("no directory", phase="start")

    with pytest.raises(EngineError, match="no directory"):
        ServiceThread("prefill-1", run, broken).start(timeout_s=60)
    assert ended.wait(60)


def test_a_service_whose_readiness_fails_closes_all_that_it_opened() -> None:
    """Its steps take longer than the pause after which a task that did not hear is asked again."""
    happened: list[str] = []

    async def slow() -> None:
        await asyncio.sleep(3 * AGAIN_S)
        happened.append("closed")

    async def run(stop: asyncio.Event) -> None:
        async with AsyncExitStack() as ends:
            ends.push_async_callback(closed, "the directory", slow, 30)
            ends.push_async_callback(closed, "the service", slow, 30)
            await stop.wait()

    async def broken() -> None:
        raise EngineError("no directory", phase="start")

    with pytest.raises(EngineError, match="no directory"):
        ServiceThread("prefill-1", run, broken).start(timeout_s=30)
    assert happened == ["closed", "closed"]


def test_a_service_that_is_never_ready_is_an_error_in_time() -> None:
    async def run(stop: asyncio.Event) -> None:
        await stop.wait()

    thread = ServiceThread("prefill-1", run, never)
    with pytest.raises(EngineError, match="not ready after"):
        thread.start(timeout_s=0.2)
    assert asyncio.run(thread.stop(timeout_s=60))


def test_a_later_failure_and_a_blocked_loop_are_seen_by_check() -> None:
    fail = threading.Event()

    async def run(stop: asyncio.Event) -> None:
        while not fail.is_set():
            await asyncio.sleep(0.01)
        raise ModelError("weights went away")

    thread = ServiceThread("decode-1", run, at_once)
    thread.start(timeout_s=60)
    thread.check()
    fail.set()
    assert asyncio.run(thread.stop(timeout_s=60))
    with pytest.raises(ModelError, match="went away"):
        thread.check()

    blocked = threading.Event()

    async def block(stop: asyncio.Event) -> None:
        await asyncio.sleep(0.05)
        blocked.wait(60)
        await stop.wait()

    silent = ServiceThread("decode-2", block, at_once, max_silence_s=0.2)
    silent.start(timeout_s=60)
    time.sleep(0.6)
    with pytest.raises(EngineError, match="stood still"):
        silent.check()
    blocked.set()
    assert asyncio.run(silent.stop(timeout_s=60))
