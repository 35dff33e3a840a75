"""Structured output's fields: each of its spellings as the one constraint that it means, and logit_bias."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path

import pytest

from duomo.config_gateway import GatewaySection
from duomo.errors import CapacityError, RequestError
from duomo.wire.messages import StartDecode, StartPrefill
from duomo.wire.values import Constraint, Sampling
from services.router import structured
from services.router.common_fields import CommonFields, CommonReader
from services.router.fields import Fields
from services.router.openai import RequestParser
from services.router.structured import Structure, check_structure, read_logit_bias, read_structure
from tests.services.router.stub_system import stub_system

SCHEMA = {"type": "object", "properties": {"größe": {"type": "integer"}}, "required": ["größe"]}
PARSER = RequestParser(GatewaySection(), CommonReader(GatewaySection(), "tiny-moe", 8192))


def chat(**fields: object) -> CommonFields:
    return PARSER.chat(json.dumps({"model": "tiny-moe", "messages": [{"role": "user", "content": "hi"}], **fields}).encode()).common


def text(**fields: object) -> CommonFields:
    return PARSER.completion(json.dumps({"model": "tiny-moe", "prompt": "hi", **fields}).encode()).common


@pytest.mark.parametrize(
    ("fields", "kind", "value", "named"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema", {"type": "object"}, "response_format"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "strict": True, "description": "d", "schema": SCHEMA},
                }
            },
            "json_schema",
            SCHEMA,
            "response_format.json_schema.schema",
        ),
        ({"guided_json": SCHEMA}, "json_schema", SCHEMA, "guided_json"),
        ({"guided_json": json.dumps(SCHEMA)}, "json_schema", SCHEMA, "guided_json"),
        ({"guided_choice": ["yes", "nö"]}, "choice", ["yes", "nö"], "guided_choice"),
        ({"guided_regex": "[ab]+"}, "regex", "[ab]+", "guided_regex"),
        ({"guided_grammar": 'start: "a"'}, "grammar", 'start: "a"', "guided_grammar"),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", SCHEMA, "structured_outputs.json"),
        ({"structured_outputs": {"json_object": True}}, "json_schema", {"type": "object"}, "structured_outputs.json_object"),
        ({"structured_outputs": {"choice": ["a"]}}, "choice", ["a"], "structured_outputs.choice"),
        ({"structured_outputs": {"regex": "a"}}, "regex", "a", "structured_outputs.regex"),
        ({"structured_outputs": {"grammar": "g"}}, "grammar", "g", "structured_outputs.grammar"),
    ],
)
def test_every_spelling_is_the_constraint_that_it_means(fields: dict[str, object], kind: str, value: object, named: str) -> None:
    for common in (chat(**fields), text(**fields)):
        assert common.structure is not None and common.structure.field == named
        constraint = common.structure.constraint
        assert common.sampling.constraint == constraint and constraint.kind == kind
        assert (constraint.text if isinstance(value, str) else json.loads(constraint.text)) == value


@pytest.mark.parametrize(
    "off", [{}, {"response_format": {"type": "text"}}, {"guided_json": None}, {"structured_outputs": {"json_object": False}}]
)
def test_what_names_none_is_none(off: dict[str, object]) -> None:
    assert chat(**off).structure is None and chat(**off).sampling.constraint is None


def test_formats_that_say_nothing_of_a_text_are_left_out_and_values_are_left_alone() -> None:
    said = {"const": {"format": "binary"}, "enum": [{"format": "path"}]}
    named = {"default": {"type": "string", "format": "binary"}, "properties": {"enum": ["x"], "format": "path"}}
    schema = {"properties": {"format": {"type": "string", "format": "password"}, "b": {"items": [{"format": "binary"}, said]}, **named}}
    left = {"default": {"type": "string"}, "properties": {"enum": ["x"]}}
    kept = {"properties": {"format": {"type": "string"}, "b": {"items": [{}, said]}, **left}}
    structure = chat(guided_json=schema).structure
    assert structure is not None and json.loads(structure.constraint.text) == kept
    unknown = chat(guided_json={"type": "string", "format": "iri"}).structure
    with pytest.raises(RequestError, match="iri"):
        asyncio.run(check_structure(unknown))


def test_a_schemas_properties_keep_their_order() -> None:
    ordered = {"type": "object", "properties": {name: {"type": "null"} for name in ("z", "a", "m")}}
    structure = chat(guided_json=ordered).structure
    assert structure is not None and list(json.loads(structure.constraint.text)["properties"]) == ["z", "a", "m"]


def test_a_bias_is_by_token_and_zeros_are_none() -> None:
    for common in (chat(logit_bias={"7": -100, "5": 2.5, "9": 0}), text(logit_bias={"7": -100, "5": 2.5, "9": 0.0})):
        assert common.sampling.logit_bias == ((5, 2.5), (7, -100.0))
    assert chat(logit_bias={}, seed=1).sampling == chat(logit_bias=None, seed=1).sampling
    assert read_logit_bias(Fields({"logit_bias": {"8191": 1}}), 8192) == ((8191, 1.0),)


def test_a_constraint_that_cannot_be_kept_is_refused_by_the_field() -> None:
    found = read_structure(Fields({"guided_regex": "(a"}))
    with pytest.raises(RequestError, match="'guided_regex' is no regex") as refusal:
        asyncio.run(check_structure(found))
    assert refusal.value.param == "guided_regex"
    asyncio.run(check_structure(read_structure(Fields({"guided_regex": "(a)"}))))
    asyncio.run(check_structure(None))


def test_a_check_that_takes_too_long_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(structured, "CHECK_LIMIT_S", 0.02)
    monkeypatch.setattr(structured, "_checked", lambda constraint, field: go_on.wait(30))

    async def main() -> None:
        try:
            with pytest.raises(CapacityError) as refusal:
                await check_structure(Structure(Constraint(kind="regex", text="a"), "guided_regex"))
            assert refusal.value.code == "constraint_timeout"
        finally:
            go_on.set()

    asyncio.run(main())


def test_nothing_of_it_costs_a_request_that_asks_for_none() -> None:
    assert chat(seed=1).sampling == Sampling(max_tokens=1, seed=1)


def test_what_is_asked_reaches_both_replicas(tmp_path: Path) -> None:
    body = {"model": "tiny-moe", "prompt": "hi", "max_tokens": 4, "guided_regex": "[ab]+", "logit_bias": {"5": 2}}

    async def scenario() -> None:
        async with stub_system(tmp_path) as system:
            assert (await system.client.post("/v1/completions", json=body)).status_code == 200
            (start,) = system.pools.of_role("prefill")[0].of_type(StartPrefill)
            (expected,) = system.pools.of_role("decode")[0].of_type(StartDecode)
            assert start.sampling == expected.sampling
            assert start.sampling.constraint == Constraint(kind="regex", text="[ab]+") and start.sampling.logit_bias == ((5, 2.0),)
            await system.until(lambda: not system.gateway.num_live_legs)
            system.check_nothing_is_held()

    asyncio.run(scenario())
