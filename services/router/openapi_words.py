"""PURE: the words in which openapi*.py say what a JSON value is, as JSON Schema 2020-12. Knows no endpoint.

A field of a body that may be left out may be null too, which is the same: taken() says so of each. Bodies name every field that is
read and allow no other; objects of answers may come to have more fields.
"""

from __future__ import annotations

from collections.abc import Mapping

Schema = dict[str, object]


def ref(name: str) -> Schema:
    """The component of this name."""
    return {"$ref": f"#/components/schemas/{name}"}


def integer(low: int | None = None, high: int | None = None, about: str = "") -> Schema:
    return _told({"type": "integer", **_bounds(low, high)}, about)


def number(low: float | None = None, high: float | None = None, about: str = "", *, low_is_open: bool = False) -> Schema:
    bounds = _bounds(low, high)
    if low_is_open:
        bounds["exclusiveMinimum"] = bounds.pop("minimum")
    return _told({"type": "number", **bounds}, about)


def text(about: str = "", **more: object) -> Schema:
    """more: JSON Schema's own words, as minLength."""
    return _told({"type": "string", **more}, about)


def boolean(about: str = "") -> Schema:
    return _told({"type": "boolean"}, about)


def words(*values: str, about: str = "") -> Schema:
    """One of these strings."""
    return _told({"type": "string", "enum": list(values)}, about)


def array(items: Schema, at_least: int = 0, at_most: int | None = None, about: str = "") -> Schema:
    fewest: Schema = {"minItems": at_least} if at_least else {}
    most: Schema = {} if at_most is None else {"maxItems": at_most}
    return _told({"type": "array", "items": items, **fewest, **most}, about)


def free(about: str = "") -> Schema:
    """An object with whatever names."""
    return _told({"type": "object", "additionalProperties": True}, about)


def anything(about: str) -> Schema:
    return {"description": about}


def off(*values: object) -> Schema:
    """What this server does not do: the values that mean so."""
    return {"enum": [*values, None], "description": "Not supported: only a value that turns it off is taken."}


def nothing(about: str) -> Schema:
    return {"type": "null", "description": about}


def either(*schemas: Schema, about: str = "") -> Schema:
    return _told({"anyOf": list(schemas)}, about)


def nullable(schema: Schema) -> Schema:
    """Or null."""
    if "enum" in schema:
        values = schema["enum"]
        assert isinstance(values, list)
        schema = schema | {"enum": values if None in values else [*values, None]}
    kind = schema.get("type")
    if isinstance(kind, str):
        return schema if kind == "null" else schema | {"type": [kind, "null"]}
    if "anyOf" in schema:
        choices = schema["anyOf"]
        assert isinstance(choices, list)
        return schema if {"type": "null"} in choices else schema | {"anyOf": [*choices, {"type": "null"}]}
    return {"anyOf": [schema, {"type": "null"}]} if "$ref" in schema else schema


def taken(required: Mapping[str, Schema], optional: Mapping[str, Schema], about: str = "") -> Schema:
    """An object of a body: these fields and no others."""
    properties = {**required, **{name: nullable(schema) for name, schema in optional.items()}}
    closed: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return _told(closed | ({"required": list(required)} if required else {}), about)


def given(always: Mapping[str, Schema], sometimes: Mapping[str, Schema] | None = None, about: str = "") -> Schema:
    """An object of an answer. always: what is in each."""
    return _told({"type": "object", "properties": {**always, **(sometimes or {})}, "required": list(always)}, about)


def _bounds(low: float | None, high: float | None) -> Schema:
    bounds = {"minimum": low, "maximum": high}
    return {name: bound for name, bound in bounds.items() if bound is not None}


def _told(schema: Schema, about: str) -> Schema:
    return schema | {"description": about} if about else schema
