"""Owns typed reads of a JSON file of a model folder: which key is missing or wrong. Knows no model."""

from __future__ import annotations

import json
from pathlib import Path

from duomo.errors import ModelError

Json = dict[str, object]


def read_json(file: Path) -> Json:
    """A JSON object from a file. Raises ModelError naming the file."""
    try:
        loaded = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {file}: {error}", code="bad_model_file") from error
    if not isinstance(loaded, dict):
        raise ModelError(f"{file} must hold a JSON object", code="bad_model_file")
    return loaded


class ConfigReader:
    """Reads from config.json (or an object inside it, `raw`); null counts as missing. Errors name the key."""

    def __init__(self, raw: Json, folder: Path) -> None:
        self.raw = raw
        self.folder = folder
        self._file = folder / "config.json"

    def integer(self, *keys: str, default: int | None = None) -> int:
        """The first of `keys` that is there: some have two spellings. Positive."""
        for key in keys:
            value = self.raw.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
            if value is not None:
                raise ModelError(f"{key} in {self._file} must be a positive integer, not {value!r}", code="bad_model_config")
        if default is None:
            raise self._lacks(*keys)
        return default

    def number(self, key: str, default: float | None = None) -> float:
        value = self.raw.get(key)
        if value is None and default is not None:
            return default
        if value is None:
            raise self._lacks(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ModelError(f"{key} in {self._file} must be a positive number, not {value!r}", code="bad_model_config")
        return float(value)

    def inside(self, *keys: str) -> ConfigReader:
        """The object under the first of `keys` that is there; an empty one where none is."""
        for key in keys:
            value = self.raw.get(key)
            if isinstance(value, dict):
                return ConfigReader(value, self.folder)
            if value is not None:
                raise ModelError(f"{key} in {self._file} must be an object, not {value!r}", code="bad_model_config")
        return ConfigReader({}, self.folder)

    def refuse_unless(self, key: str, value: object, supported: object) -> None:
        if value != supported:
            raise ModelError(f"{key} = {value!r} of {self.folder} is not supported, only {supported!r}", code="bad_model_config")

    def _lacks(self, *keys: str) -> ModelError:
        return ModelError(f"{self._file} lacks {' or '.join(keys)}", code="bad_model_config")
