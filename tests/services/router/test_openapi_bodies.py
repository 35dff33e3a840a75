"""The OpenAPI document's bodies beside the parsers: what one reads the other says, with types and bounds, and neither more."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from duomo.errors import RequestError
from tests.services.router.body_places import odd, places, with_value
from tests.services.router.openapi_reading import PARSERS, Reading, document, documented, recorded, resolved, validator

CALL = {"id": "a", "type": "function", "index": 0, "function": {"name": "f", "arguments": '{"a": 1}'}}
PART = {"type": "text", "text": "hi"}
CACHED = PART | {"cache_control": {"type": "ephemeral"}, "citations": None}
CHAT_TURNS: list[Any] = [
    {"role": "user", "content": [PART], "name": "x"},
    {"role": "assistant", "tool_calls": [CALL], "reasoning": "x", "annotations": []},
    {"role": "tool", "tool_call_id": "a", "content": "x"},
    {"role": "assistant", "content": None},
    {"role": "assistant", "reasoning_content": "x"},
]
CHAT_TOOL = {"type": "function", "function": {"name": "f", "description": "x", "parameters": {"type": "object"}, "strict": True}}
CHAT_CHOICE = {"type": "function", "function": {"name": "f"}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}, "strict": True}}
STREAM = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": False}}
MODEL = {"model": "tiny-moe"}
CHAT_ASKED = {"messages": CHAT_TURNS, "tools": [CHAT_TOOL], "tool_choice": CHAT_CHOICE, "chat_template_kwargs": {"a": 1}}
MESSAGE_TURNS = [
    {"role": "user", "content": "hi"},
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "x", "signature": ""},
            CACHED,
            {"type": "tool_use", "id": "a", "name": "f", "input": {"a": 1}, "cache_control": None},
        ],
    },
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": [CACHED], "is_error": False}, CACHED]},
]
MESSAGE_TOOL = {"type": "custom", "name": "f", "description": "x", "input_schema": {"type": "object"}, "strict": True}
MESSAGE_ASKED = MODEL | {
    "system": [CACHED],
    "messages": MESSAGE_TURNS,
    "tools": [MESSAGE_TOOL],
    "tool_choice": {"type": "tool", "name": "f", "disable_parallel_tool_use": True},
    "thinking": {"type": "enabled", "budget_tokens": 2048},
}
RESPONSE_ITEMS: list[Any] = [
    {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
    {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "x"}], "encrypted_content": None},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "x", "annotations": [], "logprobs": []}]},
    {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}", "status": "completed"},
    {"type": "function_call_output", "call_id": "a", "output": [{"type": "input_text", "text": "x"}]},
]
RESPONSE_TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}}
FORMAT = {"type": "json_schema", "name": "x", "schema": {"type": "object"}}
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", MODEL | CHAT_ASKED | STREAM | {"logprobs": True, "top_logprobs": 2, "stop": ["x"], "logit_bias": {"5": 1}}),
    ("/v1/chat/completions", MODEL | {"messages": CHAT_TURNS[:1], "response_format": SCHEMA, "max_tokens": 5, "tool_choice": "auto"}),
    ("/v1/chat/completions", MODEL | {"messages": CHAT_TURNS[:1], "structured_outputs": {"choice": ["a"]}, "metadata": {"a": "b"}}),
    ("/v1/completions", MODEL | STREAM | {"prompt": "hi", "guided_json": "{}", "stop": "x", "echo": True}),
    ("/v1/completions", MODEL | {"prompt": [[5, 6], [7]], "response_format": SCHEMA, "best_of": 3, "n": 2, "logprobs": 1}),
    ("/v1/completions", MODEL | {"prompt": [5, 6], "structured_outputs": {"json_object": True}, "stop_token_ids": [3]}),
    (
        "/v1/responses",
        MODEL | STREAM | {"input": RESPONSE_ITEMS, "tools": [RESPONSE_TOOL], "tool_choice": {"type": "function", "name": "f"}},
    ),
    ("/v1/responses", MODEL | {"input": "hi", "text": {"format": FORMAT, "verbosity": "medium"}, "reasoning": {"effort": "none"}}),
    ("/v1/responses", MODEL | {"input": "hi", "include": ["reasoning.encrypted_content"], "metadata": {"a": "b"}, "store": False}),
    ("/v1/messages", MESSAGE_ASKED | STREAM | {"max_tokens": 5, "stop_sequences": ["x"], "metadata": {"user_id": "x"}}),
    (
        "/v1/messages",
        MODEL | {"messages": MESSAGE_TURNS[:1], "max_tokens": 5, "output_config": {"format": {"type": "json_schema", "schema": {}}}},
    ),
    ("/v1/messages/count_tokens", MESSAGE_ASKED),
    ("/tokenize", {"prompt": "hi", "model": "tiny-moe", "return_token_strs": True}),
    ("/tokenize", CHAT_ASKED | {"add_special_tokens": False}),
    ("/detokenize", {"tokens": [5, 6], "model": "tiny-moe"}),
]
# Dropped before their objects are read as fields.
DROPPED = {
    "/v1/responses": {f"input[].{field}[].{name}" for field in ("content", "output") for name in ("annotations", "logprobs")},
    "/v1/messages": {
        f"{place}[].{name}" for place in ("system", "messages[].content[].content") for name in ("cache_control", "citations")
    },
}
DROPPED["/v1/messages/count_tokens"] = DROPPED["/v1/messages"]
TYPES = {"integer": "integer", "number": "number", "boolean": "boolean", "string": "string", "array": "array", "mapping": "object"}


def _of(path: str) -> list[dict[str, Any]]:
    return [body for one, body in BODIES if one == path]


def _kinds(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The schema's alternatives, each with a type of its own."""
    schema = resolved(schema)
    return [kind for one in schema["anyOf"] for kind in _kinds(one)] if "anyOf" in schema else [schema]


def _says(schemas: list[dict[str, Any]], reading: Reading) -> bool:
    """Whether the document says of a place how it is read."""
    kinds = [kind for schema in schemas for kind in _kinds(schema)]
    if reading.kind == "take":
        return True
    if reading.kind == "ignore":
        return any(set(kind) == {"description"} for kind in kinds)
    if reading.kind == "off":
        return any(tuple(sorted(map(json.dumps, kind.get("enum", ())))) == reading.values for kind in kinds)
    wanted = TYPES[reading.kind]
    fit = [kind for kind in kinds if wanted in (kind.get("type"), *(kind["type"] if isinstance(kind.get("type"), list) else ()))]
    words = ("minimum", "maximum", "exclusiveMinimum")
    return any(tuple(sorted((word, kind[word]) for word in words if word in kind)) == reading.bounds for kind in fit)


@pytest.mark.parametrize("path", list(PARSERS))
def test_what_is_read_is_documented_and_what_is_documented_is_read(path: str) -> None:
    with recorded() as read:
        for body in _of(path):
            PARSERS[path](json.dumps(body).encode())
    said = documented(path)
    assert set(read) - set(said) == set(), "read, and not in the document"
    assert set(said) - set(read) - DROPPED.get(path, set()) == set(), "in the document, and not read"
    wrong = {place: (reading, said[place]) for place, reading in read.items() if not _says(said[place], reading)}
    assert not wrong


def test_a_bound_or_a_type_that_differs_is_found() -> None:
    assert not _says([{"type": "integer", "minimum": 0, "maximum": 9}], Reading("integer", (("maximum", 8), ("minimum", 0))))
    assert not _says([{"type": ["string", "null"]}], Reading("boolean"))
    assert not _says([{"enum": [None]}], Reading("off", values=('""', "null")))


@pytest.mark.parametrize("path", list(PARSERS))
def test_every_schema_is_one_and_takes_the_bodies(path: str) -> None:
    Draft202012Validator.check_schema(document()["components"]["schemas"])
    for body in _of(path):
        assert not list(validator(path).iter_errors(body))


# Why a body that the document allows may be refused: what one field means beside another, and texts in a language of their own.
BESIDE = (
    "needs 'stream'",
    "needs 'logprobs'",
    "needs 'echo'",
    "asks for a call",
    "which is none of 'tools'",
    "a second time",
    "both say what",
    "contradict",
    "is not valid JSON",
    "must hold a JSON object",
    "must be at least 'n'",
    "above 'n' cannot be streamed",
    "choices fit one request",
    "needs the prompt's own log-probabilities",
    "token ids, from 0",
    "the last turn must be the user's",
    "an integer, got a number",  # 1.0, which is an integer to JSON Schema
    "(an integer), got a number",
    "an array of token ids, got a number",
    "place for tools",
    "cannot show",
    "template",
)


@pytest.mark.parametrize("path", list(PARSERS))
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_what_is_taken_is_allowed_and_what_is_allowed_is_taken(path: str, data: st.DataObject) -> None:
    body = data.draw(st.sampled_from(_of(path)))
    mutant = with_value(body, data.draw(st.sampled_from(places(body))), data.draw(odd))
    refusal: RequestError | None = None
    try:
        PARSERS[path](json.dumps(mutant).encode())
    except RequestError as error:
        refusal = error
    wrong = [error.message for error in validator(path).iter_errors(mutant)]
    if refusal is None:
        assert not wrong, "taken, and not allowed by the document"
    else:
        assert wrong or any(reason in refusal.detail for reason in BESIDE), (refusal.detail, "refused, and allowed by the document")
