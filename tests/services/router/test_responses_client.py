"""The `openai` package's responses against the gateway: what its users see."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from pathlib import Path
from typing import Any

import openai
import pytest

from duomo.wire.messages import StartPrefill
from tests.services.router.stub_replicas import Script
from tests.services.router.stub_system import PATIENCE_S, StubSystem, stub_system

TEMPLATE = Path(__file__).parents[3] / "deploy" / "chat_templates" / "chatml_tools.jinja"
OPTIONS = {"gateway": {"chat_template": str(TEMPLATE)}}
TOOLS: list[Any] = [{"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": True, "description": "Tells it."}]
CALLS = "".join(f'\n<tool_call>\n{{"name": "weather", "arguments": {{"city": "{city}"}}}}\n</tool_call>' for city in ("Rome", "Oslo"))
TOLD = "<think>\nTwo cities.\n</think>\n\nLet me look." + CALLS


def _client(system: StubSystem) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=system.base_url + "/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)


def _prompt(system: StubSystem) -> str:
    return system.gateway.text.decode(system.pools.of_role("prefill")[0].of_type(StartPrefill)[-1].prompt_ids)


def test_it_reads_whole_responses_and_usage(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, Script(cached_tokens=3)) as system, _client(system) as client:
            fields: Any = {"temperature": 0.5, "top_p": 0.9, "metadata": {"a": "b"}, "store": False, "user": "me", "truncation": "disabled"}
            fields |= {"instructions": "Be brief.", "max_output_tokens": 9, "include": ["reasoning.encrypted_content"]}
            response = await client.responses.create(model="tiny-moe", input="Tell me a story.", **fields)
            assert response.output_text == system.story.text(0, 9)
            assert (response.status, response.object, response.metadata) == ("incomplete", "response", {"a": "b"})
            assert response.incomplete_details is not None and response.incomplete_details.reason == "max_output_tokens"
            assert (response.temperature, response.max_output_tokens, response.instructions) == (0.5, 9, "Be brief.")
            usage = response.usage
            assert usage is not None and (usage.output_tokens, usage.input_tokens_details.cached_tokens) == (9, 3)
            assert usage.total_tokens == usage.input_tokens + 9
            assert _prompt(system) == (
                "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nTell me a story.<|im_end|>\n<|im_start|>assistant\n"
            )

    asyncio.run(scenario())


def test_a_stream_of_text_has_every_event_in_its_place(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, Script(eos_at=3)) as system, _client(system) as client:
            stream = await client.responses.create(model="tiny-moe", input="hi", stream=True)
            events = [event async for event in stream]
            assert [event.type.removeprefix("response.") for event in events] == [
                "created",
                "in_progress",
                "output_item.added",
                "content_part.added",
                *["output_text.delta"] * 3,
                "output_text.done",
                "content_part.done",
                "output_item.done",
                "completed",
            ]
            assert [event.sequence_number for event in events] == list(range(len(events)))
            final = events[-1]
            assert final.type == "response.completed" and final.response.output_text == system.story.text(0, 3)
            added, done = events[2], events[-2]
            assert added.type == "response.output_item.added" and done.type == "response.output_item.done"
            assert added.item.id == done.item.id == final.response.output[0].id
            assert events[0].type == "response.created" and events[0].response.id == final.response.id

    asyncio.run(scenario())


def test_calls_and_reasoning_are_items_whole_and_streamed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, overrides=OPTIONS, told=TOLD) as system, _client(system) as client:
            whole = await client.responses.create(model="tiny-moe", input="Weather?", tools=TOOLS)
            async with client.responses.stream(model="tiny-moe", input="Weather?", tools=TOOLS) as stream:
                names = [event.type async for event in stream]
                streamed = await stream.get_final_response()
            assert names.count("response.function_call_arguments.done") == 2 and "response.reasoning_text.delta" in names
            for response in (whole, streamed):
                assert response.status == "completed" and response.usage is not None
                thought, message, *calls = response.output
                assert thought.type == "reasoning" and thought.content and thought.content[0].text == "Two cities."
                assert message.type == "message" and response.output_text == "Let me look."
                assert [(call.name, json.loads(call.arguments)) for call in calls if call.type == "function_call"] == [
                    ("weather", {"city": "Rome"}),
                    ("weather", {"city": "Oslo"}),
                ]
                counted = response.usage.output_tokens_details.reasoning_tokens
                thoughts = ("Two cities.", "<think>\nTwo cities.\n</think>")
                least, most = (len(system.gateway.text.encode(thought, add_special_tokens=False)) for thought in thoughts)
                assert least < counted <= most, "with its marks, as far as one token tells"
            turns: list[Any] = [{"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]}]
            turns += [item.model_dump(exclude_none=True) for item in whole.output]
            for call, told in zip(whole.output[2:], ("rain", "sun"), strict=True):
                assert call.type == "function_call"
                turns.append({"type": "function_call_output", "call_id": call.call_id, "output": told})
            await client.responses.create(model="tiny-moe", input=turns, tools=TOOLS, reasoning={"effort": "none"}, max_output_tokens=4)
            prompt = _prompt(system)
            assert 'Let me look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}' in prompt
            assert prompt.count("<|im_start|>assistant") == 2, "thoughts, words and calls in a row are one turn"
            assert "<tool_response>\nrain\n</tool_response>\n<tool_response>\nsun\n</tool_response>" in prompt
            assert prompt.endswith("<think>\n\n</think>\n\n")

    asyncio.run(scenario())


def test_a_fault_in_the_middle_fails_the_response_and_one_before_it_is_a_status(tmp_path: Path) -> None:
    async def scenario() -> None:
        script, overrides = Script(decode_faults=deque([("die", 2)])), {"gateway": {"failover_wait_s": 0.2}}
        async with stub_system(tmp_path, script, overrides=overrides) as system, _client(system) as client:
            events = [
                event async for event in await client.responses.create(model="tiny-moe", input="hi", max_output_tokens=30, stream=True)
            ]
            last = events[-1]
            assert last.type == "response.failed" and last.response.status == "failed"
            assert last.response.error is not None and "replica" in last.response.error.message
            await system.until(lambda: system.gateway.why_not_ready() is not None)
            with pytest.raises(openai.APIStatusError) as full:
                await client.responses.create(model="tiny-moe", input="hi", stream=True)
            assert full.value.status_code == 503

    asyncio.run(scenario())


def test_formats_are_told_to_whoever_samples(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path) as system, _client(system) as client:
            schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
            for form in (
                {"type": "json_schema", "name": "it", "schema": schema, "strict": True},
                {"type": "json_object"},
                {"type": "text"},
            ):
                told: Any = {"format": form}
                response = await client.responses.create(model="tiny-moe", input="hi", max_output_tokens=2, text=told)
                assert response.text is not None and response.text.format is not None and response.text.format.type == form["type"]
            starts = system.pools.of_role("prefill")[0].of_type(StartPrefill)
            texts = [start.sampling.constraint and json.loads(start.sampling.constraint.text) for start in starts]
            assert texts == [schema, {"type": "object"}, None]

    asyncio.run(scenario())


CALL = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}
WRONG: list[tuple[dict, str]] = [
    ({"input": None}, "input"),
    ({"input": 3}, "input"),
    ({"input": []}, "input"),
    ({"input": "word " * 3000}, "input"),
    ({"input": ["hi"]}, "input[0]"),
    ({"input": [{"role": "wizard", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}]}, "input[0].content[0]"),
    ({"input": [{"role": "user", "content": "x", "mood": 1}]}, "input[0].mood"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
    ({"input": [{"type": "", "role": "user", "content": "x"}]}, "input[0].type"),
    ({"input": [CALL | {"arguments": "["}]}, "input[0].arguments"),
    ({"input": [CALL | {"call_id": None}]}, "input[0].call_id"),
    ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
    ({"input": [{"type": "function_call_output", "call_id": "a"}]}, "input[0].output"),
    ({"instructions": 3}, "instructions"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": 4000}, "max_output_tokens"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"store": True}, "store"),
    ({"background": True}, "background"),
    ({"conversation": "x"}, "conversation"),
    ({"truncation": "auto"}, "truncation"),
    ({"include": ["message.output_text.logprobs"]}, "include[0]"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
    ({"reasoning": {"mood": 1}}, "reasoning.mood"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"tools": [TOOLS[0], TOOLS[0]]}, "tools[1].name"),
    ({"tools": TOOLS, "tool_choice": {"type": "web_search"}}, "tool_choice.type"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "other"}}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ({"text": {"format": {}}}, "text.format.type"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ({"text": {"format": {"type": "json_schema", "schema": {"type": "frog"}}}}, "text.format.schema"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"temperature": 3}, "temperature"),
    ({"n": 2}, "n"),
    ({"return_token_ids": True}, "return_token_ids"),
    ({"messages": []}, "messages"),
]


def test_every_bad_response_is_refused_by_its_name(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, overrides=OPTIONS) as system:
            for fields, param in WRONG:
                answer = await system.client.post("/v1/responses", json={"model": "tiny-moe", "input": "hi"} | fields)
                assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
            assert not system.pools.of_role("prefill")[0].of_type(StartPrefill), "a refusal reserves nothing"

    asyncio.run(scenario())
