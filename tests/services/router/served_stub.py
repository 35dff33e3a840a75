"""A stub system beside the test, in a thread with an event loop of its own: for clients and tools that are not asynchronous."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.services.router.stub_system import PATIENCE_S, StubSystem, stub_system

START_S = STOP_S = QUIET_S = PATIENCE_S
GATEWAY_ZEROES = ("num_live_requests", "num_open_answers", "num_waiting_requests", "num_live_legs", "num_open_spans")


@dataclass
class ServedStub:
    """url: of the gateway. loop: its thread's."""

    url: str
    system: StubSystem
    loop: asyncio.AbstractEventLoop

    def tell(self, told: str) -> None:
        """What every choice says from now on, and EOS."""
        self.system.story.tell(told)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The next request gets no token inside: whoever does not wait for ever gives up."""
        pools = self.system.pools

        def hold() -> None:
            pools.go_on.clear()
            pools.script.prefill_faults.append("hold")

        self.loop.call_soon_threadsafe(hold)
        try:
            yield
        finally:
            self.loop.call_soon_threadsafe(pools.script.prefill_faults.clear)  # who gave up before it came there
            self.loop.call_soon_threadsafe(pools.go_on.set)

    def assert_quiet(self) -> None:
        """Nothing is held by anybody soon, read from outside."""
        end_s = time.monotonic() + QUIET_S
        while wrong := self._disquiet():
            assert time.monotonic() < end_s, wrong
            time.sleep(0.05)

    def _disquiet(self) -> list[str]:
        report: dict[str, Any] = httpx.get(self.url + "/admin/pools", timeout=PATIENCE_S).json()
        wrong = [f"gateway {name}" for name in GATEWAY_ZEROES if report["gateway"][name]]
        for one in report["replicas"]:
            wrong += [f"{one['replica_id']} {name}" for name in one if name.startswith("gateway_") and one[name]]
            told = one["report"]
            if told is None or told["num_free_blocks"] + told["num_cached_blocks"] != told["num_blocks"] or told["num_running"]:
                wrong.append(f"{one['replica_id']} {told}")
        return wrong


@contextlib.contextmanager
def served_stub(folder: Path, **options: Any) -> Iterator[ServedStub]:
    """options: stub_system's. Its books are checked at the end; what went wrong in the thread is raised here."""
    loop = asyncio.new_event_loop()
    stop, is_up = asyncio.Event(), threading.Event()
    served: list[ServedStub] = []
    failed: list[BaseException] = []

    async def serve() -> None:
        async with stub_system(folder, **options) as system:
            served.append(ServedStub(system.base_url, system, loop))
            is_up.set()
            await stop.wait()

    def run() -> None:
        try:
            loop.run_until_complete(serve())
        except BaseException as error:  # told to whoever waits for it
            failed.append(error)
        finally:
            is_up.set()
            loop.close()

    thread = threading.Thread(target=run, name="stub system")
    thread.start()
    assert is_up.wait(START_S), "the stub system does not come up"
    try:
        if served:
            yield served[0]
    finally:
        if not failed:
            loop.call_soon_threadsafe(stop.set)
        thread.join(STOP_S)
    if failed:
        raise failed[0]
    assert not thread.is_alive(), "the stub system does not end"
