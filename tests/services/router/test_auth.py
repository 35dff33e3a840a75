"""Who may call what: 401 and 403 in the form of the API that was called, open paths, keys that come and go."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import anthropic
import openai
import pytest

from duomo.api_keys import hashed, make_key
from duomo.wire.messages import StartPrefill
from services.router.auth import is_misled, needed_scopes
from services.router.cache_salt import cache_salt
from tests.services.router.stub_system import PATIENCE_S, stub_system

CHAT = {"model": "tiny-moe", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
MESSAGE = CHAT


def test_a_key_opens_what_its_scope_says_and_refusals_speak_the_apis_language(tmp_path: Path) -> None:
    made = {scope: make_key(scope, [scope]) for scope in ("inference", "metrics", "admin")}
    file = tmp_path / "keys"
    file.write_text("".join(entry.line() + "\n" for _, entry in made.values()))
    bearer = {scope: {"authorization": f"Bearer {key}"} for scope, (key, _) in made.items()}
    overrides = {"gateway": {"api_keys_file": str(file), "metrics_need_key": True}}

    async def scenario() -> None:
        async with stub_system(tmp_path, overrides=overrides) as system:
            post, get = system.client.post, system.client.get
            for path in ("/v1/chat/completions", "/v1/messages", "/v1/nothing"):
                for headers in (
                    {},
                    {"authorization": "Bearer wrong"},
                    {"x-api-key": "wrong"},
                    {"authorization": f"Basic {made['inference'][0]}"},
                ):
                    answer = await post(path, json=CHAT, headers=headers)
                    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), (path, headers)
                    if path == "/v1/messages":
                        assert answer.json()["type"] == "error" and answer.json()["error"]["type"] == "authentication_error"
                    else:
                        error = answer.json()["error"]
                        assert (error["code"], error["type"], error["param"]) == ("invalid_api_key", "invalid_request_error", None)
                    assert "wrong" not in answer.text and made["inference"][0] not in answer.text
                denied = await post(path, json=CHAT, headers=bearer["admin"])
                assert denied.status_code == 403 and "inference" in denied.text
            assert not system.pools.of_role("prefill")[0].of_type(StartPrefill), "a refusal reserves nothing"
            for headers in (bearer["inference"], {"x-api-key": made["inference"][0]}, {"authorization": f"bearer  {made['inference'][0]}"}):
                for path in ("/v1/chat/completions", "/v1/messages"):
                    assert (await post(path, json=CHAT, headers=headers)).status_code == 200
            for path in ("/health/live", "/health/ready"):
                assert (await get(path)).status_code == 200
            for path, scopes in (("/metrics", {"metrics", "admin"}), ("/admin/pools", {"admin"}), ("/v1/models", {"inference"})):
                assert (await get(path)).status_code == 401
                for scope, headers in bearer.items():
                    assert (await get(path, headers=headers)).status_code == (200 if scope in scopes else 403), (path, scope)
            counted = (await get("/metrics", headers=bearer["metrics"])).text
            assert 'duomo_requests_total{code="invalid_api_key",outcome="refused"}' in counted
            assert 'duomo_requests_total{code="insufficient_scope",outcome="refused"}' in counted

    asyncio.run(scenario())


def test_a_large_body_behind_no_key_is_refused_and_the_connection_lives(tmp_path: Path) -> None:
    own = hashed("token-abc123", "env", ["inference"]).line()

    async def scenario() -> None:
        async with stub_system(tmp_path, overrides={"gateway": {"api_keys": [own]}}) as system:
            refused = await system.client.post("/v1/chat/completions", content=b"x" * 3_000_000)
            assert refused.status_code == 401
            fine = await system.client.post("/v1/chat/completions", json=CHAT, headers={"authorization": "Bearer token-abc123"})
            assert fine.status_code == 200

    asyncio.run(scenario())


def test_the_clients_errors_are_their_own(tmp_path: Path) -> None:
    key, entry = make_key("ops", ["admin"])

    async def scenario() -> None:
        async with stub_system(tmp_path, overrides={"gateway": {"api_keys": [entry.line()]}}) as system:
            for given, one, other in (
                ("wrong", openai.AuthenticationError, anthropic.AuthenticationError),
                (key, openai.PermissionDeniedError, anthropic.PermissionDeniedError),
            ):
                with pytest.raises(one):
                    await openai.AsyncOpenAI(api_key=given, base_url=system.base_url + "/v1").chat.completions.create(**CHAT)
                with pytest.raises(other):
                    await anthropic.AsyncAnthropic(api_key=given, base_url=system.base_url).messages.create(**MESSAGE)

    asyncio.run(scenario())


def test_a_removed_key_is_refused_without_a_restart(tmp_path: Path) -> None:
    key, entry = make_key("alice", ["inference"])
    file = tmp_path / "keys"
    file.write_text(entry.line() + "\n")

    async def scenario() -> None:
        async with stub_system(tmp_path, overrides={"gateway": {"api_keys_file": str(file)}}) as system:
            headers = {"authorization": f"Bearer {key}"}
            assert (await system.client.get("/v1/models", headers=headers)).status_code == 200
            file.write_text("")
            os.utime(file, ns=(1, 1))
            until_s = asyncio.get_running_loop().time() + PATIENCE_S
            while (await system.client.get("/v1/models", headers=headers)).status_code != 401:
                assert asyncio.get_running_loop().time() < until_s
                await asyncio.sleep(0.1)

    asyncio.run(scenario())


def test_prefixes_are_salted_by_the_key_that_opened_the_door(tmp_path: Path) -> None:
    """Were the salt another header's, who holds one key could look for prefixes under any other."""
    made = [make_key(name, ["inference"]) for name in ("a", "b")]

    async def scenario() -> None:
        async with stub_system(tmp_path, overrides={"gateway": {"api_keys": [entry.line() for _, entry in made]}}) as system:
            (one, _), (other, _) = made
            for headers in ({"authorization": f"Bearer {one}", "x-api-key": other}, {"x-api-key": one}):
                assert (await system.client.post("/v1/chat/completions", json=CHAT, headers=headers)).status_code == 200
            mixed = {"authorization": f"Basic {one}", "x-api-key": other}
            assert (await system.client.post("/v1/chat/completions", json=CHAT, headers=mixed)).status_code == 401
            salts = {start.cache_salt for start in system.pools.of_role("prefill")[0].of_type(StartPrefill)}
            assert salts == {cache_salt(one)}

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("path", "scopes"),
    [
        ("/health", ()),
        ("/health/live", ()),
        ("/healthy", ("inference",)),
        ("/metrics", ()),
        ("/metrics/", ("inference",)),
        ("/admin/pools", ("admin",)),
        ("/admin", ("inference",)),
        ("/v1/models", ("inference",)),
        ("/", ("inference",)),
        ("//health/live", ("inference",)),
    ],
)
def test_every_path_but_a_few_is_closed(path: str, scopes: tuple[str, ...]) -> None:
    assert needed_scopes(path, metrics_need_key=False) == scopes


@pytest.mark.parametrize(
    ("named", "host", "is_foreign"),
    [
        ("localhost:8000", "127.0.0.1", False),
        ("LOCALHOST", "127.0.0.1", False),
        ("127.0.0.1:8000", "127.0.0.1", False),
        ("127.8.9.1", "127.0.0.1", False),
        ("[::1]:8000", "127.0.0.1", False),
        ("[::1]", "::1", False),
        ("evil.example", "127.0.0.1", True),
        ("evil.example:8000", "localhost", True),
        ("localhost.evil.example", "127.0.0.1", True),
        ("127.0.0.1.evil.example:8000", "127.0.0.1", True),
        ("10.0.0.9:8000", "127.0.0.1", True),
        ("[fe80::1]:8000", "::1", True),
        ("", "127.0.0.1", True),
        ("evil.example", "0.0.0.0", False),
        ("evil.example", "10.0.0.9", False),
    ],
)
def test_a_name_that_a_page_may_have_let_lead_here_is_known(named: str, host: str, is_foreign: bool) -> None:
    scope = {"type": "http", "scheme": "http", "headers": [(b"host", named.encode())]}
    assert is_misled(scope, host) is is_foreign
    assert not is_misled(scope | {"scheme": "https"}, host), "a page has no certificate of ours"
    assert not is_misled(scope | {"headers": []}, host), "every browser names one"
    twice = [(b"host", b"127.0.0.1"), (b"host", named.encode())]
    assert is_misled(scope | {"headers": twice}, host) is is_foreign


def test_without_keys_admins_paths_are_not_for_other_names(tmp_path: Path) -> None:
    own = hashed("token-abc123", "env", ["admin"]).line()

    async def scenario() -> None:
        foreign = {"host": "evil.example:8000"}
        async with stub_system(tmp_path) as system:
            refused = await system.client.get("/admin/pools", headers=foreign)
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "foreign_host")
            assert "gateway.api_keys_file" in refused.json()["error"]["message"]
            assert (await system.client.get("/admin/pools")).status_code == 200
            for path in ("/v1/models", "/health/ready", "/metrics"):
                assert (await system.client.get(path, headers=foreign)).status_code == 200
        keyed = tmp_path / "keyed"
        keyed.mkdir()
        async with stub_system(keyed, overrides={"gateway": {"api_keys": [own]}}) as system:
            assert (await system.client.get("/admin/pools", headers=foreign)).status_code == 401
            allowed = await system.client.get("/admin/pools", headers=foreign | {"authorization": "Bearer token-abc123"})
            assert allowed.status_code == 200

    asyncio.run(scenario())
