"""Owns how a trace of requests is written down: JSON lines (ours, Mooncake's) and Azure's CSV. Knows no load and no server.

{"arrival_s": 0.25, "prompt_tokens": 2048, "output_tokens": 128}                             ours; also with "hash_ids"
{"timestamp": 250, "input_length": 2048, "output_length": 128, "hash_ids": [0, 1, 2, 3]}     Mooncake's, milliseconds
TIMESTAMP,ContextTokens,GeneratedTokens                                                      Azure's LLM inference traces
2023-11-16 18:17:03.9799600,2048,128
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from datetime import datetime

from bench.serve.serve_plan import TraceRow

_OURS = ("arrival_s", "prompt_tokens", "output_tokens")
_MOONCAKE = ("timestamp", "input_length", "output_length")
_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


class TraceError(ValueError):
    """A line that is no request; the message begins with file and line."""


def read_trace(lines: Iterable[str], name: str) -> tuple[TraceRow, ...]:
    """Rows by arrival. name: of the file, for errors. Raises TraceError, of an empty file too."""
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise TraceError(f"{name}: no line is a request")
    if numbered[0][1].lstrip().startswith("{"):
        rows = [_of_json(line, f"{name}:{number}") for number, line in numbered]
    else:
        rows = _of_csv(numbered, name)
    return tuple(sorted(rows, key=lambda row: row.arrival_s))


def _of_json(line: str, where: str) -> TraceRow:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise TraceError(f"{where}: no JSON ({error})") from error
    if not isinstance(fields, dict):
        raise TraceError(f"{where}: a JSON object with {', '.join(_OURS)} is wanted")
    names, unit_s = (_OURS, 1.0) if "arrival_s" in fields else (_MOONCAKE, 1e-3)
    if missing := [name for name in names if name not in fields]:
        raise TraceError(f"{where}: {', '.join(missing)} missing; a line has {', '.join(_OURS)}, or {', '.join(_MOONCAKE)}")
    hash_ids = fields.get("hash_ids") or []
    if not isinstance(hash_ids, list) or not all(type(each) is int for each in hash_ids):
        raise TraceError(f"{where}: hash_ids is an array of whole numbers")
    return TraceRow(
        unit_s * _time(fields, names[0], where), _tokens(fields, names[1], where), _tokens(fields, names[2], where), tuple(hash_ids)
    )


def _of_csv(numbered: list[tuple[int, str]], name: str) -> list[TraceRow]:
    header = [column.strip() for column in next(csv.reader([numbered[0][1]]))]
    if missing := [column for column in _AZURE if column not in header]:
        raise TraceError(
            f"{name}:{numbered[0][0]}: {', '.join(missing)} missing; the first line is a JSON object, or has {', '.join(_AZURE)}"
        )
    rows, first = [], None
    for number, line in numbered[1:]:
        where = f"{name}:{number}"
        fields = dict(zip(header, next(csv.reader([line])), strict=False))
        try:
            stamp = datetime.fromisoformat(fields.get("TIMESTAMP", "").strip()).replace(tzinfo=None)
        except ValueError as error:
            raise TraceError(f"{where}: TIMESTAMP is {fields.get('TIMESTAMP', '')!r}; such as 2023-11-16 18:17:03.97") from error
        first = first or stamp
        at_s = (stamp - first).total_seconds()
        rows.append(TraceRow(at_s, _tokens(fields, "ContextTokens", where), _tokens(fields, "GeneratedTokens", where)))
    if not rows:
        raise TraceError(f"{name}: no line below the header")
    return rows


def _time(fields: Mapping[str, object], name: str, where: str) -> float:
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < float("inf"):
        raise TraceError(f"{where}: {name} is {value!r}; a number from 0 on")
    return float(value)


def _tokens(fields: Mapping[str, object], name: str, where: str) -> int:
    """Whole and above 0; CSV has it as text."""
    value = fields.get(name)
    number = int(value) if isinstance(value, str) and value.strip().isdigit() else value
    if type(number) is not int or number < 1:
        raise TraceError(f"{where}: {name} is {value!r}; a whole number from 1 on")
    return number
