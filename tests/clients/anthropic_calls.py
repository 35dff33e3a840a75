"""The written list of calls by the `anthropic` package, as its users write them."""

from __future__ import annotations

import asyncio
from typing import Any

import anthropic
import pytest

from tests.clients.call_list import (
    ASKED,
    CALLED,
    JSON,
    KEY,
    LATE_S,
    LONG,
    MODEL,
    MOST,
    SCHEMA,
    STORY,
    TIMEOUT,
    TIMEOUT_S,
    TURNS,
    CallList,
    Target,
    is_weather,
)

CALLS = CallList("anthropic")
TOOL: Any = {"name": "weather", "description": "Tells the weather.", "input_schema": SCHEMA}


def _client(target: Target) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=target.url, api_key=KEY, max_retries=0, timeout=TIMEOUT_S)


def _message(target: Target, **fields: Any) -> Any:
    given: dict[str, Any] = {"model": MODEL, "messages": ASKED, "max_tokens": MOST}
    return _client(target).messages.create(**(given | fields))


def _text(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


@CALLS.add("chat")
def chat(target: Target) -> None:
    message = _message(target)
    assert target.is_told(_text(message)) and message.stop_reason in ("end_turn", "max_tokens") and message.usage.output_tokens > 0


@CALLS.add("a conversation")
def conversation(target: Target) -> None:
    system, *turns = TURNS
    assert target.is_told(_text(_message(target, system=system["content"], messages=turns)))


@CALLS.add("stream")
def stream(target: Target) -> None:
    with _client(target).messages.stream(model=MODEL, max_tokens=MOST, messages=ASKED) as events:
        assert target.is_told("".join(events.text_stream))


@CALLS.add("usage in a stream")
def usage(target: Target) -> None:
    with _client(target).messages.stream(model=MODEL, max_tokens=MOST, messages=ASKED) as events:
        message = events.get_final_message()
    assert message.usage.output_tokens > 0 and message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0) > 0


@CALLS.add("tools, auto", CALLED)
def tools_auto(target: Target) -> None:
    message = _message(target, tools=[TOOL])
    assert target.told is None or message.stop_reason == "tool_use" and message.content[0].name == "weather"


def _is_call(message: Any) -> bool:
    (block,) = message.content
    return block.type == "tool_use" and is_weather(block.input) and message.stop_reason == "tool_use"


@CALLS.add("tools, required", CALLED)
def tools_required(target: Target) -> None:
    assert _is_call(_message(target, tools=[TOOL], tool_choice={"type": "any", "disable_parallel_tool_use": True}))


@CALLS.add("tools, named", CALLED)
def tools_named(target: Target) -> None:
    assert _is_call(_message(target, tools=[TOOL], tool_choice={"type": "tool", "name": "weather"}))


@CALLS.add("tools, streamed", CALLED)
def tools_streamed(target: Target) -> None:
    choice: Any = {"type": "tool", "name": "weather"}
    with _client(target).messages.stream(model=MODEL, max_tokens=MOST, messages=ASKED, tools=[TOOL], tool_choice=choice) as events:
        assert _is_call(events.get_final_message())


@CALLS.add("a call's result sent back")
def tool_result(target: Target) -> None:
    call = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Rome", "days": 3}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "Rain."}
    turns = [*ASKED, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    assert target.is_told(_text(_message(target, messages=turns, tools=[TOOL], tool_choice={"type": "none"})))


@CALLS.add("structured output", JSON)
def structured(target: Target) -> None:
    message = _message(target, output_config={"format": {"type": "json_schema", "schema": SCHEMA}})
    assert message.stop_reason == "end_turn" and JSON[:8] in _text(message)


@CALLS.add("stop")
def stop(target: Target) -> None:
    message = _message(target, stop_sequences=["fox", "zebra"])
    assert "fox" not in _text(message)
    assert target.told is None or (_text(message), message.stop_sequence) == (STORY[: STORY.index("fox")], "fox")


@CALLS.add("a bad request's error")
def bad_request(target: Target) -> None:
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        _message(target, max_tokens=0)


@CALLS.add("an unknown model's error")
def unknown_model(target: Target) -> None:
    with pytest.raises(anthropic.NotFoundError, match="gpt-9"):
        _message(target, model="gpt-9")


@CALLS.add(TIMEOUT, "")
def timeout(target: Target) -> None:
    with pytest.raises(anthropic.APITimeoutError):
        _message(target, max_tokens=LONG, timeout=LATE_S)


@CALLS.add("async")
def asynchronous(target: Target) -> None:
    async def both() -> list[Any]:
        async with anthropic.AsyncAnthropic(base_url=target.url, api_key=KEY, max_retries=0, timeout=TIMEOUT_S) as client:
            return await asyncio.gather(*(client.messages.create(model=MODEL, max_tokens=MOST, messages=ASKED) for _ in range(2)))

    assert all(target.is_told(_text(message)) for message in asyncio.run(both()))


@CALLS.add("counting tokens")
def count(target: Target) -> None:
    counted = _client(target).messages.count_tokens(model=MODEL, messages=ASKED)
    used = _message(target, max_tokens=1).usage
    assert counted.input_tokens == used.input_tokens + used.cache_read_input_tokens
