"""A light HTTP client for load: one connection a request, server-sent events as they come. Owns bytes and times; knows no service.

General HTTP libraries cost more CPU an event than the gateway does; on two cores that would measure the client.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

ODD_BYTES = 120  # of an odd event, in its error


@dataclass(slots=True)
class StreamResult:
    """What one streamed request brought: token ids by choice, text by choice, and when each event came (monotonic seconds)."""

    status: int
    body: bytes = b""
    token_ids: dict[int, list[int]] = field(default_factory=dict)
    text: dict[int, str] = field(default_factory=dict)
    finish_reasons: dict[int, str] = field(default_factory=dict)
    logprobs: dict[int, list[Any]] = field(default_factory=dict)  # by choice, what each event brought
    event_times_s: list[float] = field(default_factory=list)
    error: dict[str, Any] | None = None
    usage: dict[str, Any] | None = None
    counted_tokens: int = 0  # by usage that came with the tokens, where the server sends it with every event
    is_done: bool = False
    started_s: float = 0.0
    request_id: str = ""
    on_tokens: Callable[[float, int], None] | None = None  # called as they come, with when and how many; 1 where the event does not say

    @property
    def ttft_s(self) -> float:
        return self.event_times_s[0] - self.started_s

    @property
    def num_tokens(self) -> int:
        """That the server told of; 0 of one that tells neither ids nor counts."""
        return sum(len(ids) for ids in self.token_ids.values()) or self.counted_tokens


class OddEventError(ValueError):
    """An event that is none of a completion's; the message names what was odd and begins what came."""


def _take_event(result: StreamResult, payload: bytes) -> None:
    """Raises OddEventError."""
    try:
        num_tokens = _read_event(result, payload)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise OddEventError(f"odd event ({type(error).__name__}: {error}): {payload[:ODD_BYTES].decode(errors='replace')}") from error
    if num_tokens and result.on_tokens is not None:
        result.on_tokens(result.event_times_s[-1], num_tokens)


def _read_event(result: StreamResult, payload: bytes) -> int:
    """How many tokens it brought. What it lacks or has of a wrong type is found by using it: looking first would cost every event."""
    if payload == b"[DONE]":
        result.is_done = True
        return 0
    event = json.loads(payload)
    if event.get("error"):
        result.error = event["error"]
        return 0
    result.request_id = event.get("id", result.request_id)
    choices = event.get("choices") or ()
    if event.get("usage"):
        result.usage = event["usage"]
    told = (event.get("usage") or {}).get("completion_tokens") if choices else None
    num_tokens = 0
    for choice in choices:
        idx = choice["index"]
        piece = choice["text"] if "text" in choice else _said(choice.get("delta") or {})
        result.text[idx] = result.text.get(idx, "") + piece
        ids = choice.get("token_ids") or ()
        result.token_ids.setdefault(idx, []).extend(ids)
        if choice.get("logprobs"):
            result.logprobs.setdefault(idx, []).append(choice["logprobs"])
        if choice.get("finish_reason"):
            result.finish_reasons[idx] = choice["finish_reason"]
        if count := len(ids) or (bool(piece) if told is None else told - result.counted_tokens):
            result.event_times_s.append(time.monotonic())
            num_tokens += count
    result.counted_tokens = told or result.counted_tokens
    return num_tokens


def _said(delta: Mapping[str, Any]) -> str:
    """What a chat's event brings, aloud or not: servers name a model's reasoning in two ways."""
    return delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or ""


def payload_of(frame: bytes) -> bytes:
    """The data of one server-sent event; b"" of a comment, which servers send to keep a connection open."""
    if frame.startswith(b"data: ") and b"\n" not in frame:  # nearly all
        return frame[6:].strip()
    return b"\n".join(line[5:].strip() for line in frame.split(b"\n") if line.startswith(b"data:"))


async def _chunks(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := int((await reader.readline()).split(b";")[0] or b"0", 16):
            yield await reader.readexactly(size)
            await reader.readexactly(2)
    elif "content-length" in headers:
        yield await reader.readexactly(int(headers["content-length"]))
    else:
        while data := await reader.read(65536):
            yield data


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    status = int((await reader.readline()).split()[1])
    headers: dict[str, str] = {}
    while (line := await reader.readline()) not in (b"\r\n", b""):
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    return status, headers


async def post(
    url: str,
    path: str,
    body: dict[str, Any] | bytes,
    *,
    stop_after: int | None = None,
    timeout_s: float = 300.0,
    on_tokens: Callable[[float, int], None] | None = None,
    headers: Mapping[str, str] | None = None,
) -> StreamResult:
    """POST `body` (bytes: JSON as it is) to `url`; reads events if the answer streams, else the body. `headers` are sent beside our own.

    Closes the socket after `stop_after` tokens.
    """
    parts = urlsplit(url)
    is_tls = parts.scheme == "https"
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    result = StreamResult(status=0, started_s=time.monotonic(), on_tokens=on_tokens)
    async with asyncio.timeout(timeout_s):
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port or (443 if is_tls else 80), ssl=is_tls or None)
        try:
            fields = {"Host": parts.netloc, "Content-Type": "application/json", "Content-Length": len(raw), "Connection": "close"}
            lines = [f"{name}: {value}" for name, value in (*fields.items(), *(headers or {}).items())]
            lines.insert(0, f"POST {parts.path.rstrip('/')}{path} HTTP/1.1")
            writer.write("\r\n".join([*lines, "", ""]).encode() + raw)
            result.status, answered = await _head(reader)
            if answered.get("content-type", "").startswith("text/event-stream"):
                await _take_events(result, _chunks(reader, answered), stop_after)
            else:
                result.body = b"".join([chunk async for chunk in _chunks(reader, answered)])
        finally:
            writer.close()
    return result


async def _take_events(result: StreamResult, chunks: AsyncIterator[bytes], stop_after: int | None) -> None:
    pending = b""
    async for chunk in chunks:
        *frames, pending = (pending + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
        for frame in frames:
            if payload := payload_of(frame):
                _take_event(result, payload)
        if stop_after is not None and result.num_tokens >= stop_after:
            return


def completion_body(prompt: list[int] | str, max_tokens: int, **extra: Any) -> dict[str, Any]:
    """A greedy streamed completion that ignores EOS and reports token ids."""
    return {
        "model": "tiny-moe", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0,
        "ignore_eos": True, "stream": True, "return_token_ids": True,
    } | extra  # fmt: skip
