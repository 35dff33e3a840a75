"""Gateways killed, stopped and drained under load, two before one pair of pools. Owns the moments; what is left is read from outside.

The second gateway's /admin/pools shows what the replicas still hold once the first is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from bench.reference.monolith import monolithic_tokens
from bench.serve.rest_client import StreamResult, completion_body, post
from tests.system.conftest import MODEL
from tests.system.patience import Patience
from tests.system.second_gateway import second_gateway
from tests.system.slowed import shape

FREED_WITHIN_S = 1.0  # the design's, from the sockets' end
MAX_MISSES = 20  # of a moment, by a test that stands still while it passes
LEFT_WITHIN_S = 5.0  # beyond a lease or a silence that has to pass first
NUM_STREAMS = 12
KEYED_TOKENS = 150  # three seconds, in which another asks for the same key


def _prompt(row: int) -> list[int]:
    return [10 + (37 * column + 131 * row) % 8000 for column in range(40)]


def _ask(system: Any, row: int, num_tokens: int, **headers: str) -> asyncio.Task[StreamResult]:
    body = completion_body(_prompt(row), num_tokens)
    return asyncio.create_task(post(system.url, "/v1/completions", body, timeout_s=90, headers=headers))


async def _until(fact: Callable[[], bool], timeout_s: float = 30.0) -> float:
    """Seconds that it took."""
    started_s = time.monotonic()
    while not await asyncio.to_thread(fact):
        assert time.monotonic() - started_s < timeout_s, "the moment never came"
        await asyncio.sleep(0.01)
    return time.monotonic() - started_s


async def _severed(requests: list[asyncio.Task[StreamResult]]) -> None:
    """Their clients see a closed connection."""
    for request in requests:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, IndexError, ValueError):
            result = await request
            assert not result.is_done


def _sum(system: Any, role: str, *names: str) -> int:
    """Of all replicas of a role: a field of the report, or a counter in it."""
    return sum(report.get(name, report["counters"].get(name, 0)) for report in system.reports(role) for name in names)


def _mid_prefill(system: Any, landed: int) -> bool:
    held = any(report["num_free_blocks"] + report["num_cached_blocks"] < report["num_blocks"] for report in system.reports("prefill"))
    return held and _sum(system, "decode", "messages_landed") == landed


def _mid_handoff(system: Any, landed: int) -> bool:
    return _sum(system, "decode", "messages_landed") > landed and _sum(system, "decode", "num_open_handles") > 0


def _mid_decode(system: Any, landed: int) -> bool:
    return _sum(system, "decode", "num_running") == NUM_STREAMS


MOMENTS: dict[str, Callable[[Any, int], bool]] = {"prefill": _mid_prefill, "handoff": _mid_handoff, "decode": _mid_decode}


async def _caught_at(moment: str, gateway: Any, second: Any) -> list[asyncio.Task[StreamResult]]:
    """Requests of `gateway`, seen at the moment by `second`; requests whose moment was missed are cancelled, and others sent."""
    for _ in range(MAX_MISSES):
        landed = await asyncio.to_thread(_sum, second, "decode", "messages_landed")
        requests = [_ask(gateway, row, 900) for row in range(NUM_STREAMS)]
        while not all(request.done() for request in requests):
            if await asyncio.to_thread(MOMENTS[moment], second, landed):
                return requests
            if await asyncio.to_thread(_mid_decode, second, landed):
                break
            await asyncio.sleep(0.01)
        for request in requests:
            request.cancel()
        await asyncio.gather(*requests, return_exceptions=True)
        await asyncio.to_thread(second.assert_quiet)
    raise AssertionError(f"{MAX_MISSES} times {NUM_STREAMS} requests, and none was seen mid-{moment}")


async def _freed(second: Any) -> float:
    """Seconds until nothing is held, as Patience counts them."""
    patience = Patience(FREED_WITHIN_S)
    while wrong := await asyncio.to_thread(second.disquiet):
        assert not patience.is_over(), wrong
        await asyncio.sleep(0.01)
    return patience.spent_s


def test_a_killed_gateway_s_requests_are_freed_at_every_moment(slowed_system: Any) -> None:
    """Blocks, slots, handles and spans of both pools, each time, and the gateway comes back under its name."""
    system = slowed_system

    async def kill_at(moment: str) -> float:
        requests = await _caught_at(moment, system, second)
        system.kill("router-0")
        await _severed(requests)
        return await _freed(second)

    shape(system, 1, 1)
    with second_gateway(system) as second:
        for moment in MOMENTS:
            took_s = asyncio.run(kill_at(moment))
            print(f"killed mid-{moment}: all freed {took_s:.2f} s after the sockets' end")
            shape(system, 1, 1)
        result = asyncio.run(_answer_of(system, 0, 16))
        assert result.token_ids[0] == monolithic_tokens(MODEL, [_prompt(0)], 16)[0]
        system.assert_quiet()
        assert second.pool_report()["gateway"]["num_live_requests"] == 0


async def _answer_of(system: Any, row: int, num_tokens: int, **headers: str) -> StreamResult:
    return await _ask(system, row, num_tokens, **headers)


def test_one_gateway_s_death_leaves_the_other_s_streams_alone_and_frees_its_keys(slowed_system: Any) -> None:
    system = slowed_system
    key = {"idempotency-key": "one answer"}

    async def run() -> tuple[list[StreamResult], StreamResult]:
        doomed = [_ask(system, row, KEYED_TOKENS, **key) if row == 0 else _ask(system, row, 900) for row in range(4)]
        others = [_ask(second, row, 150) for row in range(4, 8)]
        await _until(lambda: _sum(second, "decode", "num_running") == 8)
        in_use = await _answer_of(second, 0, KEYED_TOKENS, **key)
        assert in_use.status == 409, in_use.body
        system.kill("router-0")
        await _severed(doomed)
        return await asyncio.gather(*others), await _once_free(second, key)

    shape(system, 1, 1)
    with second_gateway(system) as second:
        told, again = asyncio.run(run())
        assert [result.token_ids[0] for result in told] == monolithic_tokens(MODEL, [_prompt(row) for row in range(4, 8)], 150)
        assert all(result.is_done and result.error is None for result in told)
        assert again.token_ids[0] == monolithic_tokens(MODEL, [_prompt(0)], KEYED_TOKENS)[0]
        repeated = asyncio.run(_answer_of(second, 0, KEYED_TOKENS, **key))
        assert repeated.token_ids == again.token_ids and repeated.request_id == again.request_id
        second.assert_quiet()


async def _once_free(system: Any, key: dict[str, str]) -> StreamResult:
    """The lease of whoever had the key ends (redis.lease_s is 2 s here)."""
    patience = Patience(2.0 + LEFT_WITHIN_S)
    while (result := await _answer_of(system, 0, KEYED_TOKENS, **key)).status == 409:
        assert not patience.is_over(), result.body
        await asyncio.sleep(0.02)
    return result


@pytest.mark.slow
def test_a_gateway_that_stands_still_is_found_by_its_silence_and_serves_again(replica_system: Any) -> None:
    """Its sockets are open, and nobody reads them: heartbeats end them on both pools."""
    settings = {"delays.decode_step_s": 0.04, "wire.silence_timeout_s": 2.0, "wire.heartbeat_s": 0.5}
    system = replica_system(num_prefill=1, num_decode=1, **settings)

    async def run() -> list[StreamResult]:
        requests = [_ask(system, row, 100) for row in range(NUM_STREAMS)]
        await _until(lambda: _mid_decode(second, 0))
        system.kill("router-0", signal.SIGSTOP)
        took_s = await _until(lambda: not second.disquiet())
        print(f"stopped: all freed after {took_s:.2f} s of silence, which may last 2 s")
        assert took_s < 2.0 + 0.5 + LEFT_WITHIN_S
        beside = await _answer_of(second, 0, 16)
        assert beside.token_ids[0] == monolithic_tokens(MODEL, [_prompt(0)], 16)[0]
        system.kill("router-0", signal.SIGCONT)
        return await asyncio.gather(*requests)

    with second_gateway(system) as second:
        results = asyncio.run(run())
        expected = monolithic_tokens(MODEL, [_prompt(row) for row in range(NUM_STREAMS)], 100)
        for result, tokens in zip(results, expected, strict=True):  # carried on by the same pair, or ended with a type
            assert result.token_ids[0] == tokens[: result.num_tokens]
            assert (result.error is None and result.num_tokens == len(tokens)) or (result.error or {}).get("code") == "replica_lost", (
                result.error
            )
        system.wait_for_pools(1, 1)
        system.assert_quiet()


@pytest.mark.slow
def test_two_gateways_share_pools_and_each_drains_alone(replica_system: Any) -> None:
    system = replica_system(num_prefill=1, num_decode=2, **{"delays.decode_step_s": 0.02})

    async def run() -> list[StreamResult]:
        requests = [_ask(system if row % 2 else second, row, 120) for row in range(8)]
        await _until(lambda: _sum(second, "decode", "num_running") == 8)
        system.kill("router-0", signal.SIGINT)
        system.kill("decode-1", signal.SIGINT)
        late = await _answer_of(second, 99, 24)
        assert late.token_ids[0] == monolithic_tokens(MODEL, [_prompt(99)], 24)[0]
        return await asyncio.gather(*requests)

    with second_gateway(system) as second:
        results = asyncio.run(run())
        assert [result.token_ids[0] for result in results] == monolithic_tokens(MODEL, [_prompt(row) for row in range(8)], 120)
        assert all(result.is_done and result.error is None for result in results)
        for name in ("router-0", "decode-1"):
            assert system.processes[name].wait(30) == 0, name
        second.wait_for_pools(1, 1)
        second.assert_quiet()
