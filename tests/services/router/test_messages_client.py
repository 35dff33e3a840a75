"""The real `anthropic` package against the gateway: what its users see."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from pathlib import Path
from typing import Any

import anthropic
import pytest

from duomo.wire.messages import StartPrefill
from services.router.cache_salt import cache_salt
from tests.services.router.stub_replicas import Script
from tests.services.router.stub_system import PATIENCE_S, StubSystem, stub_system

TEMPLATE = Path(__file__).parents[3] / "deploy" / "chat_templates" / "chatml_tools.jinja"
OPTIONS = {"gateway": {"chat_template": str(TEMPLATE)}}
ASKED: list[Any] = [{"role": "user", "content": "Weather in Rome and Oslo?"}]
TOOLS: list[Any] = [{"name": "weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}]
CALLS = "".join(f'\n<tool_call>\n{{"name": "weather", "arguments": {{"city": "{city}"}}}}\n</tool_call>' for city in ("Rome", "Oslo"))
TOLD = "<think>\nTwo cities.\n</think>\n\nLet me look." + CALLS


def _client(system: StubSystem) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=system.base_url, api_key="sk-1", max_retries=0, timeout=PATIENCE_S)


def test_it_reads_whole_messages_and_usage(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, Script(cached_tokens=5)) as system, _client(system) as client:
            sampling = {"temperature": 0.5, "top_p": 0.9, "top_k": 40}  # which the client's newest versions have no names for
            fields: Any = {"max_tokens": 9, "system": "Be brief.", "metadata": {"user_id": "u"}, "extra_body": sampling}
            message = await client.messages.create(model="tiny-moe", messages=ASKED, **fields)
            assert [block.to_dict() for block in message.content] == [{"type": "text", "text": system.story.text(0, 9)}]
            assert (message.role, message.stop_reason, message.stop_sequence) == ("assistant", "max_tokens", None)
            assert message.id.startswith("msg_") and message._request_id == message.id
            start = system.pools.of_role("prefill")[0].of_type(StartPrefill)[0]
            assert (message.usage.input_tokens, message.usage.cache_read_input_tokens) == (len(start.prompt_ids) - 5, 5)
            assert message.usage.output_tokens == 9
            assert (start.sampling.temperature, start.sampling.top_p, start.sampling.top_k) == (0.5, 0.9, 40)
            assert start.cache_salt == cache_salt("Bearer sk-1"), "the same key is the same client, whichever header brings it"
            counted = await client.messages.count_tokens(model="tiny-moe", messages=ASKED, system="Be brief.")
            assert counted.input_tokens == len(start.prompt_ids)

    asyncio.run(scenario())


def test_it_streams_text_and_says_why_it_stopped(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path) as system, _client(system) as client:
            names = []
            async with client.messages.stream(model="tiny-moe", max_tokens=60, messages=ASKED, stop_sequences=["zebra", "fox"]) as stream:
                async for event in stream:
                    names.append(event.type)
                message = await stream.get_final_message()
            told = system.story.text(0, 60)
            assert message.content[0].type == "text" and message.content[0].text == told[: told.index("fox")]
            assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "fox")
            assert names[:2] == ["message_start", "content_block_start"] and names[-2:] == ["message_delta", "message_stop"]
            assert message.usage.output_tokens > 0 < message.usage.input_tokens
            raw = await system.client.post("/v1/messages", json={"model": "tiny-moe", "max_tokens": 3, "messages": ASKED, "stream": True})
            events = [part.split("\n")[0] for part in raw.text.split("\n\n") if part]
            assert events == ["event: " + name for name in ("message_start", "ping", "content_block_start")] + [
                "event: content_block_delta"
            ] * 3 + ["event: " + name for name in ("content_block_stop", "message_delta", "message_stop")]

    asyncio.run(scenario())


def test_calls_and_thinking_are_blocks_whole_and_streamed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, overrides=OPTIONS, told=TOLD) as system, _client(system) as client:
            fields: Any = {"model": "tiny-moe", "max_tokens": 1500, "messages": ASKED, "tools": TOOLS}
            fields["thinking"] = {"type": "enabled", "budget_tokens": 1024}
            whole = await client.messages.create(**fields)
            async with client.messages.stream(**fields) as stream:
                streamed = await stream.get_final_message()
            for message in (whole, streamed):
                assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
                assert message.stop_reason == "tool_use"
                thought, text, *calls = message.content
                assert thought.type == "thinking" and thought.thinking == "Two cities."
                assert text.type == "text" and text.text == "Let me look."
                assert [call.input for call in calls if call.type == "tool_use"] == [{"city": "Rome"}, {"city": "Oslo"}]
                assert all(call.type == "tool_use" and call.id.startswith("toolu_") for call in calls)
            results: Any = [{"type": "tool_result", "tool_use_id": call.id, "content": "rain"} for call in calls if call.type == "tool_use"]
            results[1] |= {"content": [{"type": "text", "text": "sun", "cache_control": {"type": "ephemeral"}}]}
            results.append({"type": "text", "text": "And tomorrow?"})
            turns: Any = [*ASKED, {"role": "assistant", "content": whole.content}, {"role": "user", "content": results}]
            system_text: Any = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
            await client.messages.create(model="tiny-moe", max_tokens=5, messages=turns, tools=TOOLS, system=system_text)
            prompt = system.gateway.text.decode(system.pools.of_role("prefill")[0].of_type(StartPrefill)[-1].prompt_ids)
            assert prompt.startswith("<|im_start|>system\nBe brief.\n\nYou may call") and '{"city": "Oslo"}' in prompt
            assert (
                "<tool_response>\nrain\n</tool_response>\n<tool_response>\nsun\n</tool_response><|im_end|>\n<|im_start|>user\nAnd tomorrow?"
                in prompt
            )
            assert prompt.endswith("<think>\n\n</think>\n\n"), "thinking that nobody asked for is off"

    asyncio.run(scenario())


def test_one_call_at_a_time_and_a_call_that_is_cut_off(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, overrides=OPTIONS, told=CALLS) as system, _client(system) as client:
            choice: Any = {"type": "auto", "disable_parallel_tool_use": True}
            alone = await client.messages.create(model="tiny-moe", max_tokens=900, messages=ASKED, tools=TOOLS, tool_choice=choice)
            assert [block.type for block in alone.content] == ["tool_use"]
            before = len(system.gateway.text.encode(CALLS[: CALLS.index("Rome")], add_special_tokens=False))
            cut = await client.messages.create(model="tiny-moe", max_tokens=before, messages=ASKED, tools=TOOLS)
            assert [block.type for block in cut.content] == ["text"], "half a call is nothing to run"
            assert cut.stop_reason == "max_tokens" and cut.content[0].type == "text" and '"weather", "arguments": {"' in cut.content[0].text

    asyncio.run(scenario())


def test_it_raises_its_own_errors(tmp_path: Path) -> None:
    async def scenario() -> None:
        script, overrides = Script(decode_faults=deque([("die", 2)])), {"gateway": {"failover_wait_s": 0.2}}
        async with stub_system(tmp_path, script, overrides=overrides) as system, _client(system) as client:
            with pytest.raises(anthropic.NotFoundError, match="gpt-9"):
                await client.messages.create(model="gpt-9", max_tokens=5, messages=ASKED)
            image: Any = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
            with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\].content\[0\]") as refused:
                await client.messages.create(model="tiny-moe", max_tokens=5, messages=[{"role": "user", "content": [image]}])
            body: Any = refused.value.body
            assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
            with pytest.raises(anthropic.APIStatusError, match="replica"):
                async with client.messages.stream(model="tiny-moe", max_tokens=30, messages=ASKED) as stream:
                    await stream.get_final_message()
            await system.until(lambda: system.gateway.why_not_ready() is not None)
            with pytest.raises(anthropic.APIStatusError) as full:
                await client.messages.create(model="tiny-moe", max_tokens=5, messages=ASKED)
            told: Any = full.value.body
            assert (
                full.value.status_code == 503
                and told["error"]["type"] == "overloaded_error"
                and "retry-after" in full.value.response.headers
            )
            for method, path, status in (("GET", "/v1/messages", 405), ("POST", "/v1/messages/batches", 404)):
                answer = await system.client.request(method, path)
                assert answer.status_code == status and answer.json()["type"] == "error"

    asyncio.run(scenario())


MESSAGE = {"model": "tiny-moe", "max_tokens": 5, "messages": ASKED}
CALL = {"type": "tool_use", "id": "a", "name": "f", "input": {}}


def _user(*blocks: object) -> dict:
    return {"messages": [{"role": "user", "content": list(blocks)}]}


def _assistant(*blocks: object) -> dict:
    return {"messages": [{"role": "assistant", "content": list(blocks)}, *ASKED]}


WRONG: list[tuple[dict, str]] = [
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 4000}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role"),
    ({"messages": [*ASKED, {"role": "assistant", "content": "It"}]}, "messages[1].role"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages[0].name"),
    (_user({"text": "x"}), "messages[0].content[0].type"),
    (_user({"type": "text"}), "messages[0].content[0].text"),
    (_user({"type": "text", "text": "x", "mood": 1}), "messages[0].content[0].mood"),
    (_user({"type": "document", "source": {}}), "messages[0].content[0]"),
    (_user({"type": "tool_result"}), "messages[0].content[0].tool_use_id"),
    (_user({"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image"}]}), "messages[0].content[0].content[0]"),
    (_user(CALL), "messages[0].content[0]"),
    (_assistant({"type": "redacted_thinking", "data": "x"}), "messages[0].content[0]"),
    (_assistant(CALL | {"input": "x"}), "messages[0].content[0].input"),
    (_assistant(CALL | {"name": None}), "messages[0].content[0].name"),
    ({"system": 3}, "system"),
    ({"system": [{"type": "image"}]}, "system[0]"),
    ({"stop_sequences": [""]}, "stop_sequences[0]"),
    ({"temperature": 3}, "temperature"),
    ({"n": 2}, "n"),
    ({"return_token_ids": True}, "return_token_ids"),
    ({"mood": 1}, "mood"),
    ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
    ({"tools": [{"name": "a b", "input_schema": {"type": "object"}}]}, "tools[0].name"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
    ({"tools": [TOOLS[0], TOOLS[0]]}, "tools[1].name"),
    ({"tools": TOOLS, "tool_choice": {"type": "required"}}, "tool_choice.type"),
    ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "tool_choice.name"),
    ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "other"}}, "tool_choice"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"thinking": {"type": "enabled", "budget_tokens": 10}}, "thinking.budget_tokens"),
    ({"thinking": {"type": "on"}}, "thinking.type"),
    ({"output_config": {"effort": "low"}}, "output_config.effort"),
    ({"output_config": {"format": {"type": "text"}}}, "output_config.format.type"),
    ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
]


def test_every_bad_message_is_refused_by_its_name(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, overrides=OPTIONS) as system:
            for fields, named in WRONG:
                answer = await system.client.post("/v1/messages", json=MESSAGE | fields)
                told = answer.json()
                assert (answer.status_code, told["type"], told["error"]["type"]) == (400, "error", "invalid_request_error"), answer.text
                assert f"'{named}'" in told["error"]["message"], (named, answer.text)
            broken = await system.client.post("/v1/messages", content=b"{")
            assert broken.status_code == 400 and json.loads(broken.content)["error"]["type"] == "invalid_request_error"
            large = await system.client.post("/v1/messages", content=b" " * (9 << 20))
            assert large.status_code == 413 and large.json()["error"]["type"] == "request_too_large"
            assert not system.pools.of_role("prefill")[0].of_type(StartPrefill), "a refusal reserves nothing"

    asyncio.run(scenario())


def test_what_an_answer_or_a_call_must_be_is_told_to_whoever_samples(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, overrides=OPTIONS) as system, _client(system) as client:
            schema = {"type": "object", "properties": {}, "additionalProperties": False}
            form: Any = {"format": {"type": "json_schema", "schema": schema}}
            await client.messages.create(model="tiny-moe", max_tokens=2, messages=ASKED, output_config=form)
            for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
                forced: Any = choice
                await client.messages.create(model="tiny-moe", max_tokens=2, messages=ASKED, tools=TOOLS, tool_choice=forced)
            told = [start.sampling.constraint for start in system.pools.of_role("prefill")[0].of_type(StartPrefill)]
            assert [constraint.kind for constraint in told] == ["json_schema", "grammar", "grammar"]
            assert json.loads(told[0].text) == schema and "weather" in told[1].text

    asyncio.run(scenario())


def test_thinking_is_refused_where_the_model_marks_none(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path) as system:
            answer = await system.client.post("/v1/messages", json=MESSAGE | {"thinking": {"type": "adaptive"}})
            assert answer.status_code == 400 and "'thinking'" in answer.json()["error"]["message"]
            off = await system.client.post("/v1/messages", json=MESSAGE | {"thinking": {"type": "disabled"}})
            assert off.status_code == 200

    asyncio.run(scenario())
