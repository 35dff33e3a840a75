"""Replicas of two wire versions behind one gateway, by real handshakes: what only the newer ones know goes to them alone."""

from __future__ import annotations

import asyncio
from collections import deque
from pathlib import Path

import pytest

from duomo.wire.messages import SINCE, WIRE_VERSION, StartPrefill
from tests.services.router.stub_replicas import Script, StubReplica
from tests.services.router.stub_system import StubSystem, stub_system

TEXT = {"model": "tiny-moe", "prompt": "Once upon a time", "max_tokens": 4}
SCORED = TEXT | {"prompt_logprobs": 1}
NEWER = SINCE["Sampling", "prompt_logprobs"]


async def newer(system: StubSystem, *roles: str) -> list[StubReplica]:
    """Replicas of this version beside those that are there."""
    added = [await system.pools.add("prefill" if role == "prefill" else "decode", system.directory) for role in roles]
    links = system.gateway.pools.links
    await system.until(lambda: all(one.boot_id in links and links[one.boot_id].is_usable for one in added))
    return added


def num_started(replica: StubReplica) -> int:
    return len({(one.request_id, one.attempt) for one in replica.of_type(StartPrefill)})


def test_what_only_newer_replicas_know_goes_to_them_and_the_rest_to_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duomo.wire.handshake.WIRE_VERSION", NEWER - 1)

    async def scenario() -> None:
        async with stub_system(tmp_path, script := Script(), num_prefills=2, num_decodes=2) as system:
            links = system.gateway.pools.links
            assert {link.connection.version for link in links.values()} == {NEWER - 1}
            old = list(system.pools.replicas)
            for _ in range(2):
                answer = await system.client.post("/v1/completions", json=SCORED)
                told = answer.json()["error"]
                assert (answer.status_code, told["code"]) == (503, "peer_too_old") and "retry-after" in answer.headers
                assert f"wire version {NEWER}" in told["message"]
            assert not any(replica.seen_starts for replica in old)
            monkeypatch.setattr("duomo.wire.handshake.WIRE_VERSION", WIRE_VERSION)
            (decode,) = await newer(system, "decode")
            answer = await system.client.post("/v1/completions", json=SCORED)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "peer_too_old"), "one of a pair is not enough"
            first, second = await newer(system, "prefill", "prefill")
            assert {links[one.boot_id].connection.version for one in (decode, first, second)} == {WIRE_VERSION}
            for _ in range(6):
                assert (await system.client.post("/v1/completions", json=SCORED)).status_code == 200
            assert not any(replica.seen_starts for replica in old)
            script.prefill_faults += deque(["fail"])
            before = num_started(first) + num_started(second)
            assert (await system.client.post("/v1/completions", json=SCORED)).status_code == 200
            assert num_started(first) + num_started(second) == before + 2, "a retry stays among them"
            answers = await asyncio.gather(*(system.client.post("/v1/completions", json=TEXT) for _ in range(24)))
            assert {answer.status_code for answer in answers} == {200}
            assert any(replica.seen_starts for replica in old), "the older ones serve what they know"

    asyncio.run(scenario())


def test_a_scored_request_waits_for_the_newer_ones_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room on an older one is none for it."""

    async def scenario() -> None:
        monkeypatch.setattr("duomo.wire.handshake.WIRE_VERSION", NEWER - 1)
        async with stub_system(tmp_path, Script(decode_faults=deque([("hold", 3)])), num_blocks=8) as system:
            old = list(system.pools.replicas)
            monkeypatch.setattr("duomo.wire.handshake.WIRE_VERSION", WIRE_VERSION)
            await newer(system, "prefill", "decode")
            body = SCORED | {"max_tokens": 60}
            asked = [asyncio.create_task(system.client.post("/v1/completions", json=body)) for _ in range(4)]
            await system.until(lambda: system.gateway.num_live_legs == 1 and system.gateway.num_waiting == 3)
            system.pools.go_on.set()
            answers = await asyncio.gather(*asked)
            assert {answer.status_code for answer in answers} == {200} and not any(replica.seen_starts for replica in old)

    asyncio.run(scenario())
