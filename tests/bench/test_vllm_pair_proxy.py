"""The proxy before a pair of vLLM servers: what each leg is asked, a stream passed on as it comes, errors passed on."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer

from bench.serve.vllm_pair_proxy import KEEP_KV, PairProxy

TOLD = {"do_remote_prefill": True, "remote_block_ids": [[1, 2]], "remote_engine_id": "e"}


@dataclass
class Servers:
    """Both ends of a pair. go_on: the decode server's second chunk waits for it."""

    prefilled: list[dict[str, Any]] = field(default_factory=list)
    decoded: list[dict[str, Any]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    status: int = 200
    go_on: asyncio.Event = field(default_factory=asyncio.Event)

    def prefill(self) -> web.Application:
        async def answer(request: web.Request) -> web.Response:
            self.prefilled.append(await request.json())
            self.ids.append(request.headers["X-Request-Id"])
            return web.json_response({"kv_transfer_params": TOLD, "error": "said"}, status=self.status)

        app = web.Application()
        app.router.add_post("/v1/completions", answer)
        return app

    def decode(self) -> web.Application:
        async def answer(request: web.Request) -> web.StreamResponse:
            self.decoded.append(await request.json())
            self.ids.append(request.headers["X-Request-Id"])
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            await response.write(b"data: one\n\n")
            await self.go_on.wait()
            await response.write(b"data: two\n\n")
            return response

        async def models(request: web.Request) -> web.Response:
            return web.json_response({"data": [{"id": "m"}]})

        app = web.Application()
        app.router.add_post("/v1/completions", answer)
        app.router.add_get("/v1/models", models)
        return app


def played(servers: Servers, body: dict[str, Any]) -> tuple[int, list[bytes]]:
    """The answer's status, and its chunks as they came; the second is let go once the first is here."""

    async def go() -> tuple[int, list[bytes]]:
        async with TestServer(servers.prefill()) as prefill, TestServer(servers.decode()) as decode:
            proxy = PairProxy([str(prefill.make_url("/"))[:-1]], [str(decode.make_url("/"))[:-1]])
            async with TestServer(proxy.app()) as front, ClientSession() as client, asyncio.timeout(20):
                async with client.get(front.make_url("/v1/models")) as models:
                    assert (await models.json())["data"][0]["id"] == "m"
                async with client.post(front.make_url("/v1/completions"), json=body) as answer:
                    chunks = []
                    async for chunk in answer.content.iter_any():
                        chunks.append(chunk)
                        servers.go_on.set()
                    return answer.status, chunks

    return asyncio.run(go())


def test_each_leg_is_asked_its_part_and_the_stream_is_passed_on_as_it_comes() -> None:
    servers = Servers()
    body = {"model": "m", "prompt": [1, 2], "max_tokens": 9, "min_tokens": 4, "stream": True, "stream_options": {"include_usage": True}}
    assert played(servers, body) == (200, [b"data: one\n\n", b"data: two\n\n"])
    assert servers.prefilled == [{"model": "m", "prompt": [1, 2], "max_tokens": 1, "stream": False, "kv_transfer_params": KEEP_KV}]
    assert servers.decoded == [body | {"kv_transfer_params": TOLD}]
    assert len(servers.ids) == 2 and servers.ids[0] == servers.ids[1] != ""


def test_what_the_prefill_server_refuses_goes_to_no_decode_server() -> None:
    servers = Servers(status=400)
    status, chunks = played(servers, {"model": "m", "prompt": [1], "max_tokens": 2, "max_completion_tokens": 2})
    assert status == 400 and json.loads(b"".join(chunks))["error"] == "said"
    assert servers.decoded == [] and servers.prefilled[0]["max_completion_tokens"] == 1
