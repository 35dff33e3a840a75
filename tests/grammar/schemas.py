"""Bounded random JSON schemas: every value that one allows is short. Knows no server."""

from __future__ import annotations

import random
from collections.abc import Callable

Schema = dict[str, object]
WORDS = ("name", "age", "kind", "town", "size", "colour", "friend", "score", "notes", "is_old", "größe", "x y")
_ENUMS: tuple[list[object], ...] = (["red", "green", "blue"], [1, 2, 3], ["yes", "no", None], [True, "maybe"])
_PATTERNS = ("^[A-Z][a-z]{1,8}$", "^[0-9]{3}-[0-9]{2}$", "^(cat|dog)s?$")
_FORMATS = ("date", "time", "uuid", "ipv4")


def random_schema(seed: int) -> Schema:
    """An object of one to four properties, of any of the kinds below, at most three deep."""
    return _object(random.Random(seed), 3)


def _any(rng: random.Random, depth: int) -> Schema:
    kinds: list[Callable[[random.Random, int], Schema]] = [_string, _integer, _number, _boolean, _null, _enum, _const, _pattern, _format]
    if depth > 1:
        kinds += [_object, _array, _any_of] * 2
    return rng.choice(kinds)(rng, depth - 1)


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(WORDS, rng.randint(1, 4))
    required = [name for name in names if rng.random() < 0.7]
    properties = {name: _any(rng, depth) for name in names}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _array(rng: random.Random, depth: int) -> Schema:
    low = rng.randint(0, 2)
    return {"type": "array", "items": _any(rng, depth), "minItems": low, "maxItems": low + rng.randint(0, 2)}


def _any_of(rng: random.Random, depth: int) -> Schema:
    return {"anyOf": [_any(rng, depth) for _ in range(rng.randint(1, 3))]}


def _string(rng: random.Random, depth: int) -> Schema:
    low = rng.randint(0, 4)
    return {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 16)}


def _integer(rng: random.Random, depth: int) -> Schema:
    low = rng.randint(-1000, 1000)
    return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 5000)}


def _number(rng: random.Random, depth: int) -> Schema:
    low = rng.randint(0, 50)
    return {"type": "number", "minimum": low, "maximum": low + rng.randint(1, 100), "multipleOf": 0.5}  # else its digits have no end


def _boolean(rng: random.Random, depth: int) -> Schema:
    return {"type": "boolean"}


def _null(rng: random.Random, depth: int) -> Schema:
    return {"type": "null"}


def _enum(rng: random.Random, depth: int) -> Schema:
    return {"enum": rng.choice(_ENUMS)}


def _const(rng: random.Random, depth: int) -> Schema:
    return {"const": rng.choice(['é "q"', 7, {"a": [1]}, None])}


def _pattern(rng: random.Random, depth: int) -> Schema:
    return {"type": "string", "pattern": rng.choice(_PATTERNS)}


def _format(rng: random.Random, depth: int) -> Schema:
    return {"type": "string", "format": rng.choice(_FORMATS)}
