"""PURE: how deep a schema or a grammar may lead the library that compiles it. Knows no library and no token.

llguidance follows rules and references by recursion on its thread's stack, and a stack that is spent ends the process: no error is raised.
So what might lead too deep is refused before it sees it. These are upper bounds, told by the text alone: each rule, and each place that is
referred to, may be followed once from within all others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Final
from urllib.parse import unquote

# On a thread's usual 8 MiB chains of 2,000 levels were seen to end the process, whatever they were made of.
MAX_LEVELS: Final = 1000
_JSON_MARK: Final = re.compile(r"%json\s*")
_DECODER: Final = json.JSONDecoder(parse_int=lambda _: 0)  # Python refuses numbers of many digits, which a schema may hold
_BRACKET: Final = re.compile(r"[(\[{]|[)\]}]")


def schema_levels(text: str) -> int:
    """Of a JSON schema as text; 0 where it is no JSON, which its compiler says better."""
    try:
        return _levels(_DECODER.decode(text))
    except (ValueError, RecursionError):
        return 0


def grammar_levels(text: str) -> int:
    """Of a grammar in Lark's form or in GBNF: each line may be a rule, and hold groups within groups; a schema in it counts as one."""
    return sum(1 + _most_open(line) for line in re.split(r"[\r\n]", text)) + sum(_levels(schema) for schema in _schemas(text))


def _schemas(text: str) -> Iterator[object]:
    for mark in _JSON_MARK.finditer(text):
        try:
            yield _DECODER.raw_decode(text, mark.end())[0]
        except (ValueError, RecursionError):
            continue


def _levels(schema: object) -> int:
    """Containers around containers from the root, and again from each place that a `$ref` names; the root's where a name says no place."""
    levels, names = _depths(schema)
    whole = levels.get(id(schema), 0)
    return whole + sum(levels.get(id(_place(schema, name)), whole) for name in names)


def _depths(root: object) -> tuple[dict[int, int], set[str]]:
    """How deep each container is, by its id, and what is referred to. Without recursion."""
    levels: dict[int, int] = {}
    names: set[str] = set()
    stack = [(root, False)]
    while stack:
        value, is_seen = stack.pop()
        if not isinstance(value, dict | list):
            continue
        inner = list(value.values()) if isinstance(value, dict) else value
        if is_seen:
            levels[id(value)] = 1 + max((levels.get(id(one), 0) for one in inner), default=0)
            continue
        if isinstance(value, dict) and isinstance(name := value.get("$ref"), str):
            names.add(name)
        stack.append((value, True))
        stack.extend((one, False) for one in inner)
    return levels, names


def _place(root: object, name: str) -> object:
    """What a JSON pointer in a `$ref` names; None where it is none."""
    place = root
    for step in unquote(name.removeprefix("#")).split("/")[1:]:
        key = step.replace("~1", "/").replace("~0", "~")
        if isinstance(place, dict):
            place = place.get(key)
        elif isinstance(place, list) and key.isascii() and key.isdigit() and len(key) < 8 and int(key) < len(place):
            place = place[int(key)]
        else:
            return None
    return place if name.startswith("#") else None


def _most_open(line: str) -> int:
    """Brackets that are open at once, those in strings too."""
    num_open = most = 0
    for bracket in _BRACKET.finditer(line):
        num_open += 1 if bracket[0] in "([{" else -1
        most = max(most, num_open)
    return most
