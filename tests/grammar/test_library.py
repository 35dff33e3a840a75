"""Constraints as grammars: what compiles, and what is refused in words that name it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from duomo.errors import RequestError
from duomo.grammar.library import BAD_CONSTRAINT, MAX_CHARS, UNSUPPORTED, GrammarTokens, check, tokens_of
from duomo.wire.values import Constraint
from tests.grammar.schemas import random_schema

TOKENIZER = Path(__file__).resolve().parents[2] / "models" / "tiny-moe" / "tokenizer.json"


def schema(value: object) -> Constraint:
    return Constraint(kind="json_schema", text=json.dumps(value))


def chained_schema(num: int, link: dict[str, object]) -> Constraint:
    """Definitions of which each refers to the next, from within `link`."""
    written = json.dumps(link)
    defs = {f"d{at}": json.loads(written.replace('"$ref": ""', f'"$ref": "#/$defs/d{at + 1}"')) for at in range(num)}
    return schema({"$ref": "#/$defs/d0", "$defs": {**defs, f"d{num}": {"type": "null"}}})


def chained_rules(num: int) -> Constraint:
    rules = [f'r{at}: "a" r{at + 1}' for at in range(num)]
    return Constraint(kind="grammar", text="\n".join(["start: r0", *rules, f'r{num}: "b"']))


def test_what_can_be_kept_passes() -> None:
    for constraint in (
        Constraint(kind="regex", text=r"^(\+49|0)[1-9]\d{2,11}$"),
        Constraint(kind="regex", text="größe/[a-z]*"),
        Constraint(kind="choice", text=json.dumps(["yes", 'no "q"\n', "😀é"])),
        Constraint(kind="grammar", text='root ::= "a" | "b" [0-9]+'),
        Constraint(kind="grammar", text='start: "a" | "b" /[0-9]+/'),
        schema({"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "properties": {"next": {"$ref": "#/$defs/n"}}}}}),
        *(schema(random_schema(seed)) for seed in range(50)),
        chained_schema(300, {"items": {"$ref": ""}}),
        chained_rules(490),
    ):
        check(constraint, "field")


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        (schema({"type": "object", "not": {}}), r'Unimplemented keys: \["not"\]'),
        (schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (schema({"type": "object", "not": {}, "x-guidance": {"lenient": True}}), "not"),
        (schema({"type": "foo"}), "Invalid type: foo"),
        (schema({"type": "string", "format": "colour"}), "Unknown format: colour"),
        (schema({"$ref": "http://127.0.0.1:1/schema"}), "does not fetch resources"),
        (schema({"oneOf": [{"type": "number"}, {"type": "integer"}]}), "oneOf"),
        (schema({"type": "integer", "minimum": 5, "maximum": 3}), "greater than maximum"),
        (schema(True), "json schema"),
        (Constraint(kind="json_schema", text="{"), "EOF"),
        (Constraint(kind="regex", text="(a"), "unclosed group"),
        (Constraint(kind="regex", text="a(?=b)"), "look-around"),
        (Constraint(kind="regex", text=r"(a)\1"), "backreferences"),
        (Constraint(kind="regex", text="a" * (MAX_CHARS + 1)), "at most"),
        (Constraint(kind="choice", text="[]"), "at least one string"),
        (Constraint(kind="choice", text='["a", ""]'), "none of them empty"),
        (Constraint(kind="choice", text="yes"), "choice"),
        (Constraint(kind="grammar", text="start: missing"), "missing"),
        (Constraint(kind="grammar", text="((("), "grammar"),
        (chained_schema(3000, {"$ref": ""}), "3004 levels deep"),
        (chained_schema(200, {"items": {"items": {"items": {"items": {"items": {"$ref": ""}}}}}}), "levels deep"),
        (chained_rules(3000), "levels deep"),
        (Constraint(kind="grammar", text='start: "a" %json ' + chained_schema(3000, {"$ref": ""}).text), "levels deep"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_the_fields_name(constraint: Constraint, words: str) -> None:
    with pytest.raises(RequestError, match=words) as refusal:
        check(constraint, "the.field")
    assert refusal.value.param == "the.field" and "'the.field'" in refusal.value.detail
    assert refusal.value.code == BAD_CONSTRAINT and refusal.value.status == 400


def test_compiling_refuses_what_the_check_refuses() -> None:
    tokens = tokens_of(TOKENIZER, 8192, (2,))
    with pytest.raises(RequestError, match="unclosed group"):
        tokens.matcher(Constraint(kind="regex", text="(a"))


def test_a_model_without_what_it_takes_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="tokenizer.json") as refusal:
        GrammarTokens(tmp_path / "tokenizer.json", 8192, (2,))
    assert refusal.value.code == UNSUPPORTED
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(RequestError, match="cannot be used"):
        GrammarTokens(tmp_path / "tokenizer.json", 8192, (2,))
    with pytest.raises(RequestError, match="eos_token_id"):
        GrammarTokens(TOKENIZER, 8192, ())


def test_the_tokenizer_is_read_once_a_process() -> None:
    assert tokens_of(TOKENIZER, 8192, (2,)) is tokens_of(TOKENIZER, 8192, (2,))
