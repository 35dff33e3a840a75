"""Every bad input of a client: a 4xx with OpenAI's error body that names the field, and nothing reserved. Reads the public API only."""

from __future__ import annotations

import http.client
import json
from typing import Any

import pytest

CHAT = {"model": "tiny-moe", "messages": [{"role": "user", "content": "Hi."}]}
IMAGE = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]

BAD = [
    ("/v1/chat/completions", CHAT | {"messages": []}, 400, "messages"),
    ("/v1/chat/completions", {"model": "tiny-moe"}, 400, "messages"),
    ("/v1/chat/completions", CHAT | {"messages": "hello"}, 400, "messages"),
    ("/v1/chat/completions", CHAT | {"messages": [{"role": "user", "content": 7}]}, 400, "messages"),
    ("/v1/chat/completions", CHAT | {"messages": [{"role": "user", "content": IMAGE}]}, 400, "messages"),
    ("/v1/chat/completions", CHAT | {"max_tokens": -1}, 400, "max_tokens"),
    ("/v1/chat/completions", CHAT | {"max_tokens": "ten"}, 400, "max_tokens"),
    ("/v1/chat/completions", CHAT | {"max_tokens": True}, 400, "max_tokens"),
    ("/v1/chat/completions", CHAT | {"temperature": "hot"}, 400, "temperature"),
    ("/v1/chat/completions", CHAT | {"temperature": -1}, 400, "temperature"),
    ("/v1/chat/completions", CHAT | {"top_p": 2}, 400, "top_p"),
    ("/v1/chat/completions", CHAT | {"n": 129}, 400, "n"),
    ("/v1/chat/completions", CHAT | {"n": 0}, 400, "n"),
    ("/v1/chat/completions", CHAT | {"stop": 5}, 400, "stop"),
    ("/v1/chat/completions", CHAT | {"seed": "x"}, 400, "seed"),
    ("/v1/chat/completions", CHAT | {"model": "gpt-9"}, 404, "model"),
    ("/v1/chat/completions", CHAT | {"messages": [{"role": "user", "content": "word " * 4000}]}, 400, "messages"),
    ("/v1/completions", {"model": "tiny-moe", "prompt": [5] * 2048, "max_tokens": 1}, 400, "prompt"),
    ("/v1/completions", {"model": "tiny-moe", "prompt": [5, 9000], "max_tokens": 1}, 400, "prompt"),
    ("/v1/completions", {"model": "tiny-moe", "prompt": {"a": 1}}, 400, "prompt"),
    ("/v1/completions", {"model": "tiny-moe", "prompt": "x", "max_tokens": -5}, 400, "max_tokens"),
    ("/v1/completions", {"model": "tiny-moe", "prompt": "x", "logprobs": 1000}, 400, "logprobs"),
]


def _send(port: int, method: str, path: str, raw: bytes | None) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, body=raw, headers={"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())["error"]
    finally:
        connection.close()


@pytest.mark.parametrize(("path", "body", "status", "field"), BAD)
def test_bad_body_names_the_field(one_system: Any, path: str, body: dict[str, Any], status: int, field: str) -> None:
    got, error = _send(one_system.port, "POST", path, json.dumps(body).encode())
    assert got == status, error
    assert error["param"] is not None and str(error["param"]).split(".")[0].split("[")[0] == field, error
    assert error["message"] and error["type"], error


def test_over_long_prompt_says_the_limit(one_system: Any) -> None:
    _, error = _send(one_system.port, "POST", "/v1/completions", json.dumps({"model": "tiny-moe", "prompt": [5] * 3000}).encode())
    assert "2048" in error["message"] and "3000" in error["message"], error


def test_image_content_is_refused_by_name(one_system: Any) -> None:
    body = CHAT | {"messages": [{"role": "user", "content": IMAGE}]}
    _, error = _send(one_system.port, "POST", "/v1/chat/completions", json.dumps(body).encode())
    assert "image" in error["message"], error


@pytest.mark.parametrize(("raw", "status"), [(b'{"model": "\xff\xfe"}', 400), (b"{not json", 400), (b"[1]", 400), (b"x" * 20_000_000, 413)])
def test_bad_bytes_name_the_body(one_system: Any, raw: bytes, status: int) -> None:
    got, error = _send(one_system.port, "POST", "/v1/chat/completions", raw)
    assert got == status, error
    assert error["param"] == "body" or "body" in error["message"], error


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/nothing", 404), ("PUT", "/v1/completions", 405)])
def test_unknown_paths_and_methods(one_system: Any, method: str, path: str, status: int) -> None:
    got, error = _send(one_system.port, method, path, None)
    assert got == status and error["message"], error


def test_nothing_was_reserved(one_system: Any) -> None:
    one_system.assert_quiet()
