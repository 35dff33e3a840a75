"""One chat call to a stub system, and what came of it."""

from __future__ import annotations

import json

import httpx

from tests.services.router.stub_system import StubSystem

CHAT = {"model": "tiny-moe", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 24}


async def chat(system: StubSystem, **fields: object) -> httpx.Response:
    return await system.client.post("/v1/chat/completions", json=CHAT | fields)


def texts(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [choice["message"]["content"] for choice in answer.json()["choices"]]


def streamed(answer: httpx.Response) -> tuple[str, dict | None]:
    """(text, error in the stream)."""
    text, error = "", None
    for line in answer.text.split("\n\n"):
        if line.startswith("data: {"):
            event = json.loads(line.removeprefix("data: "))
            error = event.get("error", error)
            text += "".join(choice["delta"].get("content", "") for choice in event.get("choices", []))
    assert answer.text.endswith("data: [DONE]\n\n")
    return text, error
