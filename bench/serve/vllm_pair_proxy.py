"""Owns the way of a request through a pair of vLLM servers: prefill on one, decode on the other, KV between them by NixlConnector.

    python -m bench.serve.vllm_pair_proxy --port 9100 --prefill http://127.0.0.1:9000 --decode http://127.0.0.1:9001

As vLLM's documentation asks of such a proxy: the prompt goes to the prefill server for one token, with `kv_transfer_params` that ask it
to keep the KV; the parameters that it answers with go to the decode server beside the request itself, whose answer is the client's. Knows
nothing else of either.
"""

from __future__ import annotations

import argparse
import itertools
import json
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import aiohttp
from aiohttp import web

KEEP_KV = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
PASSED_ON = ("Content-Type", "Cache-Control")
_SESSION: web.AppKey[aiohttp.ClientSession] = web.AppKey("session", aiohttp.ClientSession)


class PairProxy:
    """prefills, decodes: base URLs, each asked in turn."""

    def __init__(self, prefills: list[str], decodes: list[str]) -> None:
        self._prefills: Iterator[str] = itertools.cycle(prefills)
        self._decodes: Iterator[str] = itertools.cycle(decodes)

    def app(self) -> web.Application:
        app = web.Application(client_max_size=64 << 20)
        app.cleanup_ctx.append(_session)
        app.router.add_post("/v1/completions", self.answer)
        app.router.add_post("/v1/chat/completions", self.answer)
        app.router.add_get("/{path:.*}", self.look)
        return app

    async def look(self, request: web.Request) -> web.Response:
        async with request.app[_SESSION].get(next(self._decodes) + request.path_qs) as answer:
            return web.Response(body=await answer.read(), status=answer.status, headers=_passed(answer.headers))

    async def answer(self, request: web.Request) -> web.StreamResponse:
        session, body = request.app[_SESSION], json.loads(await request.read())
        headers = {"X-Request-Id": uuid.uuid4().hex}
        async with session.post(next(self._prefills) + request.path, json=prefill_body(body), headers=headers) as first:
            told = await first.read()
            if first.status != 200:
                return web.Response(body=told, status=first.status, headers=_passed(first.headers))
        body |= {"kv_transfer_params": json.loads(told)["kv_transfer_params"]}
        async with session.post(next(self._decodes) + request.path, json=body, headers=headers) as second:
            response = web.StreamResponse(status=second.status, headers=_passed(second.headers))
            await response.prepare(request)
            async for chunk in second.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
            return response


def prefill_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """The request for the prefill server: one token, not streamed, its KV kept."""
    asked = {name: value for name, value in body.items() if name not in ("stream_options", "min_tokens")}
    asked |= {"stream": False, "max_tokens": 1, "kv_transfer_params": dict(KEEP_KV)}
    if "max_completion_tokens" in asked:
        asked["max_completion_tokens"] = 1
    return asked


async def _session(app: web.Application) -> Any:
    """As many connections as requests, kept open between them."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)) as session:
        app[_SESSION] = session
        yield


def _passed(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: headers[name] for name in PASSED_ON if name in headers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--prefill", action="append", required=True, metavar="URL")
    parser.add_argument("--decode", action="append", required=True, metavar="URL")
    asked = parser.parse_args()
    web.run_app(PairProxy(asked.prefill, asked.decode).app(), host="127.0.0.1", port=asked.port, print=None)


if __name__ == "__main__":
    main()
