"""Waiting for room at a gateway with real sockets: its end, its order, what comes too late, and whom a higher priority displaces."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest

from duomo.wire.messages import ReplicaReport, StartPrefill
from services.router.pending import PendingLeg
from services.router.waiting import Weight
from tests.services.router.stub_replicas import Script, StubReplica
from tests.services.router.stub_system import StubSystem, stub_system

CHAT = {"model": "tiny-moe", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 24}
ONE_AT_A_TIME: dict[str, Any] = {"num_blocks": 4, "overrides": {"decode": {"watermark_blocks": 0}}}


class _Hashable(SimpleNamespace):
    __hash__ = object.__hash__


async def _chat(system: StubSystem, **fields: object) -> httpx.Response:
    return await system.client.post("/v1/chat/completions", json=CHAT | fields)


def _held() -> Script:
    """The first leg stops and keeps its room until the test lets it go on."""
    return Script(decode_faults=deque([("hold", 3)]))


def _with(gateway: dict[str, object]) -> dict[str, Any]:
    return {"num_blocks": 4, "overrides": {"decode": {"watermark_blocks": 0}, "gateway": gateway}}


def test_who_has_waited_long_enough_is_told_to_come_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, _held(), **_with({"queue_ttl_s": 0.2})) as system:
            running = asyncio.create_task(_chat(system))
            await system.until(lambda: system.gateway.num_live_legs == 1)
            late = await _chat(system)
            assert (late.status_code, late.json()["error"]["code"]) == (429, "queue_timeout")
            assert int(late.headers["retry-after"]) >= 1 and system.gateway.num_waiting == 0
            system.pools.go_on.set()
            assert (await running).status_code == 200

    asyncio.run(scenario())


def test_no_more_are_sent_than_decode_says_keep_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = StubReplica.report
    monkeypatch.setattr(StubReplica, "report", lambda self: msgspec.structs.replace(plain(self), max_choices=1))

    async def scenario() -> None:
        async with stub_system(tmp_path, _held(), num_blocks=64) as system:
            asked = [asyncio.create_task(_chat(system))]
            await system.until(lambda: system.gateway.num_live_legs == 1)
            asked += [asyncio.create_task(_chat(system)) for _ in range(3)]
            await system.until(lambda: system.gateway.num_waiting == 3)
            assert system.gateway.num_live_legs == 1
            several = asyncio.create_task(_chat(system, n=2))  # more than may run; alone they do
            await system.until(lambda: system.gateway.num_waiting == 4)
            system.pools.go_on.set()
            assert {answer.status_code for answer in await asyncio.gather(*asked, several)} == {200}

    asyncio.run(scenario())


def test_nobody_waits_past_the_limit_of_the_first_token(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, _held(), **_with({"max_ttft_s": 1.5})) as system:
            running = asyncio.create_task(_chat(system))
            await system.until(lambda: system.gateway.num_live_legs == 1)
            late = await _chat(system)
            assert late.status_code == 429 and late.json()["error"]["code"] in ("queue_timeout", "too_late")
            system.pools.go_on.set()
            assert (await running).status_code == 200

    asyncio.run(scenario())


def test_what_is_predicted_to_come_too_late_is_refused_at_the_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = StubReplica.report

    def busy(self: StubReplica) -> ReplicaReport:
        """A prefill replica with a hundred seconds of work: those that pass since its last report are few of them."""
        report = plain(self)
        if self.role != "prefill":
            return report
        return type(report)(
            **{name: getattr(report, name) for name in report.__struct_fields__} | {"num_work_tokens": 100_000, "tokens_per_s": 1000.0}
        )

    async def scenario() -> None:
        async with stub_system(tmp_path, Script(), overrides={"gateway": {"max_ttft_s": 4.0}}) as system:
            await system.until(lambda: all(link.report and link.report.num_work_tokens for link in system.gateway.pools.prefills()))
            refused = await _chat(system)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_late"), refused.text
            assert int(refused.headers["retry-after"]) >= 6 and "gateway.max_ttft_s" in refused.json()["error"]["message"]
            short = await system.client.post("/v1/chat/completions", json=CHAT, headers={"x-request-timeout": "3"})
            assert short.status_code == 429 and "its deadline" in short.json()["error"]["message"]

    monkeypatch.setattr(StubReplica, "report", busy)
    asyncio.run(scenario())


@pytest.mark.parametrize(("level", "counted"), [(-6, 500), (-5, 500), (-4, 0), (0, 0), (1, 0)])
def test_nobody_is_turned_away_for_those_that_wait_behind_it(tmp_path: Path, level: int, counted: int) -> None:
    """level: as the line knows it, the higher goes first; of the request that comes behind one of -5."""

    def leg(priority: int) -> PendingLeg:
        request = SimpleNamespace(received_s=time.monotonic(), priority=priority)
        weight = Weight(work_tokens=500, num_blocks=1, num_choices=1)
        return PendingLeg(flight=_Hashable(request=request), choices=(), is_resume=False, weight=weight)

    async def scenario() -> None:
        async with stub_system(tmp_path) as system:
            placing = system.gateway._placing
            placing._line.join(leg(-5))
            assert placing._line_view(leg(level)).work_tokens == counted
            placing._line.pop_head()

    asyncio.run(scenario())


def test_the_line_goes_by_priority_and_then_by_arrival(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, _held(), **ONE_AT_A_TIME) as system:
            running = asyncio.create_task(_chat(system))
            await system.until(lambda: system.gateway.num_live_legs == 1)
            asked = []
            for number, priority in enumerate((0, 0, -5, 5)):
                asked.append(asyncio.create_task(_chat(system, priority=priority, seed=number)))
                await system.until(lambda number=number: system.gateway.num_waiting == number + 1)
            system.pools.go_on.set()
            answers = await asyncio.gather(running, *asked)
            assert all(answer.status_code == 200 for answer in answers)
            starts = system.pools.of_role("prefill")[0].of_type(StartPrefill)
            assert [start.sampling.seed for start in starts][1:] == [2, 0, 1, 3]

    asyncio.run(scenario())


def test_in_a_full_line_the_last_gives_way_to_a_higher_priority(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, _held(), **_with({"max_queued_requests": 2})) as system:
            running = asyncio.create_task(_chat(system))
            await system.until(lambda: system.gateway.num_live_legs == 1)
            waiting = []
            for number in range(2):
                waiting.append(asyncio.create_task(_chat(system)))
                await system.until(lambda number=number: system.gateway.num_waiting == number + 1)
            same = await _chat(system)
            assert (same.status_code, same.json()["error"]["code"]) == (429, "queue_full")
            urgent = asyncio.create_task(_chat(system, priority=-10))
            displaced = await waiting[1]
            assert (displaced.status_code, displaced.json()["error"]["code"]) == (429, "queue_full")
            assert "higher priority" in displaced.json()["error"]["message"] and int(displaced.headers["retry-after"]) >= 1
            system.pools.go_on.set()
            assert [answer.status_code for answer in await asyncio.gather(running, waiting[0], urgent)] == [200, 200, 200]

    asyncio.run(scenario())


def test_who_left_the_line_leaves_no_timer_that_holds_its_prompt(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, Script(step_s=0.01), **ONE_AT_A_TIME) as system:
            answers = await asyncio.gather(*(_chat(system) for _ in range(4)))
            assert all(answer.status_code == 200 for answer in answers)
            due = [handle for handle in asyncio.get_running_loop()._scheduled if not handle.cancelled()]  # type: ignore[attr-defined]  # of CPython's own loop
            held = [handle for handle in due if any(isinstance(each, PendingLeg) for each in handle._args or ())]
            assert due and not held

    asyncio.run(scenario())


def test_who_has_waited_long_enough_for_a_pool_without_a_replica_is_told_that(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, _held(), **_with({"queue_ttl_s": 2.0, "failover_wait_s": 60.0, "max_lost_replicas": 0})) as system:
            running = asyncio.create_task(_chat(system))
            await system.until(lambda: system.gateway.num_live_legs == 1)
            waits = asyncio.create_task(_chat(system))
            await system.until(lambda: system.gateway.num_waiting == 1)
            await system.pools.of_role("decode")[0].die()
            told = await waits
            assert (told.status_code, told.json()["error"]["code"]) == (503, "no_decode_replica") and told.headers["retry-after"]
            await running

    asyncio.run(scenario())


def test_prompts_that_are_only_scored_are_no_short_answers(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, Script()) as system:
            for _ in range(8):
                assert (await _chat(system, max_tokens=20)).status_code == 200
            scored = {"model": "tiny-moe", "prompt": "hi", "max_tokens": 0, "echo": True}
            assert (await system.client.post("/v1/completions", json=scored)).status_code == 200
            assert system.gateway._placing._answers.mean_tokens == 20

    asyncio.run(scenario())
