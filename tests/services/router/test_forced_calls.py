"""The grammar of calls that must be made, by the library that keeps it: what it lets through is what markup.py reads."""

from __future__ import annotations

import asyncio
import json

import pytest
from llguidance import LLMatcher, LLTokenizer

from duomo.config_gateway import GatewaySection
from duomo.errors import RequestError
from duomo.grammar.library import check, grammar_of
from services.router.common_fields import CommonReader
from services.router.conversation import FunctionTool, ToolUse
from services.router.forced_calls import forced_calls
from services.router.markup import OutputReader, OutputStyle
from services.router.openai import RequestParser
from services.router.output_parts import CallBlock, blocks_of
from services.router.structured import check_structure
from tests.services.router.stub_replicas import MODEL

CITY = {"$defs": {"city": {"enum": ["Rome", "Oslo"]}}, "properties": {"city": {"$ref": "#/$defs/city"}}, "required": ["city"]}
BAD = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
PARSER = RequestParser(GatewaySection(), CommonReader(GatewaySection(), "tiny-moe", 8192))
WEATHER = FunctionTool("weather", None, CITY | {"additionalProperties": False})
NOW = FunctionTool("now")
HERMES = OutputStyle("hermes")


def _call(name: str = "weather", **arguments: object) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


def _keeps(tool_use: ToolUse, said: str, style: OutputStyle = HERMES) -> bool:
    """Whether `said` may be the whole output."""
    forced = forced_calls(tool_use, style)
    assert forced is not None and forced.field == "tools"
    check(forced.constraint, forced.field)
    tokenizer = LLTokenizer(str(MODEL / "tokenizer.json"))
    matcher = LLMatcher(tokenizer, grammar_of(forced.constraint, "tools"))
    ids = tokenizer.tokenize_str(said)
    num_valid = matcher.validate_tokens(ids)
    matcher.consume_tokens(ids[:num_valid])
    return num_valid == len(ids) and matcher.is_accepting()


def test_nothing_is_forced_where_no_call_must_be_made() -> None:
    assert forced_calls(ToolUse((WEATHER,)), HERMES) is None and forced_calls(ToolUse((WEATHER,), "none"), HERMES) is None


@pytest.mark.parametrize(
    ("said", "is_kept"),
    [
        (_call(city="Rome"), True),
        (_call(city="Rome") + "\n" + _call("now"), True),
        ('<tool_call>\n{"name": "weather", "arguments": {"city":"Oslo"}}\n</tool_call>', True),
        (_call(city="Bonn"), False),
        (_call(), False),
        (_call("other"), False),
        (_call("now", city="Rome"), False),
        ("Let me look." + _call(city="Rome"), False),
        ("", False),
    ],
)
def test_required_calls_are_of_these_functions_and_their_schemas(said: str, is_kept: bool) -> None:
    assert _keeps(ToolUse((WEATHER, NOW), "required"), said) is is_kept
    if is_kept:
        reader = OutputReader(HERMES)
        assert all(isinstance(block, CallBlock) for block in blocks_of(reader.push(said) + reader.finish()))


def test_a_named_function_is_called_once_and_parallel_calls_can_be_off() -> None:
    named = ToolUse((WEATHER, NOW), "named", "now")
    assert _keeps(named, _call("now")) and not _keeps(named, _call(city="Rome")) and not _keeps(named, _call("now") + "\n" + _call("now"))
    alone = ToolUse((WEATHER, NOW), "required", is_parallel=False)
    assert _keeps(alone, _call("now")) and not _keeps(alone, _call("now") + "\n" + _call("now"))


def test_a_model_may_think_first_and_ends_what_it_has_begun() -> None:
    required = ToolUse((NOW,), "required")
    outside, inside = OutputStyle("hermes", "outside"), OutputStyle("hermes", "inside")
    thought = "\nhm, 1 < 2\n</think>\n\n" + _call("now")
    assert _keeps(required, "<think>" + thought, outside) and _keeps(required, _call("now"), outside)
    assert _keeps(required, thought, inside) and not _keeps(required, _call("now"), inside)
    assert not _keeps(required, "<think>" + thought)


def test_a_schema_that_cannot_be_kept_is_refused_by_its_place_and_a_format_that_says_nothing_is_none() -> None:
    tools = [{"type": "function", "function": {"name": "now"}}, {"type": "function", "function": {"name": "f", "parameters": BAD}}]
    body = {"model": "tiny-moe", "messages": [{"role": "user", "content": "hi"}], "tools": tools, "tool_choice": "required"}
    forced = forced_calls(PARSER.chat(json.dumps(body).encode()).conversation.tool_use, HERMES)
    with pytest.raises(RequestError, match="uniqueItems") as refusal:
        asyncio.run(check_structure(forced))
    assert refusal.value.param == "tools[1].function.parameters"
    secret = FunctionTool("weather", None, {"properties": {"city": {"type": "string", "format": "password"}}, "required": ["city"]})
    assert _keeps(ToolUse((secret,), "required"), _call(city="Rome"))
