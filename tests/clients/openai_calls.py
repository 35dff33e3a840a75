"""The written list of calls by the `openai` package, as its users write them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
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
    NO_THINKING,
    SCHEMA,
    STORY,
    TIMEOUT,
    TIMEOUT_S,
    TOOL,
    TURNS,
    CallList,
    Target,
    is_weather,
)

CALLS = CallList("openai")
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA, "strict": True}}


def _client(target: Target) -> openai.OpenAI:
    return openai.OpenAI(base_url=target.url + "/v1", api_key=KEY, max_retries=0, timeout=TIMEOUT_S)


def _chat(target: Target, **fields: Any) -> Any:
    given: dict[str, Any] = {"model": MODEL, "messages": ASKED, "max_tokens": MOST, "extra_body": NO_THINKING}
    return _client(target).chat.completions.create(**(given | fields))


@CALLS.add("chat")
def chat(target: Target) -> None:
    answer = _chat(target)
    assert target.is_told(answer.choices[0].message.content) and answer.usage.completion_tokens > 0


@CALLS.add("a conversation")
def conversation(target: Target) -> None:
    assert target.is_told(_chat(target, messages=TURNS).choices[0].message.content)


@CALLS.add("stream")
def stream(target: Target) -> None:
    chunks = list(_chat(target, stream=True))
    assert target.is_told("".join(chunk.choices[0].delta.content or "" for chunk in chunks))
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")


@CALLS.add("usage in a stream")
def usage(target: Target) -> None:
    *chunks, last = _chat(target, stream=True, stream_options={"include_usage": True})
    assert last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens and not last.choices
    assert all(chunk.usage is None for chunk in chunks)


@CALLS.add("tools, auto", CALLED)
def tools_auto(target: Target) -> None:
    (choice,) = _chat(target, tools=[TOOL]).choices
    assert target.told is None or choice.finish_reason == "tool_calls" and choice.message.tool_calls[0].function.name == "weather"


def _is_call(answer: Any) -> bool:
    (choice,) = answer.choices
    (call,) = choice.message.tool_calls
    return choice.finish_reason == "tool_calls" and is_weather(json.loads(call.function.arguments))


@CALLS.add("tools, required", CALLED)
def tools_required(target: Target) -> None:
    assert _is_call(_chat(target, tools=[TOOL], tool_choice="required", parallel_tool_calls=False))


@CALLS.add("tools, named", CALLED)
def tools_named(target: Target) -> None:
    assert _is_call(_chat(target, tools=[TOOL], tool_choice={"type": "function", "function": {"name": "weather"}}))


@CALLS.add("tools, streamed", CALLED)
def tools_streamed(target: Target) -> None:
    chunks = list(_chat(target, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, stream=True))
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert deltas[0].id and deltas[0].function.name == "weather"
    assert is_weather(json.loads("".join(call.function.arguments or "" for call in deltas)))


@CALLS.add("a call's result sent back")
def tool_result(target: Target) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": JSON}}
    turns = [*ASKED, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "call_1", "content": "Rain."}]
    assert target.is_told(_chat(target, messages=turns, tools=[TOOL], tool_choice="none").choices[0].message.content)


@CALLS.add("structured output", JSON)
def structured(target: Target) -> None:
    assert is_weather(json.loads(_chat(target, response_format=FORMAT).choices[0].message.content))


@CALLS.add("JSON mode", JSON)
def json_mode(target: Target) -> None:
    (choice,) = _chat(target, response_format={"type": "json_object"}).choices
    assert choice.finish_reason == "length" or isinstance(json.loads(choice.message.content), dict)


@CALLS.add("n")
def choices(target: Target) -> None:
    answer = _chat(target, n=3, max_tokens=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]


@CALLS.add("logprobs")
def logprobs(target: Target) -> None:
    answer = _chat(target, logprobs=True, top_logprobs=2, max_tokens=5)
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == answer.usage.completion_tokens and all(token.logprob <= 0 for token in tokens)


@CALLS.add("stop")
def stop(target: Target) -> None:
    (choice,) = _chat(target, stop=["fox", "zebra"]).choices
    assert "fox" not in choice.message.content
    assert target.told is None or (choice.message.content, choice.finish_reason) == (STORY[: STORY.index("fox")], "stop")


@CALLS.add("sampling")
def sampling(target: Target) -> None:
    """The same seed, the same answer."""
    fields: Any = {"temperature": 0.7, "top_p": 0.9, "seed": 5, "presence_penalty": 0.1, "frequency_penalty": 0.1, "max_tokens": 9}
    fields |= {"logit_bias": {"5": -100}, "user": "u", "metadata": {"a": "b"}}
    assert len({_chat(target, **fields).choices[0].message.content for _ in range(2)}) == 1


@CALLS.add("completions")
def completions(target: Target) -> None:
    answer = _client(target).completions.create(model=MODEL, prompt=["Once", "Twice"], max_tokens=MOST, logprobs=1)
    assert [choice.index for choice in answer.choices] == [0, 1] and all(target.is_told(choice.text) for choice in answer.choices)


@CALLS.add("completions, streamed")
def completions_streamed(target: Target) -> None:
    chunks = list(_client(target).completions.create(model=MODEL, prompt=[5, 6, 7], max_tokens=MOST, stream=True))
    assert target.is_told("".join(chunk.choices[0].text for chunk in chunks))


@CALLS.add("echo")
def echo(target: Target) -> None:
    answer = _client(target).completions.create(model=MODEL, prompt="Once", max_tokens=3, echo=True)
    assert answer.choices[0].text.startswith("Once")


@CALLS.add("embeddings, refused")
def embeddings(target: Target) -> None:
    with pytest.raises(openai.NotFoundError, match="/v1/embeddings"):
        _client(target).embeddings.create(model=MODEL, input="x")


@CALLS.add("a bad request's error")
def bad_request(target: Target) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        _chat(target, temperature=7)
    assert refused.value.param == "temperature" and refused.value.type == "invalid_request_error"


@CALLS.add("an unknown model's error")
def unknown_model(target: Target) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        _chat(target, model="gpt-9")


@CALLS.add(TIMEOUT, "")
def timeout(target: Target) -> None:
    with pytest.raises(openai.APITimeoutError):
        _chat(target, max_tokens=LONG, timeout=LATE_S)


@CALLS.add("async")
def asynchronous(target: Target) -> None:
    async def both() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=target.url + "/v1", api_key=KEY, max_retries=0, timeout=TIMEOUT_S) as client:
            fields: Any = {"model": MODEL, "messages": ASKED, "max_tokens": MOST, "extra_body": NO_THINKING}
            return await asyncio.gather(*(client.chat.completions.create(**fields) for _ in range(2)))

    assert all(target.is_told(answer.choices[0].message.content) for answer in asyncio.run(both()))


@CALLS.add("models")
def models(target: Target) -> None:
    assert [model.id for model in _client(target).models.list()] == [MODEL] and _client(target).models.retrieve(MODEL).id == MODEL


@CALLS.add("responses")
def responses(target: Target) -> None:
    answer = _client(target).responses.create(model=MODEL, input="Weather?", max_output_tokens=MOST, extra_body=NO_THINKING)
    assert target.is_told(answer.output_text)
    events = list(_client(target).responses.create(model=MODEL, input="Weather?", max_output_tokens=9, stream=True))
    assert events[0].type == "response.created" and events[-1].type in ("response.completed", "response.incomplete")
