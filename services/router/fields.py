"""Strict reading of a JSON object's fields: types, ranges and unknown names. Knows no endpoint.

Every refusal is a RequestError naming the field. A bool is never an int, an int is a float, null is "not given".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from duomo.errors import RequestError

_JSON_NAMES: Final = {
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "an array",
    dict: "an object",
    type(None): "null",
}


def kind_of(value: object) -> str:
    """What JSON calls this value, with its article."""
    return _JSON_NAMES.get(type(value), "an unknown value")


def wrong_type(name: str, wanted: str, value: object) -> RequestError:
    return RequestError(f"'{name}' must be {wanted}, got {kind_of(value)}.", param=name, code="invalid_type")


class Fields:
    """The fields of one JSON object; `path` prefixes their names in refusals ("messages[0]."). Not reusable: readers take fields out."""

    def __init__(self, raw: Mapping[str, object], path: str = "") -> None:
        self._left = dict(raw)
        self._path = path

    def name(self, field: str) -> str:
        return self._path + field

    def has(self, field: str) -> bool:
        """Whether it is there (and not null) and nobody took it."""
        return self._left.get(field) is not None

    def take(self, field: str) -> object:
        """The raw value, None where it is missing or null."""
        return self._left.pop(field, None)

    def integer(self, field: str, *, low: int, high: int) -> int | None:
        value = self.take(field)
        if value is None:
            return None
        if type(value) is not int:
            raise wrong_type(self.name(field), "an integer", value)
        if not low <= value <= high:
            raise self._range(field, f"between {low} and {high}", value)
        return value

    def number(self, field: str, *, low: float, high: float, low_is_open: bool = False) -> float | None:
        value = self.take(field)
        if value is None:
            return None
        if type(value) is not int and type(value) is not float:
            raise wrong_type(self.name(field), "a number", value)
        number = float(value)
        if not math.isfinite(number) or number > high or number < low or (low_is_open and number == low):
            bounds = f"above {low:g} and at most {high:g}" if low_is_open else f"between {low:g} and {high:g}"
            raise self._range(field, bounds, value)
        return number

    def boolean(self, field: str, *, default: bool = False) -> bool:
        value = self.take(field)
        if value is None:
            return default
        if type(value) is not bool:
            raise wrong_type(self.name(field), "a boolean", value)
        return value

    def string(self, field: str) -> str | None:
        value = self.take(field)
        if value is None:
            return None
        if type(value) is not str:
            raise wrong_type(self.name(field), "a string", value)
        return value

    def array(self, field: str) -> list[object] | None:
        value = self.take(field)
        if value is None:
            return None
        if not isinstance(value, list):
            raise wrong_type(self.name(field), "an array", value)
        return value

    def mapping(self, field: str) -> dict[str, object] | None:
        value = self.take(field)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise wrong_type(self.name(field), "an object", value)
        return value

    def ignore(self, *fields: str) -> None:
        """Drop fields that OpenAI defines and that change nothing in the answer."""
        for field in fields:
            self._left.pop(field, None)

    def refuse_unless(self, harmless: Mapping[str, tuple[object, ...]]) -> None:
        """Fields that OpenAI defines and this server does not do: only their harmless values pass."""
        for field, values in harmless.items():
            value = self.take(field)
            if value is not None and not any(type(value) is type(other) and value == other for other in values):
                name = self.name(field)
                raise RequestError(f"'{name}' is not supported with this value.", param=name, code="unsupported_parameter")

    def finish(self) -> None:
        """Refuse whatever nobody took."""
        for field in self._left:
            name = self.name(field)
            raise RequestError(f"Unknown parameter: '{name}'.", param=name, code="unknown_parameter")

    def _range(self, field: str, bounds: str, value: object) -> RequestError:
        name = self.name(field)
        return RequestError(f"'{name}' must be {bounds}, got {value}.", param=name, code="invalid_value")
