"""Clients of HTTP/1.0: no answer comes in chunks, a whole one has its length, a stream ends with its connection. Raw sockets."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from pathlib import Path

import pytest

from tests.services.router.stub_replicas import Script
from tests.services.router.stub_system import StubSystem, stub_system
from tests.services.router.test_client_protocol import dialled, to_the_end

CHAT = {"model": "tiny-moe", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 20}


async def asked(system: StubSystem, version: str, body: dict, headers: str = "") -> tuple[dict[str, str], bytes]:
    """Head and body as they came, and the connection's end."""
    content = json.dumps(body).encode()
    async with dialled(system) as (reader, writer):
        line = f"POST /v1/chat/completions HTTP/{version}\r\nhost: x\r\ncontent-length: {len(content)}\r\n{headers}\r\n"
        writer.write(line.encode() + content)
        head, _, rest = (await to_the_end(reader)).partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    assert " 200 " in status or "temperature" in body
    return dict(line.lower().split(": ", 1) for line in lines), rest


def story(events: bytes) -> str:
    lines = [line[6:] for line in events.decode().split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return "".join(json.loads(line)["choices"][0]["delta"].get("content") or "" for line in lines[:-1])


@pytest.mark.parametrize("step_s", [0.0, 0.002])
def test_a_stream_is_its_events_and_ends_with_the_connection(tmp_path: Path, step_s: float) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, Script(step_s=step_s)) as system:
            for headers in ("", "connection: keep-alive\r\n"):
                head, body = await asked(system, "1.0", CHAT | {"stream": True}, headers)
                assert "transfer-encoding" not in head and "content-length" not in head and head["connection"] == "close"
                assert body.startswith(b"data: {") and story(body) == system.story.text(0, 20)
            newer, chunked = await asked(system, "1.1", CHAT | {"stream": True}, "connection: close\r\n")
            assert newer["transfer-encoding"] == "chunked" and chunked.endswith(b"0\r\n\r\n")

    asyncio.run(scenario())


def test_a_whole_answer_and_a_refusal_have_their_length(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path) as system:
            for body in (CHAT, CHAT | {"temperature": 9}):
                for version in ("1.0", "1.1"):
                    head, content = await asked(system, version, body, "connection: close\r\n")
                    assert int(head["content-length"]) == len(content) and "transfer-encoding" not in head
                    json.loads(content)

    asyncio.run(scenario())


def test_a_kept_stream_is_given_again_in_the_same_bytes(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path) as system:
            key = "idempotency-key: one\r\n"
            _, first = await asked(system, "1.0", CHAT | {"stream": True}, key)
            head, again = await asked(system, "1.0", CHAT | {"stream": True}, key)
            assert again == first and head["idempotent-replayed"] == "true" and "transfer-encoding" not in head

    asyncio.run(scenario())


def test_a_fault_in_the_middle_ends_it_in_words(tmp_path: Path) -> None:
    async def scenario() -> None:
        script = Script(decode_faults=deque([("fail_for_good", 3)]))
        async with stub_system(tmp_path, script) as system:
            _, body = await asked(system, "1.0", CHAT | {"stream": True})
            *_, error, done, end = body.decode().split("\n\n")
            assert "engine_failed" in error and (done, end) == ("data: [DONE]", "")

    asyncio.run(scenario())
