"""Tool calls and reasoning through the served application, by the real `openai` client: what the model writes as markup comes typed."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionChunk

from duomo.wire.messages import StartPrefill
from services.cli_chat import Gateway, converse
from tests.services.router.stub_system import PATIENCE_S, StubSystem, stub_system

TEMPLATE = Path(__file__).parents[3] / "deploy" / "chat_templates" / "chatml_tools.jinja"
OPTIONS = {"gateway": {"chat_template": str(TEMPLATE)}}
ASKED: list[Any] = [{"role": "user", "content": "Weather in Rome and Oslo?"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: list[Any] = [{"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": SCHEMA, "strict": True}}]
CALLS = "".join(f'\n<tool_call>\n{{"name": "weather", "arguments": {{"city": "{city}"}}}}\n</tool_call>' for city in ("Rome", "Oslo"))
TOLD = "<think>\nTwo cities: two calls.\n</think>\n\nLet me look." + CALLS


def _client(system: StubSystem) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=system.base_url + "/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)


class Gathered:
    """What a stream adds up to, by choice; each delta is checked as a client would use it."""

    def __init__(self) -> None:
        self.text, self.reasoning, self.finish = "", "", ""
        self.calls: list[list[str]] = []
        self.num_argument_deltas = 0

    def take(self, chunk: ChatCompletionChunk, choice: int) -> None:
        for one in chunk.choices:
            if one.index != choice:
                continue
            self.text += one.delta.content or ""
            self.reasoning += getattr(one.delta, "reasoning_content", None) or ""
            self.finish = one.finish_reason or self.finish
            for call in one.delta.tool_calls or []:
                assert call.function is not None
                if call.id is not None:
                    assert call.index == len(self.calls) and call.type == "function" and call.function.name
                    self.calls.append([call.function.name, ""])
                self.calls[call.index][1] += call.function.arguments or ""
                self.num_argument_deltas += bool(call.function.arguments)


async def _stream(client: openai.AsyncOpenAI, num_choices: int = 1, **fields: Any) -> list[Gathered]:
    gathered = [Gathered() for _ in range(num_choices)]
    stream = await client.chat.completions.create(model="tiny-moe", messages=ASKED, stream=True, n=num_choices, **fields)
    async for chunk in stream:
        for number, one in enumerate(gathered):
            one.take(chunk, number)
    return gathered


def test_calls_and_reasoning_come_typed_whole_and_streamed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, overrides=OPTIONS, told=TOLD) as system, _client(system) as client:
            whole = await client.chat.completions.create(model="tiny-moe", messages=ASKED, tools=TOOLS, n=2)
            for choice in whole.choices:
                message = choice.message
                assert (choice.finish_reason, message.content) == ("tool_calls", "Let me look.")
                assert message.model_extra and message.model_extra["reasoning_content"] == "Two cities: two calls."
                calls = message.tool_calls or []
                assert [(call.function.name, json.loads(call.function.arguments)["city"]) for call in calls if call.type == "function"] == [
                    ("weather", "Rome"),
                    ("weather", "Oslo"),
                ]
                assert len({call.id for call in calls}) == 2
            for one in await _stream(client, 2, tools=TOOLS):
                assert (one.text, one.reasoning, one.finish) == ("Let me look.", "Two cities: two calls.", "tool_calls")
                assert one.calls == [["weather", '{"city": "Rome"}'], ["weather", '{"city": "Oslo"}']]
                assert one.num_argument_deltas > 4, "arguments are streamed, not sent in one piece"

    asyncio.run(scenario())


def test_without_tools_calls_are_text_and_reasoning_is_still_none_of_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, overrides=OPTIONS, told=TOLD) as system, _client(system) as client:
            for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
                whole = await client.chat.completions.create(model="tiny-moe", messages=ASKED, **fields)
                assert whole.choices[0].message.content == "Let me look." + CALLS and whole.choices[0].finish_reason == "stop"
                assert whole.choices[0].message.tool_calls is None
            (one,) = await _stream(client)
            assert (one.text, one.finish, one.calls) == ("Let me look." + CALLS, "stop", [])

    asyncio.run(scenario())


def test_one_call_at_a_time_and_calls_that_are_cut_off(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, overrides=OPTIONS, told=CALLS) as system, _client(system) as client:
            (one,) = await _stream(client, tools=TOOLS, parallel_tool_calls=False)
            assert one.calls == [["weather", '{"city": "Rome"}']] and one.finish == "tool_calls"
            before = len(system.gateway.text.encode(CALLS[: CALLS.index("Rome")], add_special_tokens=False))
            cut = await client.chat.completions.create(model="tiny-moe", messages=ASKED, tools=TOOLS, max_tokens=before)
            (streamed,) = await _stream(client, tools=TOOLS, max_tokens=before)
            call = (cut.choices[0].message.tool_calls or [])[0]
            assert call.type == "function" and call.function.arguments.startswith('{"') and not call.function.arguments.endswith("}")
            assert cut.choices[0].finish_reason == "length" == streamed.finish, "the client sees that the arguments are not whole"
            assert streamed.calls == [["weather", call.function.arguments]]

    asyncio.run(scenario())


def test_token_ids_and_logprobs_go_on_while_text_is_held_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, overrides=OPTIONS, told=CALLS) as system:
            asked = {"model": "tiny-moe", "messages": ASKED, "tools": TOOLS, "stream": True, "return_token_ids": True, "logprobs": True}
            answer = await system.client.post("/v1/chat/completions", json=asked)
            events = [json.loads(line[6:]) for line in answer.text.split("\n\n") if line.startswith("data: {")]
            ids = [token_id for event in events for token_id in event["choices"][0].get("token_ids", [])]
            assert ids == [*system.story.ids, 2]
            shown = [event["choices"][0]["logprobs"] for event in events]
            assert sum(len(one["content"]) for one in shown if one) == len(ids)

    asyncio.run(scenario())


def test_a_result_goes_back_to_the_model(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, overrides=OPTIONS, told=TOLD) as system, _client(system) as client:
            first = await client.chat.completions.create(model="tiny-moe", messages=ASKED, tools=TOOLS)
            message = first.choices[0].message
            turns = [*ASKED, message.model_dump(exclude_none=True)]
            for call in message.tool_calls or []:
                turns.append({"role": "tool", "tool_call_id": call.id, "content": [{"type": "text", "text": "rain"}]})
            quick = {"chat_template_kwargs": {"enable_thinking": False}}
            await client.chat.completions.create(model="tiny-moe", messages=turns, tools=TOOLS, extra_body=quick)
            start = system.pools.of_role("prefill")[0].of_type(StartPrefill)[-1]
            prompt = system.gateway.text.decode(start.prompt_ids)
            assert 'Let me look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>\n<tool_call>' in prompt
            assert prompt.endswith("<tool_response>\nrain\n</tool_response><|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
            counted = await system.client.post("/tokenize", json={"messages": turns, "tools": TOOLS} | quick)
            assert counted.json()["tokens"] == list(start.prompt_ids)

    asyncio.run(scenario())


def test_duomo_chat_shows_reasoning_apart_from_the_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, overrides=OPTIONS, told="<think>\nA greeting.\n</think>\n\nHello.") as system:
            await asyncio.to_thread(converse, Gateway(system.base_url), "", "hi", {})

    asyncio.run(scenario())
    shown = capsys.readouterr()
    assert shown.out == "Hello.\n" and shown.err.endswith("A greeting.\n\n")


def test_a_call_that_must_be_made_is_told_to_whoever_samples(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, overrides=OPTIONS, told=CALLS) as system, _client(system) as client:
            named: Any = {"type": "function", "function": {"name": "weather"}}
            for choice in ("required", named):
                told = await client.chat.completions.create(model="tiny-moe", messages=ASKED, tools=TOOLS, tool_choice=choice)
                assert told.choices[0].finish_reason == "tool_calls"
                start = system.pools.of_role("prefill")[0].of_type(StartPrefill)[-1]
                constraint = start.sampling.constraint
                assert constraint is not None and constraint.kind == "grammar" and '"required":["city"]' in constraint.text
            free = await client.chat.completions.create(model="tiny-moe", messages=ASKED, tools=TOOLS)
            assert free.choices[0].finish_reason == "tool_calls"
            assert system.pools.of_role("prefill")[0].of_type(StartPrefill)[-1].sampling.constraint is None

    asyncio.run(scenario())


def test_an_answer_that_must_be_something_has_no_reasoning_to_be_read(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, overrides=OPTIONS, told="<think>x</think>") as system, _client(system) as client:
            told = await client.chat.completions.create(
                model="tiny-moe", messages=ASKED, extra_body={"structured_outputs": {"choice": ["<think>x</think>"]}}
            )
            assert told.choices[0].message.content == "<think>x</think>"

    asyncio.run(scenario())


CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}


NO_KIND = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "frog"}}}}}
WRONG: list[tuple[dict, str]] = [
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 3}}]}, "tools[0].function.parameters"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]}, "tools[0].function.parameters"),
    ({"tools": [{"type": "function", "function": {"name": "f", "mood": 1}}]}, "tools[0].function.mood"),
    ({"tools": [TOOLS[0], TOOLS[0]]}, "tools[1].function.name"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": "perhaps"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": "named"}, "tool_choice"),  # a word of ours, not of the API's
    ({"tools": TOOLS, "tool_choice": 3}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name"),
    ({"tools": [NO_KIND], "tool_choice": "required"}, "tools[0].function.parameters"),
    ({"tools": TOOLS, "parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "assistant", "tool_calls": [CALL | {"function": {}}]}]}, "messages[0].tool_calls[0].function.name"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f", "arguments": "{"}}]}]},
        "messages[0].tool_calls[0].function.arguments",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f", "arguments": "[]"}}]}]},
        "messages[0].tool_calls[0].function.arguments",
    ),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "user", "content": "x", "tool_call_id": "a"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "user", "content": "x", "reasoning_content": "a"}]}, "messages[0].reasoning_content"),
    ({"messages": [{"role": "assistant", "tool_calls": []}]}, "messages[0].content"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
    ({"chat_template_kwargs": []}, "chat_template_kwargs"),
]


def test_what_is_wrong_with_tools_is_refused_by_its_name(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, overrides=OPTIONS) as system:
            for fields, param in WRONG:
                answer = await system.client.post("/v1/chat/completions", json={"model": "tiny-moe", "messages": ASKED} | fields)
                assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
            assert not system.pools.of_role("prefill")[0].of_type(StartPrefill), "a refusal reserves nothing"

    asyncio.run(scenario())


def test_a_model_without_a_place_for_tools_says_so(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path) as system:
            answer = await system.client.post("/v1/chat/completions", json={"model": "tiny-moe", "messages": ASKED, "tools": TOOLS})
            error = answer.json()["error"]
            assert (answer.status_code, error["param"], error["code"]) == (400, "tools", "unsupported_parameter")
            assert "gateway.chat_template" in error["message"]

    asyncio.run(scenario())
