"""Owns `duomo chat`: a conversation with a running gateway over its REST API. Knows nothing but that API."""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

from duomo.errors import ConfigError, PeerError

TIMEOUT_S = 300.0
Chat = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Gateway:
    """Where it answers, and the key that it asks for ("": none)."""

    url: str
    key: str = ""

    def request(self, path: str, body: dict[str, object] | None = None) -> urllib.request.Request:
        """Raises ConfigError for what is no URL."""
        url = self.url.rstrip("/").removesuffix("/v1") + path
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        try:
            return urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
        except ValueError as error:
            raise ConfigError(f"--url {url}: {error}") from error


def converse(gateway: Gateway, model: str, message: str | None, sampling: dict[str, float]) -> int:
    """One question, or questions from stdin until it ends; answers on stdout, reasoning on stderr and not said again.

    Raises ConfigError (--url) and PeerError (a refusal).
    """
    name = model or _first_model(gateway)
    chat: Chat = []
    for question in [message] if message is not None else _questions(name):
        chat.append({"role": "user", "content": question})
        answer = ""
        is_thinking = False
        for thought, piece in _stream(gateway, {"model": name, "messages": chat, "stream": True} | sampling):
            if thought:
                print(thought, end="", file=sys.stderr, flush=True)
            elif piece and is_thinking:
                print("\n", file=sys.stderr)
            is_thinking = bool(thought) or (is_thinking and not piece)
            print(piece, end="", flush=True)
            answer += piece
        print()
        chat.append({"role": "assistant", "content": answer})
    return 0


def _questions(model: str) -> Iterator[str]:
    if sys.stdin.isatty():
        print(f"{model} listens; Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if question:
            yield question


def _open(request: urllib.request.Request) -> Iterator[bytes]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=TIMEOUT_S) as response:
            yield from response
    except urllib.error.HTTPError as error:
        raise PeerError(_reason(error.read())) from error
    except urllib.error.URLError as error:
        raise ConfigError(f"--url {request.full_url}: no gateway answers there ({error.reason}); `duomo serve` starts one") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"--url {request.full_url}: {error}") from error


def _first_model(gateway: Gateway) -> str:
    models = json.loads(b"".join(_open(gateway.request("/v1/models"))))["data"]
    return str(models[0]["id"])


def _stream(gateway: Gateway, body: dict[str, object]) -> Iterator[tuple[str, str]]:
    """(reasoning, answer) of each chunk."""
    for line in _open(gateway.request("/v1/chat/completions", body)):
        data = line.decode().strip()
        if not data.startswith("data:") or data == "data: [DONE]":
            continue
        event = json.loads(data.removeprefix("data:"))
        if "error" in event:
            raise PeerError(str(event["error"].get("message")))
        for choice in event["choices"]:
            yield choice["delta"].get("reasoning_content") or "", choice["delta"].get("content") or ""


def _reason(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:500]
