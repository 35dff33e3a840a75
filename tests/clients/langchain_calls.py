"""The written list of calls by LangChain's classes for OpenAI (`langchain-openai`), as its users write them."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, ConfigDict, Field

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

CALLS = CallList("LangChain")


class Weather(BaseModel):
    """Tells the weather."""

    model_config = ConfigDict(extra="forbid")
    city: Literal["Rome", "Oslo"]
    days: int = Field(ge=1, le=9)


def _chat(target: Target, **options: Any) -> ChatOpenAI:
    given: dict[str, Any] = {"model": MODEL, "base_url": target.url + "/v1", "api_key": KEY, "max_retries": 0, "timeout": TIMEOUT_S}
    return ChatOpenAI(**(given | {"max_tokens": MOST, "extra_body": NO_THINKING} | options))


def _text(target: Target, **options: Any) -> OpenAI:
    given: dict[str, Any] = {"model": MODEL, "base_url": target.url + "/v1", "api_key": KEY, "max_retries": 0, "timeout": TIMEOUT_S}
    return OpenAI(**(given | {"max_tokens": MOST} | options))


@CALLS.add("chat")
def chat(target: Target) -> None:
    answer = _chat(target).invoke("Weather in Rome?")
    assert target.is_told(str(answer.content)) and answer.usage_metadata and answer.usage_metadata["output_tokens"] > 0


@CALLS.add("a conversation")
def conversation(target: Target) -> None:
    assert target.is_told(str(_chat(target).invoke(TURNS).content))


@CALLS.add("stream")
def stream(target: Target) -> None:
    assert target.is_told("".join(str(chunk.content) for chunk in _chat(target).stream("Weather?")))


@CALLS.add("usage in a stream")
def usage(target: Target) -> None:
    used = [chunk.usage_metadata for chunk in _chat(target, stream_usage=True).stream("Weather?") if chunk.usage_metadata]
    assert len(used) == 1 and used[0]["total_tokens"] == used[0]["input_tokens"] + used[0]["output_tokens"]


@CALLS.add("tools, auto", CALLED)
def tools_auto(target: Target) -> None:
    answer = _chat(target).bind_tools([TOOL]).invoke("Weather?")
    assert target.told is None or [call["name"] for call in answer.tool_calls] == ["weather"]


@CALLS.add("tools, required", CALLED)
def tools_required(target: Target) -> None:
    answer = _chat(target).bind_tools([TOOL], tool_choice="required", parallel_tool_calls=False).invoke("Weather?")
    (call,) = answer.tool_calls
    assert call["name"] == "weather" and is_weather(call["args"])


@CALLS.add("tools, named", CALLED)
def tools_named(target: Target) -> None:
    (call,) = _chat(target).bind_tools([TOOL], tool_choice="weather").invoke("Weather?").tool_calls
    assert is_weather(call["args"])


@CALLS.add("tools, streamed", CALLED)
def tools_streamed(target: Target) -> None:
    bound = _chat(target).bind_tools([TOOL], tool_choice="weather")
    first, *chunks = bound.stream("Weather?")
    for chunk in chunks:
        first = first + chunk
    (call,) = first.tool_calls
    assert call["name"] == "weather" and is_weather(call["args"])


@CALLS.add("a call's result sent back", CALLED)
def tool_result(target: Target) -> None:
    called = _chat(target).bind_tools([TOOL], tool_choice="weather").invoke("Weather?")
    assert isinstance(called, AIMessage)
    turns = [*ASKED, called, ToolMessage("Rain.", tool_call_id=called.tool_calls[0]["id"])]
    assert _chat(target, max_tokens=9).invoke(turns).content is not None


@CALLS.add("structured output", JSON)
def structured(target: Target) -> None:
    """Of a pydantic class and of a JSON schema."""
    answer = _chat(target).with_structured_output(Weather, method="json_schema").invoke("Weather?")
    assert isinstance(answer, Weather)
    assert is_weather(_chat(target).with_structured_output(SCHEMA, method="json_schema", strict=True).invoke("Weather?"))


@CALLS.add("structured output by a call", CALLED.replace("weather", "Weather"))
def structured_by_call(target: Target) -> None:
    assert isinstance(_chat(target).with_structured_output(Weather, method="function_calling").invoke("Weather?"), Weather)


@CALLS.add("JSON mode", JSON)
def json_mode(target: Target) -> None:
    try:
        answer = _chat(target).bind(response_format={"type": "json_object"}).invoke("Weather?")
    except openai.LengthFinishReasonError:
        assert target.told is None, "only a real model may not come to an end, of which LangChain makes an error"
        return
    assert isinstance(json.loads(str(answer.content)), dict)


@CALLS.add("n")
def choices(target: Target) -> None:
    assert len(_chat(target, n=3, max_tokens=5).generate([[HumanMessage("Weather?")]]).generations[0]) == 3


@CALLS.add("logprobs")
def logprobs(target: Target) -> None:
    answer = _chat(target, logprobs=True, top_logprobs=2, max_tokens=5).invoke("Weather?")
    assert all(token["logprob"] <= 0 for token in answer.response_metadata["logprobs"]["content"])


@CALLS.add("stop")
def stop(target: Target) -> None:
    answer = str(_chat(target).invoke("Weather?", stop=["fox", "zebra"]).content)
    assert "fox" not in answer and (target.told is None or answer == STORY[: STORY.index("fox")])


@CALLS.add("sampling")
def sampling(target: Target) -> None:
    """The same seed, the same answer."""
    model = _chat(target, temperature=0.7, top_p=0.9, seed=5, presence_penalty=0.1, frequency_penalty=0.1, max_tokens=9)
    assert len({str(model.invoke("Weather?").content) for _ in range(2)}) == 1


@CALLS.add("completions")
def completions(target: Target) -> None:
    assert target.is_told(_text(target).invoke("Once"))


@CALLS.add("completions, streamed")
def completions_streamed(target: Target) -> None:
    assert target.is_told("".join(_text(target).stream("Once")))


@CALLS.add("embeddings, refused")
def embeddings(target: Target) -> None:
    client = OpenAIEmbeddings(model=MODEL, base_url=target.url + "/v1", api_key=KEY, check_embedding_ctx_length=False)
    with pytest.raises(openai.NotFoundError, match="/v1/embeddings"):
        client.embed_query("x")


@CALLS.add("a bad request's error")
def bad_request(target: Target) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        _chat(target, temperature=7).invoke("Weather?")
    assert refused.value.param == "temperature"


@CALLS.add("an unknown model's error")
def unknown_model(target: Target) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        _chat(target, model="gpt-9").invoke("Weather?")


@CALLS.add(TIMEOUT, "")
def timeout(target: Target) -> None:
    with pytest.raises(openai.APITimeoutError):
        _chat(target, max_tokens=LONG, timeout=LATE_S).invoke("Weather?")


@CALLS.add("async")
def asynchronous(target: Target) -> None:
    async def both() -> tuple[Any, str]:
        model = _chat(target)
        streamed = "".join([str(chunk.content) async for chunk in model.astream("Weather?")])
        return await model.ainvoke("Weather?"), streamed

    answer, streamed = asyncio.run(both())
    assert target.is_told(str(answer.content)) and target.is_told(streamed)


@CALLS.add("batch")
def batch(target: Target) -> None:
    assert all(target.is_told(str(answer.content)) for answer in _chat(target).batch(["Weather?", "And tomorrow?"]))
    assert all(target.is_told(text) for text in _text(target).batch(["Once", "Twice"]))


@CALLS.add("responses")
def responses(target: Target) -> None:
    answer = _chat(target, use_responses_api=True, store=False).invoke("Weather?")
    assert target.is_told(str(answer.text))
