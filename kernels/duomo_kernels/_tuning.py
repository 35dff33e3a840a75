"""Owns the tables of launch configurations that were measured, a file a device. Knows no kernel: what a configuration means, its op says.

A table (tuning/<device>.json, written by `duomo bench tune`, never by hand) is a list of entries

    {"op": "experts", "shape": {"num_experts": 64, "top_k": 8, "dim": 2048, "hidden": 1024}, "dtype": "bf16", "num_tokens": 64,
     "config": {"path": "gemm", "up": {"block_m": 16, ...}, "down": {...}}, "us": 268.1, "heuristic_us": 290.4}

where config holds numbers, words and truths, or groups of those by name. `tuned` answers with the entry of the same op, shape and dtype
whose number of tokens is nearest as a ratio, and with None where the device or the shape has no table: the op's heuristic decides then.
Files are read at the first question, once a process.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, cast

import torch

FOLDER = Path(__file__).parent / "tuning"
Scalar: TypeAlias = int | float | str | bool
Config: TypeAlias = Mapping[str, Scalar | Mapping[str, Scalar]]
Shape: TypeAlias = tuple[tuple[str, int], ...]
_HEAD = {"device", "torch", "triton", "driver", "commit", "date"}
_ENTRY = {"op": str, "shape": dict, "dtype": str, "num_tokens": int, "config": dict, "us": float, "heuristic_us": float}


class TuningTableError(ValueError):
    """A table that does not say what it must: names the file and the entry. `duomo bench tune` writes a right one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuned:
    """One measured configuration and what it took, with what the heuristic's took in the same run."""

    num_tokens: int
    config: Config
    us: float
    heuristic_us: float


Table: TypeAlias = dict[tuple[str, Shape, str], tuple[Tuned, ...]]


def file_name(device_name: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> nvidia_h100_80gb_hbm3.json."""
    return re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_") + ".json"


def tuned(op: str, shape: Mapping[str, int], dtype: str, num_tokens: int, device: torch.device) -> Config | None:
    """The configuration measured on this device for the nearest number of tokens, or None."""
    if device.type != "cuda":
        return None
    found = _table(_device_name(torch.cuda.current_device() if device.index is None else device.index))
    return nearest(found.get((op, shape_key(shape), dtype), ()), num_tokens)


def nearest(entries: tuple[Tuned, ...], num_tokens: int) -> Config | None:
    """By ratio: 24 tokens lie between 16 and 32 nearer to 32 (1.33) than to 16 (1.5). Of equals the larger."""
    if not entries:
        return None
    return min(entries, key=lambda entry: (abs(math.log(entry.num_tokens / max(1, num_tokens))), -entry.num_tokens)).config


def shape_key(shape: Mapping[str, int]) -> Shape:
    return tuple(sorted(shape.items()))


@functools.cache
def _device_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


@functools.cache
def _table(device_name: str) -> Table:
    path = FOLDER / file_name(device_name)
    return read_table(path) if path.is_file() else {}


def read_table(path: Path) -> Table:
    """Entries by op, shape and dtype, by number of tokens. Raises TuningTableError."""
    try:
        content = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TuningTableError(f"{path}: no JSON ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("entries"), list) or not set(content) >= _HEAD:
        raise TuningTableError(f"{path}: expected an object with {sorted(_HEAD)} and a list `entries`")
    found: dict[tuple[str, Shape, str], list[Tuned]] = {}
    for i, entry in enumerate(content["entries"]):
        if (problem := _problem(entry)) is not None:
            raise TuningTableError(f"{path}: entry {i}: {problem}")
        key = (entry["op"], shape_key(entry["shape"]), entry["dtype"])
        same = found.setdefault(key, [])
        if any(each.num_tokens == entry["num_tokens"] for each in same):
            raise TuningTableError(f"{path}: entry {i}: a second one for {entry['op']} {entry['shape']} at {entry['num_tokens']} tokens")
        same.append(Tuned(**{name: entry[name] for name in ("num_tokens", "config", "us", "heuristic_us")}))
    return {key: tuple(sorted(entries, key=lambda each: each.num_tokens)) for key, entries in found.items()}


def _problem(entry: object) -> str | None:
    """What is wrong with an entry, or None."""
    if not isinstance(entry, dict) or set(entry) != set(_ENTRY):
        return f"expected exactly the keys {sorted(_ENTRY)}"
    for name, kind in _ENTRY.items():
        allowed = (int, float) if kind is float else kind
        if not isinstance(entry[name], allowed) or isinstance(entry[name], bool):
            return f"{name}: {entry[name]!r} is no {kind.__name__}"
    sizes = cast(dict[str, object], entry["shape"])
    if not sizes or not all(_is_positive(size) for size in sizes.values()):
        return f"shape: {sizes!r}: sizes are whole numbers above 0"
    if not _is_positive(entry["num_tokens"]):
        return f"num_tokens: {entry['num_tokens']!r} is not above 0"
    config = cast(dict[str, object], entry["config"])
    for name, value in config.items():
        leaves = value.values() if isinstance(value, dict) else (value,)
        if not all(isinstance(leaf, int | float | str | bool) for leaf in leaves):
            return f"config.{name}: {value!r} is neither a number, a word, a truth nor a group of those"
    return None if config else "config: empty"


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def write_table(path: Path, head: Mapping[str, object], entries: list[dict[str, object]]) -> None:
    """Write a table and read it back: what read_table refuses is not left behind."""
    lines = ",\n".join(" " + json.dumps(entry) for entry in entries)
    first = json.dumps({name: head[name] for name in sorted(_HEAD)})[:-1]
    draft = path.with_suffix(".draft")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft.write_text(f'{first}, "entries": [\n{lines}\n]}}\n')
    try:
        read_table(draft)
    except TuningTableError:
        draft.unlink()
        raise
    draft.replace(path)
