"""What the parsers read of bodies, and what the OpenAPI document says of them, as the same thing: places with their types and bounds."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from jsonschema import Draft202012Validator

from duomo.config import ModelSection
from duomo.config_gateway import GatewaySection
from services.router.common_fields import CommonReader
from services.router.fields import Fields
from services.router.message_requests import MessageParser
from services.router.model_card import read_model_card
from services.router.openai import RequestParser
from services.router.openapi import openapi_document
from services.router.response_requests import ResponseParser
from services.router.text import ModelText
from services.router.tokenizing import Tokenizing
from tests.services.router.stub_replicas import MODEL

TEMPLATE = Path(__file__).parents[3] / "deploy" / "chat_templates" / "chatml_tools.jinja"
SECTION = GatewaySection(chat_template=TEMPLATE)
CARD = read_model_card(ModelSection(path=MODEL))
READER = CommonReader(SECTION, CARD.name, CARD.vocab_size)
PARSER = RequestParser(SECTION, READER)


@functools.cache
def model_text() -> ModelText:
    return ModelText.of(ModelSection(path=MODEL), CARD.vocab_size, SECTION)


def _tokenizing() -> Tokenizing:
    return Tokenizing(PARSER, CARD, model_text())


def _at_once(work: Coroutine[None, None, bytes]) -> object:
    """To its end: it awaits nothing for a short text."""
    try:
        work.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it waits")


PARSERS: dict[str, Callable[[bytes], object]] = {
    "/v1/chat/completions": PARSER.chat,
    "/v1/completions": PARSER.completion,
    "/v1/responses": ResponseParser(READER).response,
    "/v1/messages": MessageParser(READER).message,
    "/v1/messages/count_tokens": MessageParser(READER).count,
    "/tokenize": lambda body: _at_once(_tokenizing().tokenize(body)),
    "/detokenize": lambda body: _at_once(_tokenizing().detokenize(body)),
}


@functools.cache
def document() -> dict[str, Any]:
    read: dict[str, Any] = json.loads(openapi_document(SECTION, CARD))
    return read


def body_schema(path: str) -> dict[str, Any]:
    """With the components that it points to."""
    schema = document()["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return {**schema, "components": document()["components"]}


@functools.cache
def validator(path: str) -> Draft202012Validator:
    return Draft202012Validator(body_schema(path))


@dataclass(frozen=True)
class Reading:
    """How a parser reads one field. values: the harmless ones of a field that is off."""

    kind: str
    bounds: tuple[tuple[str, float], ...] = ()
    values: tuple[str, ...] = ()


@contextmanager
def recorded() -> Iterator[dict[str, Reading]]:
    """Every field that is read meanwhile, by its place: messages[].content[].text. A raw look at a field counts least."""
    seen: dict[str, Reading] = {}

    def note(fields: Fields, field: str, reading: Reading) -> None:
        place = re.sub(r"\[\d+\]", "[]", fields.name(field))
        if reading.kind != "take" or place not in seen:
            seen[place] = reading

    def wrapped(kind: str) -> Callable[..., object]:
        original = getattr(Fields, kind)

        def read(self: Fields, field: str, **options: Any) -> object:
            value = original(self, field, **options)
            open_low = options.pop("low_is_open", False)
            names = {"low": "exclusiveMinimum" if open_low else "minimum", "high": "maximum"}
            bounds = tuple(sorted((names[name], bound) for name, bound in options.items() if name in names))
            note(self, field, Reading(kind, bounds))
            return value

        return read

    original_ignore, original_refuse = Fields.ignore, Fields.refuse_unless

    def ignore(self: Fields, *fields: str) -> None:
        for field in fields:
            note(self, field, Reading("ignore"))
        original_ignore(self, *fields)

    def refuse_unless(self: Fields, harmless: dict[str, tuple[object, ...]]) -> None:
        original_refuse(self, harmless)
        for field, values in harmless.items():
            note(self, field, Reading("off", values=tuple(sorted(json.dumps(value) for value in (*values, None)))))

    readers = {kind: wrapped(kind) for kind in ("integer", "number", "boolean", "string", "array", "mapping", "take")}
    with patch.multiple(Fields, **readers, ignore=ignore, refuse_unless=refuse_unless):
        yield seen


def documented(path: str) -> dict[str, list[dict[str, Any]]]:
    """Every field of the body's schema by its place, with all that is said of it there."""
    found: dict[str, list[dict[str, Any]]] = {}
    _walk(body_schema(path), "", found)
    return found


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        schema = document()["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
    return schema


def _walk(schema: dict[str, Any], place: str, found: dict[str, list[dict[str, Any]]]) -> None:
    schema = resolved(schema)
    for one in schema.get("anyOf", ()):
        _walk(one, place, found)
    if "items" in schema:
        _walk(schema["items"], place + "[]", found)
    if schema.get("additionalProperties") is False:
        for name, below in schema["properties"].items():
            inner = f"{place}.{name}".lstrip(".")
            found.setdefault(inner, []).append(below)
            _walk(below, inner, found)
