"""Structured output's fields, as one Constraint: response_format, vLLM's structured_outputs and guided_*; and logit_bias. Knows no token.

What cannot be kept is refused by the name of the field that says it. A constraint is compiled, in a thread, to see that it can be; the
replicas compile it again with their model's tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import msgspec

from duomo.errors import CapacityError, RequestError
from duomo.grammar.library import check
from duomo.wire.values import Constraint
from services.router.fields import Fields, wrong_type

MAX_BIASES: Final = 1024
CHECK_LIMIT_S: Final = 5.0
_BIAS_BOUND: Final = 100.0
_MERE_NOTES: Final = ("binary", "password", "path", "file-path", "directory-path")
_VALUES: Final = ("const", "enum", "default", "examples")  # of these what they hold is no schema
_NAMED: Final = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_ANY_OBJECT: Final = '{"type":"object"}'


@dataclass(frozen=True, slots=True)
class Structure:
    """What the answer must be, and the field that says so. parts: what it is made of, where several fields say it, each with its own."""

    constraint: Constraint
    field: str
    parts: tuple[Structure, ...] = ()


def read_structure(fields: Fields) -> Structure | None:
    """The one constraint that a request names, None where it names none. Raises RequestError also where it names two."""
    found = [*_response_format(fields), *_structured_outputs(fields), *_guided(fields, "guided_")]
    if len(found) > 1:
        first, second = found[0].field, found[1].field
        raise RequestError(f"'{first}' and '{second}' both say what the answer must be; give one.", param=second)
    return found[0] if found else None


async def check_structure(structure: Structure | None) -> None:
    """Raises RequestError naming the field where the constraint cannot be kept, CapacityError where that took too long to see."""
    if structure is None:
        return
    try:
        await asyncio.wait_for(asyncio.to_thread(_check_all, structure), CHECK_LIMIT_S)
    except TimeoutError as error:
        detail = f"'{structure.field}' could not be compiled within {CHECK_LIMIT_S:g} s."
        raise CapacityError(detail, code="constraint_timeout", phase="gateway") from error


def read_logit_bias(fields: Fields, vocab_size: int) -> tuple[tuple[int, float], ...]:
    """(token id, what is added to its logit), by id; zeros are left out."""
    raw = fields.mapping("logit_bias")
    if raw is None:
        return ()
    if len(raw) > MAX_BIASES:
        raise RequestError(f"'logit_bias' names {len(raw)} tokens, the limit is {MAX_BIASES}.", param="logit_bias")
    biases = {_token_id(name, vocab_size): _bias(name, value) for name, value in raw.items()}
    return tuple(sorted((token_id, bias) for token_id, bias in biases.items() if bias))


def _check_all(structure: Structure) -> None:
    try:
        _checked(structure.constraint, structure.field)
    except RequestError:
        for part in structure.parts:  # which of them it is
            _checked(part.constraint, part.field)
        raise


@lru_cache(maxsize=256)
def _checked(constraint: Constraint, field: str) -> None:
    check(constraint, field)


def _response_format(fields: Fields) -> list[Structure]:
    raw = fields.mapping("response_format")
    if raw is None:
        return []
    inner = Fields(raw, "response_format.")
    kind = inner.string("type")
    schema = inner.mapping("json_schema")
    inner.finish()
    match kind:
        case None:
            raise RequestError("You must provide 'response_format.type'.", param="response_format.type", code="missing_required_parameter")
        case "text":
            return []
        case "json_object":
            return [Structure(Constraint(kind="json_schema", text=_ANY_OBJECT), "response_format")]
        case "json_schema":
            return [_named_schema(schema)]
        case _:
            detail = f"'response_format.type' must be text, json_object or json_schema, got '{kind}'."
            raise RequestError(detail, param="response_format.type")


def _named_schema(raw: dict[str, object] | None) -> Structure:
    path = "response_format.json_schema"
    if raw is None:
        raise RequestError(f"You must provide '{path}'.", param=path, code="missing_required_parameter")
    inner = Fields(raw, f"{path}.")
    inner.ignore("name", "description", "strict")  # every schema is kept strictly
    return schema_structure(inner)


def json_schema(schema: Mapping[str, object]) -> Constraint:
    """Answers of this schema."""
    return Constraint(kind="json_schema", text=schema_text(schema))


def schema_text(schema: Mapping[str, object]) -> str:
    """As it is compiled: without formats that say nothing of a text (OpenAPI's, pydantic's), which would be refused as unknown ones."""
    text = msgspec.json.encode(schema)
    if b'"format"' not in text:
        return text.decode()
    whole: object = msgspec.json.decode(text)
    stack = [(whole, False)]
    while stack:
        value, is_named = stack.pop()  # is_named: schemas under names of the client's own
        if isinstance(value, list):
            stack += [(inner, False) for inner in value]
        elif isinstance(value, dict) and is_named:
            stack += [(inner, False) for inner in value.values()]
        elif isinstance(value, dict):
            if value.get("format") in _MERE_NOTES:
                del value["format"]
            stack += [(inner, name in _NAMED) for name, inner in value.items() if name not in _VALUES]
    return msgspec.json.encode(whole).decode()


def schema_structure(fields: Fields) -> Structure:
    """Of the `schema` that stands in an object of its own, in which nothing else is left."""
    name, schema = fields.name("schema"), fields.mapping("schema")
    fields.finish()
    if schema is None:
        raise RequestError(f"You must provide '{name}'.", param=name, code="missing_required_parameter")
    return Structure(json_schema(schema), name)


def _structured_outputs(fields: Fields) -> list[Structure]:
    raw = fields.mapping("structured_outputs")
    if raw is None:
        return []
    inner = Fields(raw, "structured_outputs.")
    found = _guided(inner, "")
    if inner.boolean("json_object"):
        found.append(Structure(Constraint(kind="json_schema", text=_ANY_OBJECT), "structured_outputs.json_object"))
    inner.finish()
    return found


def _guided(fields: Fields, prefix: str) -> list[Structure]:
    """vLLM's four ways, whatever their names begin with."""
    readers: dict[str, Callable[[str, object], Constraint]] = {"json": _json, "regex": _regex, "choice": _choice, "grammar": _grammar}
    found = []
    for kind, reader in readers.items():
        value = fields.take(prefix + kind)
        if value is not None:
            name = fields.name(prefix + kind)
            found.append(Structure(reader(name, value), name))
    return found


def _json(name: str, value: object) -> Constraint:
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except (msgspec.DecodeError, RecursionError) as error:
            raise RequestError(f"'{name}' is not valid JSON: {error}.", param=name, code="invalid_json") from error
    if not isinstance(value, dict):
        raise wrong_type(name, "a JSON schema (an object, or one as a string)", value)
    return json_schema(value)


def _regex(name: str, value: object) -> Constraint:
    return Constraint(kind="regex", text=_text(name, value))


def _grammar(name: str, value: object) -> Constraint:
    return Constraint(kind="grammar", text=_text(name, value))


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise wrong_type(name, "a string", value)
    if not value:
        raise RequestError(f"'{name}' must not be empty.", param=name)
    return value


def _choice(name: str, value: object) -> Constraint:
    if not isinstance(value, list):
        raise wrong_type(name, "an array of strings", value)
    for idx, item in enumerate(value):
        if not isinstance(item, str):
            raise wrong_type(f"{name}[{idx}]", "a string", item)
        if not item:
            raise RequestError(f"'{name}[{idx}]' must not be empty.", param=f"{name}[{idx}]")
    if not value:
        raise RequestError(f"'{name}' must hold at least one string.", param=name)
    return Constraint(kind="choice", text=msgspec.json.encode(value).decode())


def _token_id(name: str, vocab_size: int) -> int:
    if not (name.isascii() and name.isdigit()) or len(name) > 9 or int(name) >= vocab_size:
        detail = f"'logit_bias' names '{name[:20]}'; its names are token ids, from 0 to {vocab_size - 1}."
        raise RequestError(detail, param="logit_bias")
    return int(name)


def _bias(name: str, value: object) -> float:
    if type(value) is not int and type(value) is not float:
        raise wrong_type(f"logit_bias.{name}", "a number", value)
    if not -_BIAS_BOUND <= value <= _BIAS_BOUND:
        raise RequestError(f"'logit_bias.{name}' must be between -100 and 100, got {value}.", param="logit_bias")
    return float(value)
