"""How deep a constraint may lead its compiler: counted from its text, before anything follows it."""

from __future__ import annotations

import json

import pytest

from duomo.grammar.depth import grammar_levels, schema_levels


@pytest.mark.parametrize(
    ("schema", "levels"),
    [
        ({}, 1),
        ({"type": "array", "items": {"type": "array", "items": {}}}, 3),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"items": {}}}}, 4 + 2),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"items": {"$ref": "#/$defs/a"}}}}, 4 + 2),
        ({"$ref": "#/a~1b/1", "a/b": [{}, {"items": {}}]}, 4 + 2),
        ({"$ref": "#/%24defs/a", "$defs": {"a": {}}}, 3 + 1),
        ({"$ref": "elsewhere", "items": {"items": {}}}, 3 + 3),
        ({"$ref": "#/items/" + "9" * 9000, "items": [{}]}, 3 + 3),
    ],
)
def test_a_schema_is_as_deep_as_it_nests_and_once_more_for_each_place_named(schema: object, levels: int) -> None:
    assert schema_levels(json.dumps(schema)) == levels


def test_a_number_of_any_length_hides_nothing() -> None:
    assert schema_levels('{"maximum": ' + "9" * 9000 + ', "items": {}}') == 2


@pytest.mark.parametrize("text", ["{", "[" * 100_000, ""])
def test_what_its_compiler_cannot_read_has_no_levels(text: str) -> None:
    assert schema_levels(text) == 0


def test_lines_groups_and_schemas_of_a_grammar_count() -> None:
    assert grammar_levels('start: a\na: "x"') == 2
    assert grammar_levels('start: (("a") ["b"])\r\n') == 3 + 1 + 1
    schema = {"$ref": "#/$defs/a", "$defs": {"a": {"items": {}}}}
    hidden = json.dumps(schema).replace("$ref", "\\u0024ref")
    assert grammar_levels(f"start: %json {hidden}") == 1 + 4 + 4 + 2
    assert grammar_levels('start: "%json {"') == 1 + 1
