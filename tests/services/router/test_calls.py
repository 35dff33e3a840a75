"""What a call leaves behind once its answer is with the client: nothing that waits for Python's cycle collector."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvloop

from tests.services.router.stub_replicas import Script
from tests.services.router.stub_system import StubSystem, stub_system

Ask = Callable[[StubSystem], Awaitable[object]]
CHAT = {"model": "tiny-moe", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 24}


def _asks(status: int, key: str = "", **fields: object) -> Ask:
    async def ask(system: StubSystem) -> None:
        headers = {"idempotency-key": key} if key else {}
        answer = await system.client.post("/v1/chat/completions", json=CHAT | fields, headers=headers)
        assert answer.status_code == status, answer.text

    return ask


def _leaves(**fields: object) -> Ask:
    async def ask(system: StubSystem) -> None:
        asked = asyncio.create_task(system.client.post("/v1/chat/completions", json=CHAT | fields))
        await system.until(lambda: system.gateway.num_live_requests == 1)
        asked.cancel()
        await asyncio.wait((asked,))

    return ask


@contextmanager
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _alive() -> Counter[str]:
    """How many of the gateway's objects there are, by type: those that only the collector could free are among them."""
    kinds = [type(each) for each in gc.get_objects()]
    return Counter(kind.__qualname__ for kind in kinds if str(kind.__module__).startswith(("services.router.", "duomo.errors")))


@pytest.mark.parametrize(
    ("script", "ask"),
    [
        pytest.param(Script(), _asks(200, stream=True), id="streamed"),
        pytest.param(Script(), _asks(200), id="whole"),
        pytest.param(Script(), _asks(200, stream=True, n=3, stop=["fox"]), id="choices"),
        pytest.param(Script(prefill_faults=deque(["fail"])), _asks(200, stream=True), id="retried"),
        pytest.param(Script(decode_faults=deque([("preempt", 3)])), _asks(200, stream=True), id="resumed"),
        pytest.param(Script(prefill_faults=deque(["fail_for_good"])), _asks(500), id="failed_whole"),
        pytest.param(Script(prefill_faults=deque(["fail_for_good"])), _asks(500, stream=True), id="failed_stream"),
        pytest.param(Script(decode_faults=deque([("fail_for_good", 3)])), _asks(200, stream=True), id="failed_in_the_middle"),
        pytest.param(Script(prefill_faults=deque(["hold"])), _leaves(stream=True), id="left_before_the_first_token"),
        pytest.param(Script(decode_faults=deque([("hold", 3)])), _leaves(stream=True), id="left_in_the_middle"),
        pytest.param(Script(decode_faults=deque([("hold", 3)])), _leaves(), id="left_whole"),
        pytest.param(Script(), _asks(400, max_tokens=1_000_000), id="refused"),
        pytest.param(Script(), _asks(200, key="k"), id="kept_whole"),
        pytest.param(Script(), _asks(200, key="k", stream=True), id="kept_stream"),
        pytest.param(Script(prefill_faults=deque(["fail_for_good"])), _asks(500, key="k", stream=True), id="kept_failure"),
    ],
)
def test_a_call_that_is_over_leaves_nothing_to_the_cycle_collector(tmp_path: Path, script: Script, ask: Ask) -> None:
    """Else a gateway grows by each request, its prompt included, until the collector's next full run: minutes, where requests are long."""

    async def scenario() -> None:
        async with stub_system(tmp_path, script) as system:
            with _no_collector():
                await system.client.get("/health/live")  # the connection that will be kept
                before = _alive()
                await ask(system)
                await system.until(lambda: system.gateway.num_open_answers == 0)
                with contextlib.suppress(AssertionError):  # the transport's own end comes a little later; what stays is told by name
                    await system.until(lambda: not _alive() - before, 30)
                assert _alive() - before == Counter()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scenario())
