"""The admin API on its port: what operators ask is done by the replicas, needs a key of its scope, and leaves a trace."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from duomo.api_keys import make_key
from duomo.errors import ConfigError, RequestError
from duomo.wire.messages import FlushCaches, Message, Refused, StartDecode
from services.admin import SOCKET_NAME, AdminCommand, AdminSocket, Replicas
from services.cli_admin import ask_of_pool, ask_of_replica, list_replicas
from services.router.keys import Keys
from services.router.operator import Operator
from services.router.pools import ReplicaLink
from services.router.service import serving_admin
from tests.ports import free_port
from tests.services.router.stub_system import PATIENCE_S, StubSystem, stub_system

CHAT = {"model": "tiny-moe", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}


@contextlib.asynccontextmanager
async def admin_system(folder: Path, **gateway: object) -> AsyncIterator[tuple[StubSystem, httpx.AsyncClient]]:
    """Two replicas of each pool; the admin API's client beside the gateway's."""
    port = free_port()
    section = {"admin_port": port, "audit_file": str(folder / "audit.jsonl")} | gateway
    async with stub_system(folder, num_prefills=2, num_decodes=2, overrides={"gateway": section}) as system:
        keys = Keys(system.gateway.config.gateway)
        url = f"http://127.0.0.1:{port}"
        async with serving_admin(system.gateway, keys), httpx.AsyncClient(base_url=url, timeout=PATIENCE_S) as client:
            yield system, client


def audited(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]


def test_a_drained_replica_gets_nothing_until_it_is_undrained(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with admin_system(tmp_path) as (system, client):
            report = (await client.get("/admin/pools")).json()
            assert len(report["replicas"]) == 4 and (await client.get("/admin/experts")).status_code == 200
            first, second = system.pools.of_role("decode")
            for drained, other in ((first, second), (second, first)):
                done = await client.post(f"/admin/replicas/{drained.replica_id}/drain")
                assert (done.status_code, done.json()["is_draining"]) == (200, True)
                before = len(drained.of_type(StartDecode)), len(other.of_type(StartDecode))
                for _ in range(4):
                    assert (await system.client.post("/v1/chat/completions", json=CHAT)).status_code == 200
                assert (len(drained.of_type(StartDecode)), len(other.of_type(StartDecode))) == (before[0], before[1] + 4)
                # What a refusal had said of it before is taken back as well.
                (link,) = (link for link in system.gateway.pools.decodes() if link.member.replica_id == drained.replica_id)
                link.has_refused_drain = True
                assert (await client.post(f"/admin/replicas/{drained.replica_id}/undrain")).json()["is_draining"] is False
                assert link.is_usable
            lines = audited(tmp_path)
            assert [(line["action"], line["target"], line["result"], line["who"]) for line in lines] == [
                (verb, replica.replica_id, "ok", "-") for replica in (first, second) for verb in ("drain", "undrain")
            ]
            assert all(line["from"] == "127.0.0.1" and line["at"].endswith("+00:00") for line in lines)
            told = (await system.client.get("/metrics")).text
            assert 'duomo_admin_actions_total{action="drain",result="ok"} 2.0' in told

    asyncio.run(scenario())


def test_caches_are_flushed_of_one_replica_or_of_a_pool(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with admin_system(tmp_path) as (system, client):
            names = {role: {replica.replica_id for replica in system.pools.of_role(role)} for role in ("prefill", "decode")}
            one = min(names["prefill"])
            assert (await client.post(f"/admin/replicas/{one}/flush")).json() == {"flushed_blocks": {one: 9}}
            for pool, flushed in (("decode", names["decode"]), ("all", names["prefill"] | names["decode"])):
                assert set((await client.post(f"/admin/pools/{pool}/flush")).json()["flushed_blocks"]) == flushed
            asked = {replica.replica_id: len(replica.of_type(FlushCaches)) for replica in system.pools.replicas}
            assert asked == dict.fromkeys(names["decode"], 2) | {name: 1 + (name == one) for name in names["prefill"]}

    asyncio.run(scenario())


def test_decodes_are_flushed_when_every_prefill_has_answered_and_a_dead_one_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with admin_system(tmp_path) as (system, client):
            order: list[str] = []
            flush = Operator.flush
            (dead, *_) = system.gateway.pools.prefills()
            name = dead.member.replica_id

            async def noted(operator: Operator, link: ReplicaLink) -> int:
                order.append(f"{link.role} asked")
                try:
                    if link is dead:
                        await asyncio.sleep(0.05)
                        raise RequestError(f"{name} is gone.", param="replica", status=404, code="replica_not_found")
                    return await flush(operator, link)
                finally:
                    order.append(f"{link.role} answered")

            monkeypatch.setattr(Operator, "flush", noted)
            told = await client.post("/admin/pools/all/flush")
            assert order[2:6] == ["prefill answered"] * 2 + ["decode asked"] * 2
            others = {replica.replica_id for replica in system.pools.replicas} - {name}
            assert told.status_code == 207 and told.json()["not_flushed"] == {name: f"{name} is gone."}
            assert told.json()["flushed_blocks"] == dict.fromkeys(others, 9) and audited(tmp_path)[-1]["result"] == "partly_done"

    asyncio.run(scenario())


def test_a_refusal_of_another_message_is_none_of_the_word_and_words_wait_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with admin_system(tmp_path) as (system, _):
            (link, *_others) = system.gateway.pools.decodes()
            operator, posted, post = Operator(system.gateway.pools), [], link.connection.post

            def late(message: Message) -> None:
                posted.append(message)
                link.heard.was_refused(Refused(code="bad_field", detail="of another message"))

            monkeypatch.setattr(link.connection, "post", late)
            words = [asyncio.create_task(operator.flush(link)) for _ in range(2)]
            await asyncio.sleep(0.1)
            assert len(posted) == 1 and not any(word.done() for word in words)
            monkeypatch.undo()
            post(posted[0])
            assert await asyncio.gather(*words) == [9, 9]

    asyncio.run(scenario())


def test_what_cannot_be_done_says_why_and_is_audited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with admin_system(tmp_path) as (system, client):
            (link, *_) = system.gateway.pools.decodes()
            name = link.member.replica_id

            async def refused(path: str, status: int, code: str, body: dict | None = None) -> None:
                answer = await client.post(path, json=body) if body is not None else await client.post(path)
                assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
                assert audited(tmp_path)[-1]["result"] == code

            await refused("/admin/replicas/nobody/drain", 404, "replica_not_found")
            await refused("/admin/pools/router/flush", 404, "pool_not_found")
            await refused("/admin/pools/router/scale", 404, "pool_not_found", {"replicas": 1})
            await refused("/admin/pools/decode/scale", 501, "not_scalable", {"replicas": 2})
            await refused("/admin/pools/decode/scale", 400, "missing_required_parameter", {})
            for value in (0, 257, "2", True):
                answer = await client.post("/admin/pools/decode/scale", json={"replicas": value})
                assert answer.status_code == 400 and answer.json()["error"]["param"] == "replicas"
            monkeypatch.setattr(link.connection, "post", lambda message: link.heard.was_refused(Refused(code="ending", detail="it ends")))
            await refused(f"/admin/replicas/{name}/undrain", 409, "ending")
            monkeypatch.undo()
            link.connection.version = 4
            for verb in ("drain", "undrain", "flush"):
                await refused(f"/admin/replicas/{name}/{verb}", 409, "peer_too_old")
            link.connection.version = 5
            browser = await client.post(f"/admin/replicas/{name}/drain", headers={"origin": "http://evil.example"})
            assert (browser.status_code, browser.json()["error"]["code"]) == (403, "from_browser")
            assert (await client.get(f"/admin/replicas/{name}/drain")).status_code == 405
            for method, path in (("POST", f"/admin/replicas/{name}/drain"), ("GET", "/admin/pools"), ("GET", "/anything")):
                rebound = await client.request(method, path, headers={"host": "evil.example"})
                assert (rebound.status_code, rebound.json()["error"]["code"]) == (403, "foreign_host")
            assert audited(tmp_path)[-1] | {"at": "", "from": ""} == {
                "at": "", "from": "", "who": "-", "action": "drain", "target": f"/admin/replicas/{name}/drain", "result": "foreign_host",
                "detail": "",
            }  # fmt: skip
            assert (await client.get("/health/live", headers={"host": "evil.example"})).status_code == 200
            assert not any(link.heard.is_draining for link in system.gateway.pools.links.values())

    asyncio.run(scenario())


def test_a_replica_that_does_not_confirm_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with admin_system(tmp_path) as (system, _):
            (link, *_others) = system.gateway.pools.decodes()
            monkeypatch.setattr(link.connection, "post", lambda message: None)
            with pytest.raises(RequestError, match="did not confirm within 0.05 s") as refusal:
                await Operator(system.gateway.pools, 0.05).flush(link)
            assert (refusal.value.status, refusal.value.code) == (504, "not_confirmed")
            monkeypatch.undo()

    asyncio.run(scenario())


def test_pools_are_scaled_by_whoever_started_them(tmp_path: Path) -> None:
    asked: list[AdminCommand] = []

    def run(command: AdminCommand) -> Replicas:
        asked.append(command)
        if command.replicas == 7:
            raise ConfigError("no card is left")
        return {"decode": {"RUNNING": command.replicas or 0}}

    async def scenario() -> None:
        async with admin_system(tmp_path) as (system, client):
            section = system.gateway.config
            system.gateway.config = section.model_copy(update={"run_dir": tmp_path})
            door = AdminSocket(tmp_path / SOCKET_NAME, run)
            door.start()
            try:
                done = await client.post("/admin/pools/decode/scale", json={"replicas": 2})
                assert done.json() == {"replicas": {"decode": {"RUNNING": 2}}}
                refused = await client.post("/admin/pools/decode/scale", json={"replicas": 7})
                assert (refused.status_code, refused.json()["error"]["code"]) == (409, "scale_refused") and "no card" in refused.text
                assert [(command.pool, command.replicas) for command in asked] == [("decode", 2), ("decode", 7)]
            finally:
                door.close()

    asyncio.run(scenario())


def test_a_key_of_scope_admin_is_needed_and_its_name_is_kept(tmp_path: Path) -> None:
    made = {scope: make_key(f"key-{scope}", [scope]) for scope in ("inference", "metrics", "admin")}

    async def scenario() -> None:
        async with admin_system(tmp_path, api_keys=[entry.line() for _, entry in made.values()]) as (system, client):
            path = f"/admin/replicas/{system.pools.of_role('decode')[0].replica_id}/flush"
            for headers, status, who in (
                ({}, 401, "-"),
                ({"authorization": "Bearer wrong"}, 401, "-"),
                ({"x-api-key": made["inference"][0]}, 403, "key-inference"),
                ({"x-api-key": made["metrics"][0]}, 403, "key-metrics"),
                ({"x-api-key": made["admin"][0]}, 200, "key-admin"),
            ):
                for read in ("/admin/pools", "/admin/experts", "/anything"):
                    assert (await client.get(read, headers=headers)).status_code == (
                        404 if status == 200 and read == "/anything" else status
                    )
                assert (await client.post(path, headers=headers)).status_code == status
                line = audited(tmp_path)[-1]
                codes = {200: "ok", 401: "invalid_api_key", 403: "insufficient_scope"}
                assert (line["who"], line["action"], line["result"]) == (who, "flush", codes[status])
            assert (await client.get("/health/live")).status_code == 200
            assert len(system.pools.of_role("decode")[0].of_type(FlushCaches)) == 1
            text = (tmp_path / "audit.jsonl").read_text()
            assert not any(key in text for key, _ in made.values()) and "wrong" not in text

    asyncio.run(scenario())


def test_the_command_speaks_to_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario() -> None:
        async with admin_system(tmp_path) as (system, client):
            url, name = str(client.base_url), system.pools.of_role("decode")[0].replica_id
            for call in (
                lambda: ask_of_replica(url, "", name, "drain"),
                lambda: list_replicas(url, ""),
                lambda: ask_of_pool(url, "", "all", "flush"),
            ):
                assert await asyncio.to_thread(call) == 0
            said = capsys.readouterr().out.splitlines()
            assert json.loads(said[0])["is_draining"] and len(said) == 6
            assert sum(line.endswith(", drains") for line in said) == 1

    asyncio.run(scenario())


def test_an_audit_file_that_cannot_be_written_stops_the_start(tmp_path: Path) -> None:
    async def scenario() -> None:
        with pytest.raises(ConfigError, match="gateway.audit_file .*cannot be written"):
            async with admin_system(tmp_path, audit_file=str(tmp_path / "no" / "folder")):
                raise AssertionError("it started")

    asyncio.run(scenario())
