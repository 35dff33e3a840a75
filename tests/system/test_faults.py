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

MODEL = Path(__file__).parents[2] / "models" / "tiny-moe"
PROMPT = [10 + (37 * column) % 8000 for column in range(40)]
GROUP_S = 0.8


def _landed(system: Any) -> int:
    return sum(report["counters"].get("messages_landed", 0) for report in system.reports("decode"))


def _busy_prefill(system: Any) -> str:
    """Which prefill replica holds the request's KV."""
    return next(report["replica_id"] for report in system.reports("prefill") if _holds_blocks(report))


def _holds_blocks(report: dict[str, Any]) -> bool:
    """Cached ones are held by nobody."""
    return bool(report["num_free_blocks"] + report["num_cached_blocks"] < report["num_blocks"])


async def _until(fact: Callable[[], bool], timeout_s: float = 20.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not await asyncio.to_thread(fact):
        assert time.monotonic() < end_s, "the moment never came"
        await asyncio.sleep(0.02)


async def _between_groups(system: Any, kill: Callable[[], None]) -> StreamResult:
    """Send one request; once group 1 has landed, and two groups before PrefillDone, kill."""
    before = _landed(system)
    request = asyncio.create_task(post(system.url, "/v1/completions", completion_body(PROMPT, 24), timeout_s=60))
    await _until(lambda: _landed(system) - before >= 2)
    assert _landed(system) - before < 4, "too late: PrefillDone may have been sent"
    await asyncio.to_thread(kill)
    return await request


def test_prefill_killed_between_group_1_and_prefill_done_is_retried(replica_system: Any) -> None:
    system = replica_system(num_prefill=2, num_decode=1, **{"delays.prefill_group_s": GROUP_S})
    killed: list[str] = []

    def kill() -> None:
        killed.append(_busy_prefill(system))
        system.kill(killed[0])

    result = asyncio.run(_between_groups(system, kill))
    assert result.is_done and result.error is None
    assert result.token_ids[0] == monolithic_tokens(MODEL, [PROMPT], 24)[0]
    system.wait_for_pools(1, 1)
    system.assert_quiet()
    system.start("prefill", killed[0])
    system.wait_for_pools(2, 1)


def test_decode_killed_between_group_1_and_prefill_done_is_waited_for(replica_system: Any) -> None:
    """It is the only one: the request waits for the one that is started in its place."""
    system = replica_system(num_prefill=1, num_decode=1, **{"delays.prefill_group_s": GROUP_S})

    def kill() -> None:
        system.kill("decode-0")
        system.processes["decode-0"].wait(10)
        system.start("decode", "decode-0")

    result = asyncio.run(_between_groups(system, kill))
    assert result.is_done and result.error is None
    assert result.token_ids[0] == monolithic_tokens(MODEL, [PROMPT], 24)[0]
    system.wait_for_pools(1, 1)
    system.assert_quiet()


async def _struck_while_decoding(system: Any, number: int) -> StreamResult:
    """Ten steps into its answer, the decode replica that gives it is sent a signal."""
    request = asyncio.create_task(post(system.url, "/v1/completions", completion_body(PROMPT, 200), timeout_s=60))
    await _until(lambda: any(report["num_running"] for report in system.reports("decode")))
    (busy,) = [report for report in system.reports("decode") if report["num_running"]]
    name, steps = busy["replica_id"], busy["num_steps"]
    await _until(lambda: any(one["replica_id"] == name and one["num_steps"] >= steps + 10 for one in system.reports("decode")))
    system.kill(name, number)
    return await request


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_stream_outlives_its_decode_replica(replica_system: Any, number: int) -> None:
    """Dead or silent is the same; the other one goes on from what was emitted."""
    system = replica_system(num_prefill=1, num_decode=2, **{"wire.silence_timeout_s": 3.0, "delays.decode_step_s": 0.02})
    result = asyncio.run(_struck_while_decoding(system, number))
    assert result.is_done and result.error is None
    assert result.token_ids[0] == monolithic_tokens(MODEL, [PROMPT], 200)[0]
    system.wait_for_pools(1, 1)
    system.assert_quiet()


def test_the_last_decode_replica_s_death_is_a_typed_error_once_nobody_came(replica_system: Any) -> None:
    system = replica_system(num_prefill=1, num_decode=1, **{"delays.decode_step_s": 0.05, "gateway.failover_wait_s": 0.5})
    result = asyncio.run(_struck_while_decoding(system, signal.SIGKILL))
    assert 10 <= result.num_tokens < 200
    assert result.token_ids[0] == monolithic_tokens(MODEL, [PROMPT], 200)[0][: result.num_tokens]
    assert result.error is not None and result.error["code"] == "replica_lost", result.error
    assert result.error["message"] and result.error["type"]
    system.start("decode", "decode-0")
    system.wait_for_pools(1, 1)
    again = asyncio.run(post(system.url, "/v1/completions", completion_body(PROMPT, 8), timeout_s=60))
    assert again.token_ids[0] == monolithic_tokens(MODEL, [PROMPT], 8)[0]
    system.assert_quiet()


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
