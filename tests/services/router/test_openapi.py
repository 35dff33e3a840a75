"""The served OpenAPI document beside the served application: its paths, its answers, refusals and events, and who may read it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from duomo.config_gateway import GatewaySection
from services.router.app import build_app
from services.router.deadlines import TIMEOUT_HEADER
from services.router.idempotency import KEY_HEADER
from services.router.keys import Keys
from services.router.openapi import openapi_document
from services.router.session import SESSION_HEADER
from tests.services.router.openapi_reading import CARD, TEMPLATE
from tests.services.router.stub_system import StubSystem, stub_system

TURNS = [{"role": "user", "content": "Weather in Rome?"}]
FUNCTION = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
TOLD = '<think>\nOne city.\n</think>\n\nLet me look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
MODEL = {"model": "tiny-moe"}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
CHAT = MODEL | {"messages": TURNS, "logprobs": True, "top_logprobs": 1, "return_token_ids": True, "n": 2}
CALLED = {"tools": [{"type": "function", "function": FUNCTION}]}
MESSAGE_TOOL = FUNCTION | {"input_schema": FUNCTION["parameters"]}
del MESSAGE_TOOL["parameters"]
COMPLETION = MODEL | {"prompt": "Once", "echo": True, "return_token_ids": True}
RESPONSE = MODEL | {"input": "Weather?", "tools": [{"type": "function", **FUNCTION}]}
MESSAGE = MODEL | {"max_tokens": 900, "messages": TURNS, "tools": [MESSAGE_TOOL], "thinking": {"type": "adaptive"}}
# What is sent and the status of its answer; the bodies show every kind of answer between them.
POSTS: list[tuple[str, dict[str, Any], int]] = [
    ("/v1/chat/completions", CHAT | CALLED, 200),
    ("/v1/chat/completions", CHAT | {"max_tokens": 3}, 200),
    ("/v1/chat/completions", CHAT | {"max_tokens": 3, "prompt_logprobs": 1}, 200),
    ("/v1/chat/completions", CHAT | CALLED | STREAM, 200),
    ("/v1/chat/completions", MODEL | {"messages": TURNS, "max_tokens": 3, "stream": True}, 200),
    ("/v1/chat/completions", CHAT | {"mood": 1}, 400),
    ("/v1/chat/completions", CHAT | {"model": "gpt-9"}, 404),
    ("/v1/completions", COMPLETION, 200),
    ("/v1/completions", COMPLETION | {"echo": False, "logprobs": 2, "max_tokens": 3}, 200),
    ("/v1/completions", COMPLETION | {"logprobs": 1, "prompt_logprobs": 2, "max_tokens": 3}, 200),
    ("/v1/completions", COMPLETION | STREAM | {"logprobs": 1, "max_tokens": 3}, 200),
    ("/v1/completions", COMPLETION | STREAM | {"max_tokens": 3}, 200),
    ("/v1/completions", COMPLETION | {"logprobs": 1, "max_tokens": 0}, 200),
    ("/v1/completions", COMPLETION | STREAM | {"logprobs": 1, "max_tokens": 0}, 200),
    ("/v1/completions", COMPLETION | {"prompt": []}, 400),
    ("/v1/responses", RESPONSE, 200),
    ("/v1/responses", RESPONSE | {"max_output_tokens": 3}, 200),
    ("/v1/responses", RESPONSE | {"stream": True}, 200),
    ("/v1/responses", RESPONSE | {"store": True}, 400),
    ("/v1/messages", MESSAGE, 200),
    ("/v1/messages", MESSAGE | {"stream": True}, 200),
    ("/v1/messages", MESSAGE | {"messages": []}, 400),
    ("/v1/messages", MESSAGE | {"model": "gpt-9"}, 404),
    ("/v1/messages/count_tokens", MODEL | {"messages": TURNS}, 200),
    ("/v1/messages/count_tokens", MODEL, 400),
    ("/tokenize", {"prompt": "Once", "return_token_strs": True}, 200),
    ("/tokenize", {"messages": TURNS}, 200),
    ("/tokenize", {}, 400),
    ("/detokenize", {"tokens": [5, 6]}, 200),
    ("/detokenize", {}, 400),
]
GETS = {
    "/v1/models": ("/v1/models", 200),
    "/v1/models/tiny-moe": ("/v1/models/{name}", 200),
    "/v1/models/gpt-9": ("/v1/models/{name}", 404),
    "/health/live": ("/health/live", 200),
    "/health/ready": ("/health/ready", 200),
    "/admin/pools": ("/admin/pools", 200),
    "/admin/experts": ("/admin/experts", 200),
    "/openapi.json": ("/openapi.json", 200),
}


def _closed(schema: Any) -> Any:
    """Objects with fields of their own take no others: an answer's field that the document lacks is a fault."""
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    return (
        closed | {"additionalProperties": False}
        if isinstance(closed.get("properties"), dict) and "additionalProperties" not in closed
        else closed
    )


class Served:
    """The document that a running gateway serves, which judges its answers."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self._components = _closed(document["components"])

    def judge(self, path: str, method: str, status: int, media: str, value: object) -> None:
        schema = self.document["paths"][path][method]["responses"][str(status)]["content"][media]["schema"]
        if media == "text/event-stream":
            data = schema["properties"]["data"]
            schema = data.get("anyOf", [data])[0]["contentSchema"]
        errors = list(Draft202012Validator({**schema, "components": self._components}).iter_errors(value))
        assert not errors, (path, status, value, errors)


def _run(tmp_path: Path, told: str | None, scenario: Any) -> None:
    async def within() -> None:
        async with stub_system(tmp_path, overrides={"gateway": {"chat_template": str(TEMPLATE)}}, told=told) as system:
            await scenario(system, Served((await system.client.get("/openapi.json")).json()))

    asyncio.run(within())


def test_every_answer_and_every_event_is_as_documented(tmp_path: Path) -> None:
    async def scenario(system: StubSystem, served: Served) -> None:
        for path, body, status in POSTS:
            answer = await system.client.post(path, json=body)
            assert answer.status_code == status, answer.text
            media = answer.headers["content-type"].split(";")[0]
            if media == "application/json":
                served.judge(path, "post", status, media, answer.json())
                continue
            events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
            assert media == "text/event-stream" and events
            for event in events:
                if event != "[DONE]":
                    served.judge(path, "post", 200, media, json.loads(event))
        for place, (path, status) in GETS.items():
            answer = await system.client.get(place)
            assert answer.status_code == status
            served.judge(path, "get", status, "application/json", answer.json())

    _run(tmp_path, TOLD, scenario)


def test_the_paths_are_those_that_are_served(tmp_path: Path) -> None:
    async def scenario(system: StubSystem, served: Served) -> None:
        for path, operations in served.document["paths"].items():
            for method in ("get", "post"):
                answer = await system.client.request(method, path.replace("{name}", "tiny-moe"))
                assert (answer.status_code != 405) == (method in operations), (method, path)
                assert answer.status_code != 404 and answer.status_code < 500
        app = build_app(system.gateway, Keys(system.gateway.config.gateway))
        routes = {getattr(route, "path", "").replace("{name:path}", "{name}") for route in app.routes}
        assert routes == set(served.document["paths"])

    _run(tmp_path, "x", scenario)


def test_a_document_is_closed_and_every_component_is_used() -> None:
    document: dict[str, Any] = json.loads(openapi_document(GatewaySection(), CARD))
    components = document["components"]["schemas"]
    used = {part.split('"')[0] for part in json.dumps(document).split('"#/components/schemas/')[1:]}
    assert used == set(components)
    Draft202012Validator.check_schema({"$defs": components})
    operations = [one for path in document["paths"].values() for one in path.values()]
    assert len({one["operationId"] for one in operations}) == len(operations)


def test_the_headers_are_those_that_are_read() -> None:
    document: dict[str, Any] = json.loads(openapi_document(GatewaySection(), CARD))
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"):
        told = {one["name"].lower() for one in document["paths"][path]["post"]["parameters"]}
        assert told == {TIMEOUT_HEADER, KEY_HEADER, SESSION_HEADER}


def test_limits_and_keys_are_the_configuration_s(tmp_path: Path) -> None:
    section = GatewaySection(max_choices=3, max_logprobs=7, serves_pool_report=False, api_keys_file=tmp_path / "keys")
    document: dict[str, Any] = json.loads(openapi_document(section, CARD))
    chat = document["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    assert (chat["n"]["maximum"], chat["top_logprobs"]["maximum"], chat["model"]["enum"]) == (3, 7, [CARD.name])
    assert "/admin/pools" not in document["paths"] and "PoolReport" not in document["components"]["schemas"]
    asked = document["paths"]["/v1/chat/completions"]["post"]
    assert asked["security"] == [{"bearer": []}, {"x-api-key": []}] and {"401", "403"} <= set(asked["responses"])
    live = document["paths"]["/health/live"]["get"]
    assert live["security"] == [{}] and "401" not in live["responses"]


@pytest.mark.parametrize("place", ["components", "paths"])
def test_an_answer_with_a_field_too_many_is_found(place: str) -> None:
    served = Served(json.loads(openapi_document(GatewaySection(), CARD)))
    assert place in served.document
    with pytest.raises(AssertionError, match="mood"):
        served.judge("/detokenize", "post", 200, "application/json", {"prompt": "x", "mood": 1})
