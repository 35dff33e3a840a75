"""Replicas that die or keep failing under a request: what its client sees, and who is asked next. Owns no other fault (test_gateway.py)."""

from __future__ import annotations

import asyncio
import copy
import time
from collections import deque
from pathlib import Path
from typing import Any

import msgspec
import pytest

from duomo.errors import PeerError
from duomo.wire.connection import Connection
from duomo.wire.messages import ReplicaReport, RequestFailed, Resume, StartDecode, StartPrefill
from services.router import pools
from services.router.pending import PendingLeg
from services.router.placing import Placing
from tests.services.router.stub_chat import chat, streamed, texts
from tests.services.router.stub_replicas import Script, StubReplica
from tests.services.router.stub_system import stub_system

BARRED_FOR_LONG = {"breaker_failures": 2, "breaker_open_s": 600.0, "max_breaker_open_s": 600.0}  # no trial falls into the test


@pytest.mark.parametrize(("at", "stream"), [(0, False), (0, True), (10, False), (10, True)])
def test_a_stream_survives_its_decode_replicas(tmp_path: Path, at: int, stream: bool) -> None:
    async def scenario() -> None:
        script = Script(decode_faults=deque([("die", at)] * 2))
        async with stub_system(tmp_path, script, num_decodes=3) as system:
            answer = await chat(system, stream=stream)
            text, error = streamed(answer) if stream else (texts(answer)[0], None)
            assert error is None and text == system.story.text(0, 24)
            resumes = [message for decode in system.pools.of_role("decode") for message in decode.of_type(Resume)]
            assert sorted(len(message.emitted_ids) for message in resumes) == [at + 1, 2 * at + 2]
            assert b'duomo_resumes_total{cause="decode_lost"} 2.0' in system.gateway.metrics.render()

    asyncio.run(scenario())


def test_every_choice_survives_its_decode_replica(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, Script(decode_faults=deque([("die", 7)])), num_decodes=2) as system:
            assert texts(await chat(system, n=3)) == [system.story.text(choice, 24) for choice in range(3)]
            resumes = [message for decode in system.pools.of_role("decode") for message in decode.of_type(Resume)]
            assert sorted(message.choice for message in resumes) == [0, 1, 2]

    asyncio.run(scenario())


def test_a_request_that_replicas_keep_dying_under_is_not_given_to_all(tmp_path: Path) -> None:
    async def scenario() -> None:
        script = Script(decode_faults=deque([("die", 2)] * 3))
        overrides = {"gateway": {"max_lost_replicas": 2}}
        async with stub_system(tmp_path, script, num_decodes=4, overrides=overrides) as system:
            text, error = streamed(await chat(system, stream=True))
            assert error is not None and error["code"] == "replica_lost" and "3 replicas died" in error["message"]
            assert text == system.story.text(0, 9)
            assert len(system.gateway.pools.decodes()) == 1

    asyncio.run(scenario())


def test_a_stream_waits_for_the_replica_that_comes_in_place_of_the_last(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, Script(decode_faults=deque([("die", 5)]))) as system:
            asked = asyncio.create_task(chat(system))
            await system.until(lambda: not system.gateway.pools.decodes())
            refused = await chat(system)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_decode_replica")
            assert system.gateway.num_waiting == 1
            await system.pools.add("decode", system.directory)
            assert texts(await asked) == [system.story.text(0, 24)]

    asyncio.run(scenario())


@pytest.mark.parametrize(("role", "code"), [("decode", "replica_lost"), ("prefill", "replica_lost")])
def test_nobody_waits_for_ever_for_a_pool_without_replicas(tmp_path: Path, role: str, code: str) -> None:
    async def scenario() -> None:
        is_decode = role == "decode"
        script = Script(decode_faults=deque([("die", 5)])) if is_decode else Script(prefill_faults=deque(["die"]))
        async with stub_system(tmp_path, script, overrides={"gateway": {"failover_wait_s": 0.2}}) as system:
            answer = await chat(system)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (503, code) and f"no {role} replica has come" in error["message"]

    asyncio.run(scenario())


def test_a_replica_that_keeps_failing_is_left_alone_while_there_is_another(tmp_path: Path) -> None:
    async def scenario() -> None:
        script = Script()
        async with stub_system(tmp_path, script, num_prefills=2, overrides={"gateway": BARRED_FOR_LONG}) as system:
            failing = min(system.pools.of_role("prefill"), key=lambda prefill: prefill.boot_id)  # the first of equals
            script.failing.add(failing.replica_id)
            for _ in range(24):
                assert texts(await chat(system)) == [system.story.text(0, 24)]
            assert len(failing.of_type(StartPrefill)) == 2
            rendered = system.gateway.metrics.render()
            assert b'duomo_breakers_opened_total{kind="leg"} 1.0' in rendered and b'reason="avoid_barred"' in rendered

    asyncio.run(scenario())


def test_a_pair_whose_handoffs_fail_is_left_alone_and_both_replicas_are_not(tmp_path: Path) -> None:
    async def scenario() -> None:
        script = Script(failing_phase="kv.handoff")
        async with stub_system(tmp_path, script, num_decodes=2, overrides={"gateway": BARRED_FOR_LONG}) as system:
            failing = min(system.pools.of_role("decode"), key=lambda decode: decode.boot_id)
            script.failing.add(failing.replica_id)
            for _ in range(24):
                assert texts(await chat(system)) == [system.story.text(0, 24)]
            assert len(failing.of_type(StartDecode)) == 2
            assert b'duomo_breakers_opened_total{kind="pair"} 1.0' in system.gateway.metrics.render()

    asyncio.run(scenario())


def test_a_pair_that_never_grants_though_it_has_room_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, Script(), num_decodes=2, overrides={"gateway": BARRED_FOR_LONG}) as system:
            stuck = min(system.pools.of_role("decode"), key=lambda decode: decode.boot_id)
            plain = StubReplica._prefill

            async def ungranted(self: StubReplica, connection: Connection, start: StartPrefill) -> None:
                if start.decode.boot_id != stuck.boot_id:
                    await plain(self, connection, start)
                    return
                told = {name: getattr(start, name) for name in ("request_id", "attempt", "traceparent", "remaining_s")}
                connection.post(RequestFailed(**told, code="no_grant", detail="no grant", phase="kv.handoff", retryable=True))

            monkeypatch.setattr(StubReplica, "_prefill", ungranted)
            for _ in range(24):
                assert texts(await chat(system)) == [system.story.text(0, 24)]
            assert len(stuck.of_type(StartDecode)) == 2
            assert b'duomo_breakers_opened_total{kind="pair"} 1.0' in system.gateway.metrics.render()

    asyncio.run(scenario())


def test_a_pair_without_landing_slots_has_not_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = StubReplica.report
    monkeypatch.setattr(StubReplica, "report", lambda self: msgspec.structs.replace(plain(self), num_free_slots=0))

    async def scenario() -> None:
        script = Script(prefill_faults=deque(["no_grant"] * 6))
        async with stub_system(tmp_path, script, overrides={"gateway": BARRED_FOR_LONG}) as system:
            assert texts(await chat(system)) == [system.story.text(0, 24)]
            assert b"duomo_breakers_opened_total{" not in system.gateway.metrics.render()

    asyncio.run(scenario())


def test_who_has_not_reported_for_a_while_is_left_alone_while_there_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "SILENT_S", 1.5)
    plain, silent = StubReplica.report, list[str]()

    def report(self: StubReplica) -> ReplicaReport:
        if self.boot_id in silent:
            raise PeerError("it stands still")
        return plain(self)

    monkeypatch.setattr(StubReplica, "report", report)

    async def scenario() -> None:
        async with stub_system(tmp_path, num_decodes=2) as system:
            still, other = sorted(system.pools.of_role("decode"), key=lambda decode: decode.boot_id)
            silent.append(still.boot_id)
            link = system.gateway.pools.links[still.boot_id]
            await system.until(lambda: link.is_silent(time.monotonic()))
            for _ in range(12):
                assert texts(await chat(system)) == [system.story.text(0, 24)]
            assert not still.of_type(StartDecode) and len(other.of_type(StartDecode)) == 12
            silent.clear()
            await system.until(lambda: not link.is_silent(time.monotonic()))

    asyncio.run(scenario())


def test_the_only_replica_is_taken_whatever_its_breaker_says(tmp_path: Path) -> None:
    async def scenario() -> None:
        script = Script(prefill_faults=deque(["fail"] * 3))
        async with stub_system(tmp_path, script, overrides={"gateway": {"breaker_failures": 1}}) as system:
            assert texts(await chat(system)) == [system.story.text(0, 24)]
            assert b'duomo_route_reasons_total{pool="prefill",reason="only_barred_left"}' in system.gateway.metrics.render()

    asyncio.run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_attempts_are_not_used_up_before_the_death_of_decode_is_heard_of(tmp_path: Path, stream: bool) -> None:
    """Prefill cannot reach it, and says so at once each time; the pauses between the attempts add up to three quarters of a second."""

    async def scenario() -> None:
        script = Script(prefill_faults=deque(["unreachable"] * 6))
        async with stub_system(tmp_path, script, overrides={"gateway": {"max_prefill_retries": 6}}) as system:
            began_s = time.monotonic()
            answer = await chat(system, stream=stream)
            assert (streamed(answer)[0] if stream else texts(answer)[0]) == system.story.text(0, 24)
            assert time.monotonic() - began_s >= 0.7

    asyncio.run(scenario())


def test_a_decode_that_stays_out_of_reach_is_given_up_after_as_many_attempts_as_any(tmp_path: Path) -> None:
    async def scenario() -> None:
        script = Script(prefill_faults=deque(["unreachable"] * 40))
        async with stub_system(tmp_path, script, overrides={"gateway": {"max_prefill_retries": 3}}) as system:
            answer = await chat(system)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unreachable")
            (prefill,) = system.pools.of_role("prefill")
            assert len(prefill.of_type(StartPrefill)) == 4

    asyncio.run(scenario())


def test_a_pool_that_stood_empty_before_is_waited_for_as_long_again(tmp_path: Path) -> None:
    """Also where nobody was in line when it filled: how long it has been empty is counted from the last time."""

    async def scenario() -> None:
        script = Script(decode_faults=deque([("die", 5), ("die", 5)]))
        async with stub_system(tmp_path, script) as system:
            first = asyncio.create_task(chat(system))
            await system.until(lambda: not system.gateway.pools.decodes() and system.gateway.num_waiting == 1)
            first.cancel()
            await system.until(lambda: system.gateway.num_live_requests == 0)
            placing = system.gateway._placing
            assert placing._shut_since_s is not None
            placing._shut_since_s -= 100  # as if it had stood empty for longer than anybody waits
            await system.pools.add("decode", system.directory)
            await system.until(lambda: system.gateway.why_not_ready() is None)
            second = asyncio.create_task(chat(system))
            await system.until(lambda: not system.gateway.pools.decodes() and system.gateway.num_waiting == 1)
            await system.pools.add("decode", system.directory)
            assert texts(await second) == [system.story.text(0, 24)]

    asyncio.run(scenario())


def test_a_replica_that_dies_under_several_choices_is_one(tmp_path: Path) -> None:
    async def scenario() -> None:
        script = Script(decode_faults=deque([("die", 7), *[("hold", 3)] * 4, ("die", 3)]), step_s=0.01)
        async with stub_system(tmp_path, script, num_decodes=2, overrides={"gateway": {"max_lost_replicas": 2}}) as system:
            asked = asyncio.create_task(chat(system, n=5, max_tokens=40))
            await system.until(lambda: not system.gateway.pools.decodes())
            await system.pools.add("decode", system.directory)
            assert texts(await asked) == [system.story.text(choice, 40) for choice in range(5)]

    asyncio.run(scenario())


def test_a_first_token_that_is_lost_with_its_prefill_replica_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode had all KV, and has said its last word when the death is seen."""

    async def scenario() -> None:
        async with stub_system(tmp_path) as system:
            (prefill,) = system.pools.of_role("prefill")

            async def lost(connection: Connection, start: StartPrefill) -> None:
                system.pools.kv(start.request_id, start.attempt).set()
                await system.until(lambda: any(leg.decode_is_over for link in system.gateway.pools.prefills() for leg in link.legs))
                prefill._tasks.add(asyncio.create_task(prefill.die()))

            monkeypatch.setattr(prefill, "_prefill", lost)
            asked = asyncio.create_task(chat(system))
            await system.until(lambda: not system.gateway.pools.prefills())
            await system.pools.add("prefill", system.directory)
            assert texts(await asked) == [system.story.text(0, 24)]

    asyncio.run(scenario())


@pytest.mark.parametrize("faults", [{"decode_faults": deque([("fail", 3)])}, {"prefill_faults": deque(["fail"])}], ids=["resume", "retry"])
def test_what_an_attempt_finds_of_its_own_request_was_not_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faults: dict[str, Any]
) -> None:
    """The first attempt's prefill replica is cancelled before it has said how it ended; the second one's prefix cache knows the first."""
    script = Script(prefill_finishes=False, **copy.deepcopy(faults))
    plain = StubReplica._prefill

    async def finding(self: StubReplica, connection: Connection, start: StartPrefill) -> None:
        script.prefill_finishes, script.cached_tokens = start.attempt > 0, len(start.prompt_ids) + len(start.emitted_ids)
        await plain(self, connection, start)

    monkeypatch.setattr(StubReplica, "_prefill", finding)

    async def scenario() -> None:
        async with stub_system(tmp_path, script) as system:
            answer = await chat(system)
            assert texts(answer) == [system.story.text(0, 24)]
            assert answer.json()["usage"]["prompt_tokens_details"] is None, "nobody has said it"

    asyncio.run(scenario())


def _of(blocks: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on replicas of these roles, or with these boot ids, report so many blocks."""
    plain = StubReplica.report

    def report(self: StubReplica) -> ReplicaReport:
        num = blocks.get(self.boot_id, blocks.get(self.role))
        told = plain(self)
        return told if num is None else msgspec.structs.replace(told, num_blocks=num, num_free_blocks=num)

    monkeypatch.setattr(StubReplica, "report", report)


def test_what_a_resume_could_not_compute_again_is_refused_at_the_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefill replica holds 64 tokens: a stream of more could not go on elsewhere, be it preempted or its replica dead."""
    _of({"prefill": 4}, monkeypatch)

    async def scenario() -> None:
        async with stub_system(tmp_path, Script(decode_faults=deque([("preempt", 20)]))) as system:
            refused = await chat(system, max_tokens=200)
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "never_fits"), refused.text
            assert "prefill pool" in refused.json()["error"]["message"] and "at most 64" in refused.json()["error"]["message"]
            num_prompt = (await chat(system, max_tokens=1)).json()["usage"]["prompt_tokens"]
            assert texts(await chat(system, max_tokens=65 - num_prompt)) == [system.story.text(0, 65 - num_prompt)], "its last is not"

    asyncio.run(scenario())


@pytest.mark.parametrize(("comes", "drains"), [(True, False), (False, False), (False, True)], ids=["comes", "none", "drains"])
def test_a_stream_that_none_of_those_left_can_serve_waits_for_one_that_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, comes: bool, drains: bool
) -> None:
    blocks: dict[str, int] = {}
    _of(blocks, monkeypatch)

    async def scenario() -> None:
        script = Script(decode_faults=deque([("die", 20)]))
        overrides = {"gateway": {"failover_wait_s": 60.0 if comes else 0.5}}
        async with stub_system(tmp_path, script, num_prefills=2, overrides=overrides) as system:
            first = system.pools.of_role("decode")[0]
            asked = asyncio.create_task(chat(system, stream=True, max_tokens=200))
            await system.until(lambda: bool(first.of_type(StartDecode)))
            if drains:
                (await system.pools.add("decode", system.directory)).is_draining = True  # it would fit there, and is not taken
            small = await system.pools.add("decode", system.directory)
            blocks[small.boot_id] = 4
            if comes:
                await system.until(lambda: any(leg.stranded_since_s for leg in stranded))
                assert system.gateway.num_waiting == 1, "beside the line, and counted"
                del blocks[small.boot_id]
            text, error = streamed(await asked)
            if comes:
                assert (text, error) == (system.story.text(0, 200), None)
                assert all(leg.stranded_since_s is None for leg in stranded), "another time it waits as long"
            else:
                assert error is not None and error["code"] == "replica_lost" and "decode pool" in error["message"]
                assert text and system.story.text(0, 200).startswith(text)
            assert system.gateway.num_waiting == 0

    stranded: list[PendingLeg] = []
    plain = Placing.begin_again

    def begin_again(self: Placing, pending: PendingLeg, after_s: float = 0.0) -> None:
        stranded.append(pending)
        plain(self, pending, after_s)

    monkeypatch.setattr(Placing, "begin_again", begin_again)
    asyncio.run(scenario())
