"""The written list of calls by `litellm`, through its providers for OpenAI's and for Anthropic's API, as its users write them."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import pytest

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # read at its import: else it asks the network for prices
import litellm

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

CALLS = CallList("litellm")
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA, "strict": True}}


def _given(target: Target, fields: dict[str, Any]) -> dict[str, Any]:
    given: dict[str, Any] = {"model": "openai/" + MODEL, "api_base": target.url + "/v1", "api_key": KEY, "max_retries": 0}
    return given | {"timeout": TIMEOUT_S, "max_tokens": MOST} | fields


def _chat(target: Target, **fields: Any) -> Any:
    return litellm.completion(**_given(target, {"messages": ASKED, "extra_body": NO_THINKING} | fields))


def _message(target: Target, **fields: Any) -> Any:
    """By Anthropic's API."""
    return litellm.completion(**_given(target, {"model": "anthropic/" + MODEL, "api_base": target.url, "messages": ASKED} | fields))


@CALLS.add("chat")
def chat(target: Target) -> None:
    answer = _chat(target)
    assert target.is_told(answer.choices[0].message.content) and answer.usage.completion_tokens > 0


@CALLS.add("a conversation")
def conversation(target: Target) -> None:
    assert target.is_told(_chat(target, messages=TURNS).choices[0].message.content)


@CALLS.add("stream")
def stream(target: Target) -> None:
    assert target.is_told("".join(chunk.choices[0].delta.content or "" for chunk in _chat(target, stream=True)))


@CALLS.add("usage in a stream")
def usage(target: Target) -> None:
    chunks = list(_chat(target, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage.total_tokens == chunks[-1].usage.prompt_tokens + chunks[-1].usage.completion_tokens


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
    chunks = list(_chat(target, tools=[TOOL], tool_choice={"type": "function", "function": {"name": "weather"}}, stream=True))
    assert _is_call(litellm.stream_chunk_builder(chunks))


@CALLS.add("a call's result sent back")
def tool_result(target: Target) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": JSON}}
    turns = [*ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}]
    turns.append({"role": "tool", "tool_call_id": "call_1", "content": "Rain."})
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
    assert [choice.index for choice in _chat(target, n=3, max_tokens=5).choices] == [0, 1, 2]


@CALLS.add("logprobs")
def logprobs(target: Target) -> None:
    (choice,) = _chat(target, logprobs=True, top_logprobs=2, max_tokens=5).choices
    assert all(token.logprob <= 0 for token in choice.logprobs.content)


@CALLS.add("stop")
def stop(target: Target) -> None:
    (choice,) = _chat(target, stop=["fox", "zebra"]).choices
    assert "fox" not in choice.message.content and (target.told is None or choice.message.content == STORY[: STORY.index("fox")])


@CALLS.add("sampling")
def sampling(target: Target) -> None:
    """The same seed, the same answer."""
    fields: Any = {"temperature": 0.7, "top_p": 0.9, "seed": 5, "presence_penalty": 0.1, "frequency_penalty": 0.1, "max_tokens": 9}
    assert len({_chat(target, **fields).choices[0].message.content for _ in range(2)}) == 1


@CALLS.add("completions")
def completions(target: Target) -> None:
    given = _given(target, {"model": "text-completion-openai/" + MODEL, "prompt": "Once"})
    assert target.is_told(litellm.text_completion(**given).choices[0].text)


@CALLS.add("completions, streamed")
def completions_streamed(target: Target) -> None:
    given = _given(target, {"model": "text-completion-openai/" + MODEL, "prompt": "Once", "stream": True})
    assert target.is_told("".join(chunk.choices[0].text or "" for chunk in litellm.text_completion(**given)))


@CALLS.add("embeddings, refused")
def embeddings(target: Target) -> None:
    with pytest.raises(litellm.exceptions.NotFoundError, match="/v1/embeddings"):
        litellm.embedding(model="openai/" + MODEL, input=["x"], api_base=target.url + "/v1", api_key=KEY, max_retries=0)


@CALLS.add("a bad request's error")
def bad_request(target: Target) -> None:
    with pytest.raises(litellm.exceptions.BadRequestError, match="temperature"):
        _chat(target, temperature=7)


@CALLS.add("an unknown model's error")
def unknown_model(target: Target) -> None:
    with pytest.raises(litellm.exceptions.NotFoundError, match="gpt-9"):
        _chat(target, model="openai/gpt-9")


@CALLS.add(TIMEOUT, "")
def timeout(target: Target) -> None:
    with pytest.raises(litellm.exceptions.Timeout):
        _chat(target, max_tokens=LONG, timeout=LATE_S)


@CALLS.add("async")
def asynchronous(target: Target) -> None:
    async def both() -> tuple[Any, str]:
        given = _given(target, {"messages": ASKED, "extra_body": NO_THINKING})
        streamed = await litellm.acompletion(**given, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in streamed])
        return await litellm.acompletion(**given), text

    answer, streamed = asyncio.run(both())
    assert target.is_told(answer.choices[0].message.content) and target.is_told(streamed)


@CALLS.add("batch")
def batch(target: Target) -> None:
    given = _given(target, {"messages": [ASKED, TURNS]})
    assert all(target.is_told(answer.choices[0].message.content) for answer in litellm.batch_completion(**given))


@CALLS.add("responses")
def responses(target: Target) -> None:
    given = _given(target, {"input": "Weather?", "max_output_tokens": MOST})
    del given["max_tokens"], given["max_retries"]
    answer = litellm.responses(**given, extra_body=NO_THINKING)
    assert target.is_told("".join(part.text for item in answer.output for part in item.content))


@CALLS.add("messages, by a client of another API")
def messages(target: Target) -> None:
    assert target.is_told(_message(target).choices[0].message.content)
    assert target.is_told("".join(chunk.choices[0].delta.content or "" for chunk in _message(target, stream=True)))
