"""Calls that must be made, by the real system and the embedded model, which was never taught any: what comes is a call all the same."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import openai

from tests.system.conftest import ReplicaSystem

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
ASKED: list[Any] = [{"role": "user", "content": "What is the weather?"}]
MOST = 200


def _is_answer(arguments: Any) -> bool:
    return set(arguments) == {"city", "days"} and arguments["city"] in ("Rome", "Oslo") and 1 <= arguments["days"] <= 9


def test_forced_calls_are_calls_on_every_api(tools_system: ReplicaSystem) -> None:
    system = tools_system
    client = openai.OpenAI(base_url=system.url + "/v1", api_key="none", max_retries=0, timeout=60)
    function = {"name": "weather", "parameters": SCHEMA}
    quick = {"chat_template_kwargs": {"enable_thinking": False}}
    fields: Any = {"model": "tiny-moe", "messages": ASKED, "tools": [{"type": "function", "function": function}], "max_tokens": MOST}
    fields |= {"parallel_tool_calls": False, "extra_body": quick}
    named: Any = {"type": "function", "function": {"name": "weather"}}
    for seed, choice in ((1, "required"), (2, "required"), (3, named)):
        whole = client.chat.completions.create(tool_choice=choice, seed=seed, n=2, **fields)
        for one in whole.choices:
            (call,) = one.message.tool_calls or []
            assert one.finish_reason == "tool_calls" and call.type == "function" and call.function.name == "weather"
            assert _is_answer(json.loads(call.function.arguments)), call
        streamed = ""
        for chunk in client.chat.completions.create(tool_choice=choice, seed=seed, stream=True, **fields):
            for delta in chunk.choices[0].delta.tool_calls or []:
                streamed += (delta.function and delta.function.arguments) or ""
        (first,) = whole.choices[0].message.tool_calls or []
        assert first.type == "function" and streamed == first.function.arguments, "the same seed, the same call"
    responses: Any = {
        "tools": [{"type": "function", **function}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "extra_body": quick,
    }
    response = client.responses.create(model="tiny-moe", input="Weather?", max_output_tokens=MOST, **responses)
    (item,) = response.output
    assert item.type == "function_call" and _is_answer(json.loads(item.arguments)) and response.status == "completed"
    tools: Any = [{"name": "weather", "input_schema": SCHEMA}]
    choice = {"type": "any", "disable_parallel_tool_use": True}
    with anthropic.Anthropic(base_url=system.url, api_key="none", max_retries=0, timeout=60) as other:
        message = other.messages.create(model="tiny-moe", max_tokens=MOST, messages=ASKED, tools=tools, tool_choice=choice)
    (block,) = message.content
    assert block.type == "tool_use" and _is_answer(block.input) and message.stop_reason == "tool_use"
    system.assert_quiet()
