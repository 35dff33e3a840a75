"""Processes killed at named moments of a request. Owns the moments and what the client must see; the systems are conftest's."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.reference.monolith import monolithic_tokens
from bench.serve.rest_client import StreamResult, completion_body, post
from tests.system.second_gateway import second_gateway
from tests.system.slowed import shape

MODEL = Path(__file__).parents[2] / "models" / "tiny-moe"
PROMPT = [10 + (37 * column) % 8000 for column in range(40)]
NUM_GROUPS = 4
MAX_MISSES = 20  # of a moment of half a second, by a test that stands still for seconds


def _landed(system: Any) -> int:
    return sum(report["counters"].get("messages_landed", 0) for report in system.reports("decode"))


def _holds_blocks(report: dict[str, Any]) -> bool:
    """Cached ones are held by nobody."""
    return bool(report["num_free_blocks"] + report["num_cached_blocks"] < report["num_blocks"])


async def _until(fact: Callable[[], bool], timeout_s: float = 60.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not await asyncio.to_thread(fact):
        assert time.monotonic() < end_s, "the moment never came"
        await asyncio.sleep(0.02)


async def _settled(system: Any) -> int:
    """Messages landed, once nothing lands any more."""
    landed = [-1, -2, -3]
    while len(set(landed[-3:])) > 1:
        await asyncio.sleep(0.15)  # a report comes every tenth of a second
        landed.append(await asyncio.to_thread(_landed, system))
    return landed[-1]


async def _between_groups(system: Any, first_id: int, kill: Callable[[str], None]) -> StreamResult:
    """Send a request, stop its prefill once group 1 has landed, and kill, given the prefill's name, if that was before PrefillDone.

    What has landed is read while nothing moves: a moment that was missed is waited for in another request, whose first token differs.
    """
    for number in range(MAX_MISSES):
        prompt = [first_id + number, *PROMPT[1:]]
        before = await asyncio.to_thread(_landed, system)
        request = asyncio.create_task(post(system.url, "/v1/completions", completion_body(prompt, 24), timeout_s=120))
        while not request.done() and await asyncio.to_thread(_landed, system) - before < 2:
            await asyncio.sleep(0.02)
        holding = [one["replica_id"] for one in await asyncio.to_thread(system.reports, "prefill") if _holds_blocks(one)]
        for name in holding:
            system.processes[name].send_signal(signal.SIGSTOP)
        if len(holding) == 1 and await _settled(system) - before < NUM_GROUPS:
            await asyncio.to_thread(kill, holding[0])
            result = await request
            assert result.token_ids[0] == monolithic_tokens(MODEL, [prompt], 24)[0]
            return result
        for name in holding:
            system.processes[name].send_signal(signal.SIGCONT)
        await request
    raise AssertionError(f"{MAX_MISSES} requests, and none was seen between its groups")


def test_prefill_killed_between_group_1_and_prefill_done_is_retried(slowed_system: Any) -> None:
    shape(slowed_system, 2, 1)
    result = asyncio.run(_between_groups(slowed_system, 1000, slowed_system.kill))
    assert result.is_done and result.error is None
    slowed_system.wait_for_pools(1, 1)
    slowed_system.assert_quiet()


def test_decode_killed_between_group_1_and_prefill_done_is_waited_for(slowed_system: Any) -> None:
    """It is the only one: the request waits for the one that is started in its place."""
    system = slowed_system
    shape(system, 1, 1)

    def kill(prefill: str) -> None:
        (name,) = (name for name in system.processes if name.startswith("decode"))
        system.kill(name)
        system.processes[prefill].send_signal(signal.SIGCONT)
        system.processes[name].wait(30)
        system.start("decode", name)

    result = asyncio.run(_between_groups(system, 2000, kill))
    assert result.is_done and result.error is None
    system.wait_for_pools(1, 1)
    system.assert_quiet()


async def _struck_while_decoding(gateway: Any, num_tokens: int, strike: Callable[[str], None]) -> StreamResult:
    """Ten tokens into its answer, as its client sees them, the decode replica that gives it is struck."""
    for _ in range(MAX_MISSES):
        seen: list[int] = []

        def count(_: float, num: int, seen: list[int] = seen) -> None:
            seen.append(num)

        request = asyncio.create_task(
            post(gateway.url, "/v1/completions", completion_body(PROMPT, num_tokens), timeout_s=120, on_tokens=count)
        )
        busy: list[str] = []
        while not request.done() and (sum(seen) < 10 or len(busy) != 1):
            await asyncio.sleep(0.02)
            busy = [one["replica_id"] for one in await asyncio.to_thread(gateway.reports, "decode") if one["num_running"]]
        if not request.done():
            await asyncio.to_thread(strike, busy[0])
            return await request
        await request
    raise AssertionError(f"{MAX_MISSES} answers, and none was seen while it was given")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_stream_outlives_its_decode_replica(slowed_system: Any, number: int) -> None:
    """Dead or silent is the same; the other one goes on from what was emitted."""
    system = slowed_system
    shape(system, 1, 2)
    result = asyncio.run(_struck_while_decoding(system, 150, lambda name: system.kill(name, number)))
    assert result.is_done and result.error is None
    assert result.token_ids[0] == monolithic_tokens(MODEL, [PROMPT], 150)[0]
    system.wait_for_pools(1, 1)
    system.assert_quiet()


def test_the_last_decode_replica_s_death_is_a_typed_error_once_nobody_came(slowed_system: Any) -> None:
    system = slowed_system
    shape(system, 1, 1)
    with second_gateway(system, failover_wait_s=0.5) as impatient:
        struck: list[str] = []

        def strike(name: str) -> None:
            struck.append(name)
            system.kill(name)

        result = asyncio.run(_struck_while_decoding(impatient, 900, strike))
        assert 10 <= result.num_tokens < 900
        assert result.token_ids[0] == monolithic_tokens(MODEL, [PROMPT], result.num_tokens)[0]
        assert result.error is not None and result.error["code"] == "replica_lost", result.error
        assert result.error["message"] and result.error["type"]
        system.processes[struck[0]].wait(30)
        system.start("decode", struck[0])
        impatient.wait_for_pools(1, 1)
        again = asyncio.run(post(impatient.url, "/v1/completions", completion_body(PROMPT, 8), timeout_s=120))
        assert again.token_ids[0] == monolithic_tokens(MODEL, [PROMPT], 8)[0]
        impatient.assert_quiet()


def _prefill_pid(system: Any) -> int:
    return int(system.reports("prefill")[0]["pid"])


@pytest.mark.slow
def test_prefill_killed_under_ray_is_replaced(one_system: Any) -> None:
    """Ray starts another process in its place; the request that it held answers."""
    pid = _prefill_pid(one_system)

    async def run() -> StreamResult:
        request = asyncio.create_task(post(one_system.url, "/v1/completions", completion_body(PROMPT * 30, 24), timeout_s=90))
        await _until(lambda: any(map(_holds_blocks, one_system.reports("prefill"))))
        os.kill(pid, signal.SIGKILL)
        return await request

    result = asyncio.run(run())
    assert result.is_done and result.token_ids[0] == monolithic_tokens(MODEL, [PROMPT * 30], 24)[0]
    one_system.wait_for_pools(1, 1)
    assert _prefill_pid(one_system) != pid
    one_system.assert_quiet()


@pytest.mark.slow
def test_decode_killed_under_ray_is_waited_for(one_system: Any) -> None:
    """The only decode replica: its stream stands still until Ray has put another in its place, and goes on."""
    (report,) = one_system.reports("decode")

    async def run() -> StreamResult:
        request = asyncio.create_task(post(one_system.url, "/v1/completions", completion_body(PROMPT, 400), timeout_s=90))
        await _until(lambda: any(now["num_steps"] >= report["num_steps"] + 10 for now in one_system.reports("decode")))
        os.kill(report["pid"], signal.SIGKILL)
        return await request

    result = asyncio.run(run())
    assert result.is_done and result.token_ids[0] == monolithic_tokens(MODEL, [PROMPT], 400)[0]
    one_system.wait_for_pools(1, 1)
    assert one_system.reports("decode")[0]["pid"] != report["pid"]
    one_system.assert_quiet()
