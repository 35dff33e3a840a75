"""Bodies that nobody means, on every generating endpoint: each is taken or refused by the name of a field, and none is a fault of ours."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duomo.config import ModelSection
from duomo.config_gateway import GatewaySection
from duomo.errors import RequestError
from services.router.common_fields import CommonReader
from services.router.forced_calls import forced_calls
from services.router.message_requests import MessageParser
from services.router.openai import ChatRequest, RequestParser
from services.router.response_requests import ResponseParser
from services.router.text import ModelText
from tests.services.router.body_places import odd, places, with_value
from tests.services.router.stub_replicas import MODEL
from tests.services.router.stub_system import stub_system

TEMPLATE = Path(__file__).parents[3] / "deploy" / "chat_templates" / "chatml_tools.jinja"
SECTION = GatewaySection(chat_template=TEMPLATE)
READER = CommonReader(SECTION, "tiny-moe", 8192)
TEXT = ModelText.of(ModelSection(path=MODEL), 8192, SECTION)
TURN = {"role": "user", "content": "hi"}
TOOL_CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}

ENDPOINTS: dict[str, tuple[Callable[[bytes], ChatRequest], dict[str, object]]] = {
    "chat": (
        RequestParser(SECTION, READER).chat,
        {
            "model": "tiny-moe",
            "messages": [TURN, {"role": "assistant", "tool_calls": [TOOL_CALL]}, {"role": "tool", "tool_call_id": "a", "content": "x"}],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
            "tool_choice": "auto",
            "chat_template_kwargs": {"enable_thinking": True},
        },
    ),
    "message": (
        lambda body: MessageParser(READER).message(body).chat,
        {
            "model": "tiny-moe",
            "max_tokens": 5,
            "system": [{"type": "text", "text": "x"}],
            "messages": [
                TURN,
                {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {"a": 1}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "x"}]}]},
            ],
            "tools": [{"name": "f", "input_schema": {"type": "object"}}],
            "tool_choice": {"type": "any"},
            "thinking": {"type": "enabled", "budget_tokens": 2048},
            "output_config": {"format": {"type": "json_schema", "schema": {}}},
        },
    ),
    "response": (
        lambda body: ResponseParser(READER).response(body).chat,
        {
            "model": "tiny-moe",
            "input": [
                TURN,
                {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "x"}]},
                {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "a", "output": [{"type": "input_text", "text": "x"}]},
            ],
            "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
            "tool_choice": {"type": "function", "name": "f"},
            "text": {"format": {"type": "json_schema", "name": "x", "schema": {}}},
            "reasoning": {"effort": "none"},
            "include": ["reasoning.encrypted_content"],
            "metadata": {"a": "b"},
        },
    ),
}


def _use(endpoint: str, body: bytes) -> RequestError | None:
    """What the gateway does with a body before it asks for room: parses, renders, tokenises, and makes the grammar of a forced call."""
    try:
        chat = ENDPOINTS[endpoint][0](body)
        rendered = TEXT.render(chat.conversation)
        TEXT.encode(rendered.text, add_special_tokens=False)
        forced_calls(chat.conversation.tool_use, rendered.style)
    except RequestError as error:
        assert error.param and error.status in (400, 404), error
        return error
    return None


@pytest.mark.parametrize("endpoint", list(ENDPOINTS))
def test_the_whole_body_itself_is_taken(endpoint: str) -> None:
    assert _use(endpoint, json.dumps(ENDPOINTS[endpoint][1]).encode()) is None


@pytest.mark.parametrize("endpoint", list(ENDPOINTS))
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_value_in_any_place_is_taken_or_refused_by_a_name(endpoint: str, data: st.DataObject) -> None:
    body = ENDPOINTS[endpoint][1]
    place = data.draw(st.sampled_from(places(body)))
    _use(endpoint, json.dumps(with_value(body, place, data.draw(odd))).encode())


@pytest.mark.parametrize("endpoint", list(ENDPOINTS))
def test_what_nests_deeply_or_is_very_long_is_refused_and_breaks_nothing(endpoint: str) -> None:
    body = ENDPOINTS[endpoint][1]
    marked = '"in its place"'
    schema = '{"type": "object", "properties": {"a": ' * 300 + "{}" + "}}" * 300
    lists = "[" * 900 + "]" * 900
    big = '{"a": ' + "9" * 5000 + "}"
    for text in (schema, lists, big, json.dumps(big), json.dumps(lists), json.dumps('{"a": ' * 900 + "1" + "}" * 900)):
        for place in places(body):
            _use(endpoint, json.dumps(with_value(body, place, json.loads(marked))).replace(marked, text).encode())


def test_no_depth_is_a_fault_of_ours(tmp_path: Path) -> None:
    """Parsing, templates and schemas each have a limit of their own, and none of them the same."""

    async def scenario() -> None:
        statuses = set()
        async with stub_system(tmp_path, overrides={"gateway": {"chat_template": str(TEMPLATE)}}, told="x") as system:
            for depth in [*range(100, 900, 100), *range(900, 1010, 5)]:
                nested = '{"a": ' * depth + "1" + "}" * depth
                deep_call = TOOL_CALL | {"function": {"name": "f", "arguments": nested}}
                deep_tool = {"type": "function", "function": {"name": "f", "parameters": {"default": "@"}}}
                bodies = [
                    {"messages": [{"role": "assistant", "tool_calls": [deep_call]}], "tools": [deep_tool | {"function": {"name": "f"}}]},
                    {"messages": [TURN], "tools": [deep_tool], "tool_choice": "required"},
                    {"messages": [TURN], "chat_template_kwargs": {"a": "@"}},
                    {"messages": [TURN], "response_format": {"type": "json_schema", "json_schema": {"schema": {"default": "@"}}}},
                ]
                for fields in bodies:
                    body = json.dumps({"model": "tiny-moe", "max_tokens": 1, **fields}).replace('"@"', nested)
                    for path in ("/v1/chat/completions", "/tokenize"):
                        answer = await system.client.post(path, content=body.encode())
                        assert answer.status_code in (200, 400), (path, depth, answer.text)
                        statuses.add(answer.status_code)
        assert statuses == {200, 400}

    asyncio.run(scenario())
