"""Bodies that are no request or too large: refused, and the refusal reaches the client however it sends."""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

from tests.services.router.stub_system import PATIENCE_S, stub_system

CHAT = {"model": "tiny-moe", "messages": [{"role": "user", "content": "hi"}]}


def test_bodies_that_are_no_request_name_the_body(tmp_path: Path) -> None:
    async def chunks(num: int) -> AsyncIterator[bytes]:
        for _ in range(num):
            yield b"x" * 100_000

    async def scenario() -> None:
        async with stub_system(tmp_path, overrides={"gateway": {"max_body_bytes": 1_000_000}}) as system:
            post = system.client.post
            refused = {
                "invalid_utf8": await post("/v1/chat/completions", content=b'{"model":"\xff"}'),
                "invalid_json": await post("/v1/chat/completions", content=b'{"model":'),
                "invalid_type": await post("/v1/completions", content=b"[1]"),
            }
            surrogate = await post("/v1/completions", content=b'{"model":"tiny-moe","prompt":"\\ud800"}')
            deep = await post("/v1/completions", content=b"[" * 100_000)
            assert {surrogate.status_code, deep.status_code} == {400}
            for code, answer in refused.items():
                assert (answer.status_code, answer.json()["error"]["param"], answer.json()["error"]["code"]) == (400, "body", code)
            declared = await post("/v1/chat/completions", content=b"x" * 20_000_000)
            counted = await post("/v1/chat/completions", content=chunks(20))
            for answer in (declared, counted):
                assert (answer.status_code, answer.json()["error"]["param"]) == (413, "body"), answer.text
            fine = await post("/v1/chat/completions", json=CHAT | {"max_tokens": 1})
            assert fine.status_code == 200, "the connection outlives a refusal"

    asyncio.run(scenario())


def test_a_client_that_writes_all_before_it_reads_sees_the_refusal(tmp_path: Path) -> None:
    """A socket closed with unread bytes is reset, and takes the answer along."""

    def post(url: str) -> int:
        try:
            urllib.request.urlopen(urllib.request.Request(url, b"x" * 20_000_000), timeout=PATIENCE_S)
        except urllib.error.HTTPError as error:
            assert b'"param":"body"' in error.read()
            return error.code
        return 200

    async def scenario() -> None:
        async with stub_system(tmp_path) as system:
            for _ in range(3):
                assert await asyncio.to_thread(post, system.base_url + "/v1/completions") == 413

    asyncio.run(scenario())


def test_a_client_that_asks_first_is_refused_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path) as system:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(system.base_url.rsplit(":", 1)[1]))
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 20000000\r\nExpect: 100-continue\r\n\r\n")
            assert (await asyncio.wait_for(reader.readline(), PATIENCE_S)).startswith(b"HTTP/1.1 413")
            writer.close()

    asyncio.run(scenario())
