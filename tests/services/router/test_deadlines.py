"""X-Request-Timeout: read strictly, never above the gateway's own limit, on the wire for both pools, and a typed end when it is over."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import deque
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from duomo.errors import RequestError
from duomo.wire.messages import Cancel, StartDecode, StartPrefill
from services.router import structured
from services.router.deadlines import allowed_s, asked_timeout_s
from tests.services.router.stub_replicas import Fault, Script
from tests.services.router.stub_system import StubSystem, expire, overdue, stub_system

CHAT: Any = {"model": "tiny-moe", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 24}


@pytest.mark.parametrize(("told", "seconds"), [("30", 30.0), ("2.5", 2.5), (" 0.25 ", 0.25), ("999999999", 999_999_999.0)])
def test_seconds_are_read(told: str, seconds: float) -> None:
    assert asked_timeout_s([told]) == seconds


@pytest.mark.parametrize(
    "told", ["", "0", "0.0", "-1", "+1", "1e3", "inf", "nan", "5s", "1,5", "0x10", "٣", ".5", "5.", "30, 40", "9" * 400]
)
def test_what_is_no_number_of_seconds_is_refused_by_name(told: str) -> None:
    with pytest.raises(RequestError, match="'X-Request-Timeout' is .* but must be seconds above 0") as refused:
        asked_timeout_s([told])
    assert refused.value.param == "X-Request-Timeout" and refused.value.status == 400 and len(refused.value.detail) < 200


def test_it_is_given_once_or_not_at_all() -> None:
    assert asked_timeout_s([]) is None
    with pytest.raises(RequestError, match="given 2 times"):
        asked_timeout_s(["5", "5"])


def test_a_client_may_ask_for_less_and_never_for_more() -> None:
    assert [allowed_s(asked_s, 300.0) for asked_s in (None, 5.0, 300.0, 301.0)] == [300.0, 5.0, 300.0, 300.0]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_a_bad_header_is_refused_before_anything_is_reserved(tmp_path: Path, path: str) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path) as system:
            answer = await system.client.post(path, json=CHAT, headers={"x-request-timeout": "soon"})
            assert answer.status_code == 400 and "'X-Request-Timeout' is 'soon'" in answer.json()["error"]["message"]
            assert not system.pools.of_role("prefill")[0].of_type(StartPrefill)

    asyncio.run(scenario())


@pytest.mark.parametrize(("asked", "given_s"), [("20", 20.0), ("4000", 60.0)])
def test_both_pools_are_told_what_is_left_of_it(tmp_path: Path, asked: str, given_s: float) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, overrides={"gateway": {"request_deadline_s": 60.0}}) as system:
            answer = await system.client.post("/v1/chat/completions", json=CHAT, headers={"x-request-timeout": asked})
            assert answer.status_code == 200 and float(answer.headers["x-request-timeout"]) == given_s
            plain = await system.client.post("/v1/chat/completions", json=CHAT)
            assert "x-request-timeout" not in plain.headers
            first, second = system.pools.of_role("prefill")[0].of_type(StartPrefill)
            expected = system.pools.of_role("decode")[0].of_type(StartDecode)[0]
            assert given_s - 10 < first.remaining_s <= given_s and first.remaining_s == expected.remaining_s
            assert 50.0 < second.remaining_s <= 60.0

    asyncio.run(scenario())


async def _both_sides_were_cancelled(system: StubSystem) -> None:
    replicas = [*system.pools.of_role("prefill"), *system.pools.of_role("decode")]
    await system.until(lambda: all(replica.of_type(Cancel) for replica in replicas))
    assert {message.reason for replica in replicas for message in replica.of_type(Cancel)} == {"deadline_exceeded"}


def _held(fault_of_decode: tuple[Fault | None, int] | None) -> Script:
    if fault_of_decode is None:
        return Script(prefill_faults=deque(["hold", "hold"]))
    return Script(decode_faults=deque([fault_of_decode, fault_of_decode]), prefill_finishes=False)


def test_what_is_not_finished_in_time_is_a_408_that_clients_do_not_retry(tmp_path: Path) -> None:
    """Not 504: no upstream is at fault; and whose time is over is not helped by the same again, three times over."""

    async def scenario() -> None:
        async with stub_system(tmp_path, _held(None)) as system:
            client = openai.AsyncOpenAI(base_url=f"{system.base_url}/v1", api_key="none", max_retries=2)
            asked = asyncio.create_task(client.chat.completions.create(**CHAT, extra_headers={"x-request-timeout": "250"}))
            await expire(system, 1)
            with pytest.raises(openai.APIStatusError) as late:
                await asked
            assert late.value.status_code == 408 and late.value.code == "deadline_exceeded" and late.value.type == "timeout_error"
            assert "within 250 s" in late.value.message
            await _both_sides_were_cancelled(system)
            assert len(system.pools.of_role("prefill")[0].of_type(StartPrefill)) == 1
            claude = anthropic.AsyncAnthropic(base_url=system.base_url, api_key="none", max_retries=2)
            again = asyncio.create_task(claude.messages.create(**CHAT, extra_headers={"x-request-timeout": "250"}))
            await expire(system, 1)
            with pytest.raises(anthropic.APIStatusError) as too_late:
                await again
            assert too_late.value.status_code == 408 and too_late.value.type == "timeout_error"
            assert len(system.pools.of_role("prefill")[0].of_type(StartPrefill)) == 2
            await client.close()
            await claude.close()

    asyncio.run(scenario())


def test_a_constraint_that_is_still_compiled_when_the_time_is_over_is_waited_for_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = threading.Event()
    monkeypatch.setattr(structured, "check", lambda constraint, field: compiled.wait(60))
    monkeypatch.setattr(structured, "CHECK_LIMIT_S", 60.0)

    async def scenario() -> None:
        async with stub_system(tmp_path) as system:
            asked = CHAT | {"structured_outputs": {"regex": "compiled by this test alone"}}
            late = await system.client.post("/v1/chat/completions", json=asked, headers={"x-request-timeout": "0.1"})
            compiled.set()
            assert (late.status_code, late.json()["error"]["code"]) == (408, "deadline_exceeded")
            assert not system.pools.of_role("prefill")[0].of_type(StartPrefill)

    asyncio.run(scenario())


def test_a_stream_whose_time_is_over_ends_with_a_typed_event(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, _held(("hold", 3))) as system:
            body, headers = CHAT | {"stream": True}, {"x-request-timeout": "250"}
            asked = asyncio.create_task(system.client.post("/v1/chat/completions", json=body, headers=headers))
            await system.until(lambda: any(len(one.emitted) == 4 for flight in system.gateway._flights for one in flight.choices))
            await expire(system, 1)
            answer = await asked
            events = [event.removeprefix("data: ") for event in answer.text.strip().split("\n\n")]
            assert answer.status_code == 200 and events[-1] == "[DONE]"
            assert json.loads(events[-2])["error"]["code"] == "deadline_exceeded"
            assert sum("content" in event for event in events) == 1 + 4, "the opening, and what had come"
            await _both_sides_were_cancelled(system)

    asyncio.run(scenario())


def test_one_that_waits_for_room_waits_no_longer(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, Script(decode_faults=deque([("hold", 3)])), num_blocks=16) as system:
            long = asyncio.create_task(system.client.post("/v1/chat/completions", json=CHAT | {"max_tokens": 120}))
            await system.until(lambda: system.gateway.num_live_legs == 1)
            body, headers = CHAT | {"max_tokens": 120}, {"x-request-timeout": "200"}
            asked = asyncio.create_task(system.client.post("/v1/chat/completions", json=body, headers=headers))
            await system.until(lambda: system.gateway.num_waiting == 1)
            (waiting,) = (flight for flight in system.gateway._flights if not flight.legs)
            overdue(system, waiting)
            late = await asked
            assert (late.status_code, late.json()["error"]["code"]) == (408, "deadline_exceeded")
            system.pools.go_on.set()
            assert (await long).status_code == 200
            assert len(system.pools.of_role("prefill")[0].of_type(StartPrefill)) == 1

    asyncio.run(scenario())
