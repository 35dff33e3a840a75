"""What clients send and are told, and keys, stay out of logs, spans, metrics, the audit and standard error, whatever goes wrong."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import threading
from collections import deque
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from duomo.api_keys import make_key
from duomo.telemetry.logging import LIBRARIES, ROOTS, configure
from services.router.keys import Keys
from services.router.openai import RequestParser
from services.router.service import serving_admin
from tests.ports import free_port
from tests.services.router.stub_replicas import Script
from tests.services.router.stub_system import PATIENCE_S, StubSystem, stub_system

MARK = "zq7secretzq7"  # in everything that is sent
ANSWER = "The answer zq7secretzq7 is told to the client alone. "
BASE = {"model": "tiny-moe", "max_tokens": 6, "user": MARK, "metadata": {"m": MARK}}
CHAT = BASE | {"messages": [{"role": "system", "content": MARK}, {"role": "user", "content": f"tell me of {MARK}"}]}
TOOL = {"type": "function", "function": {"name": MARK, "parameters": {"type": "object", "properties": {MARK: {"type": "string"}}}}}
SCHEMA = {"type": "object", "properties": {MARK: {"type": MARK}}}

# path, body (dict, or bytes as they are)
REQUESTS: list[tuple[str, dict | bytes]] = [
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", CHAT | {"stream": True}),
    ("/v1/chat/completions", CHAT | {"stop": [MARK], "n": 2}),
    ("/v1/chat/completions", CHAT | {"messages": [{"role": MARK, "content": MARK}]}),
    ("/v1/chat/completions", CHAT | {"messages": [{"role": "user", "content": MARK, MARK: MARK}]}),
    ("/v1/chat/completions", CHAT | {"messages": [{"role": "user", "content": [{"type": MARK, "text": MARK}]}]}),
    ("/v1/chat/completions", CHAT | {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": MARK}}}),
    ("/v1/chat/completions", CHAT | {"response_format": {"type": "json_schema", "json_schema": {"name": MARK, "schema": SCHEMA}}}),
    ("/v1/chat/completions", CHAT | {"guided_regex": f"({MARK}"}),
    ("/v1/chat/completions", CHAT | {"guided_choice": [MARK, 7]}),
    ("/v1/chat/completions", CHAT | {"chat_template_kwargs": {MARK: MARK}}),
    ("/v1/chat/completions", CHAT | {"model": MARK}),
    ("/v1/chat/completions", CHAT | {MARK: MARK}),
    ("/v1/chat/completions", json.dumps(CHAT).encode()[:-1]),
    ("/v1/chat/completions", b"\xff" + MARK.encode()),
    ("/v1/chat/completions", f"[{MARK}]".encode()),
    ("/v1/completions", BASE | {"prompt": MARK, "echo": True, "logprobs": None}),
    ("/v1/completions", BASE | {"prompt": MARK, "suffix": MARK}),
    ("/v1/completions", BASE | {"prompt": [MARK, 7]}),
    ("/v1/completions", BASE | {"prompt": f"{MARK} " * 3000}),
    ("/v1/responses", {"model": "tiny-moe", "input": MARK, "instructions": MARK, "max_output_tokens": 5}),
    ("/v1/responses", {"model": "tiny-moe", "input": [{"role": MARK, "content": MARK}]}),
    ("/v1/messages", {"model": "tiny-moe", "max_tokens": 5, "system": MARK, "messages": [{"role": "user", "content": MARK}]}),
    ("/v1/messages", {"model": "tiny-moe", "max_tokens": 5, "messages": [{"role": MARK, "content": MARK}]}),
    ("/tokenize", {"prompt": MARK}),
    ("/tokenize", {"prompt": MARK, MARK: MARK}),
    ("/detokenize", {"tokens": [MARK]}),
]


@pytest.fixture
def logs() -> Iterator[io.StringIO]:
    """As a process has them, at the lowest level: Python's own last resort included, which capfd sees."""
    kept = [(logging.getLogger(name), logging.getLogger(name).handlers[:], logging.getLogger(name).level) for name in (*ROOTS, *LIBRARIES)]
    stream = io.StringIO()
    configure("router", "router-0", level=logging.DEBUG, stream=stream)
    yield stream
    for logger, handlers, level in kept:
        logger.handlers[:], logger.propagate = handlers, True
        logger.setLevel(level)


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[bytes]]]:
    """An OTLP endpoint, and what it was sent: strings stand in it as they are."""
    for name in ("_EXPORT_TIMEOUT_S", "_SHUTDOWN_S"):  # this collector answers, if a busy machine lets it
        monkeypatch.setattr(f"duomo.telemetry.tracing.{name}", 60.0)
    sent: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", sent
    server.shutdown()
    server.server_close()


def spans(folder: Path) -> str:
    return "".join(file.read_text() for file in folder.rglob("*") if file.is_file())


async def ask_all(system: StubSystem, headers: dict[str, str]) -> set[int]:
    statuses = set()
    for path, body in REQUESTS:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = await system.client.post(path, content=content, headers=headers)
        statuses.add(answer.status_code)
    return statuses


def test_nothing_that_is_said_is_written_down(
    tmp_path: Path,
    logs: io.StringIO,
    collector: tuple[str, list[bytes]],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    admin_port = free_port()
    (key, entry), (admin_key, admin_entry) = make_key("alice", ["inference"]), make_key("ops", ["admin"])
    secrets = [MARK, key.rsplit("-", 1)[1], admin_key.rsplit("-", 1)[1], "sesame-zq8"]
    gateway = {
        "api_keys": [entry.line(), admin_entry.line()],
        "admin_port": admin_port,
        "audit_file": str(tmp_path / "audit"),
        "max_header_bytes": 4096,
    }
    overrides = {"gateway": gateway, "tracing": {"directory": str(tmp_path / "spans"), "otlp_endpoint": collector[0]}}
    script = Script(prefill_faults=deque([None, "fail", "die", "fail_for_good"]))
    read: list[str] = []

    async def scenario() -> None:
        async with stub_system(tmp_path, script, num_prefills=2, overrides=overrides, told=ANSWER) as system:
            right = {"authorization": f"Bearer {key}"}
            assert {200, 400, 404} <= await ask_all(system, right)
            assert await ask_all(system, {"x-api-key": f"sesame-zq8-{MARK}"}) == {401}
            assert await ask_all(system, {"authorization": f"Bearer {admin_key}"}) == {403}
            await system.client.get(f"/v1/{MARK}?key={key}", headers=right)
            long = await system.client.post("/v1/completions", json={}, headers=right | {"x-long": MARK * 1000})
            assert long.status_code == 431
            async with serving_admin(system.gateway, Keys(system.gateway.config.gateway)):
                async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{admin_port}", timeout=PATIENCE_S) as admin:
                    decode = system.pools.of_role("decode")[0].replica_id
                    for headers in (right, {"x-api-key": admin_key}, {"x-api-key": f"sesame-zq8-{MARK}"}):
                        await admin.post(f"/admin/replicas/{decode}/flush", headers=headers)
                        await admin.post("/admin/pools/decode/scale", headers=headers, content=f'{{"{MARK}": 1}}'.encode())

            def breaks(self: RequestParser, body: bytes) -> None:
                raise ValueError(f"a bug meets {body!r}")

            monkeypatch.setattr(RequestParser, "chat", breaks)
            crashed = await system.client.post("/v1/chat/completions", json=CHAT, headers=right)
            assert crashed.status_code == 500 and MARK not in crashed.text
            forgotten = asyncio.create_task(_raise(MARK))
            await asyncio.wait([forgotten])
            del forgotten  # asyncio says that nobody has looked at its exception
            read.append((await system.client.get("/metrics")).text)
            await system.until(lambda: not system.gateway.num_open_answers)

    asyncio.run(scenario())
    out, err = capfd.readouterr()
    exported = b"".join(collector[1]).decode("latin-1")
    assert exported.count("gateway.request") > len(REQUESTS) / 2
    read += [logs.getvalue(), spans(tmp_path / "spans"), (tmp_path / "audit").read_text(), out, err, exported]
    assert "ValueError" in logs.getvalue() and "Task exception was never" in logs.getvalue(), "it was logged, without its text"
    assert read[2].count('"gateway.request"') > len(REQUESTS) / 2 and "insufficient_scope" in read[3]
    for text in read:
        for secret in secrets:
            at = text.find(secret)
            assert at < 0, text[max(at - 300, 0) : at + 100]


async def _raise(text: str) -> None:
    raise ValueError(text)
