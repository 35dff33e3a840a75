"""The keys of a gateway: its file is read again when it changes, and a slip in it changes nothing."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from duomo.api_keys import hashed, make_key
from duomo.config_gateway import GatewaySection
from duomo.errors import ConfigError
from services.router.keys import Keys, open_door


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def written(file: Path, *lines: str) -> None:
    file.write_text("".join(f"{line}\n" for line in lines))


def test_a_key_that_is_added_or_removed_counts_a_second_later(tmp_path: Path) -> None:
    clock, file = Clock(), tmp_path / "keys"
    (first, first_entry), (second, second_entry) = make_key("first", ["inference"]), make_key("second", ["admin"])
    written(file, first_entry.line())
    keys = Keys(GatewaySection(api_keys_file=file), clock)
    assert keys.are_asked_for and keys.holder(first) == first_entry and keys.holder(second) is None
    written(file, second_entry.line())
    os.utime(file, ns=(1, 1))  # not the size: both lines may be as long
    clock.now_s += 0.9
    assert keys.holder(first) == first_entry, "looked at once a second"
    clock.now_s += 0.2
    assert keys.holder(first) is None and keys.holder(second) == second_entry


def test_a_file_that_breaks_leaves_the_keys_and_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock, file = Clock(), tmp_path / "keys"
    key, entry = make_key("alice", ["inference"])
    written(file, entry.line())
    keys = Keys(GatewaySection(api_keys_file=file), clock)
    caplog.set_level(logging.INFO)
    written(file, "alice broken")
    for _ in range(3):
        clock.now_s += 2
        assert keys.holder(key) == entry
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1 and str(file) in told[0] and "line 1" in told[0]
    file.unlink()
    clock.now_s += 2
    assert keys.holder(key) == entry
    written(file)
    clock.now_s += 2
    assert keys.holder(key) is None, "an empty file knows nobody"
    written(file, entry.line())
    clock.now_s += 2
    assert keys.holder(key) == entry


@pytest.mark.parametrize(("text", "why"), [(None, "No such file"), ("alice broken\n", "line 1"), ("\udcff", "cannot be read")])
def test_a_start_without_its_keys_names_option_and_file(tmp_path: Path, text: str | None, why: str) -> None:
    file = tmp_path / "keys"
    if text is not None:
        file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=f"gateway.api_keys_file .*{file}.*{why}"):
        Keys(GatewaySection(api_keys_file=file))


def test_keys_of_the_configuration_stand_beside_those_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    key, entry = make_key("alice", ["inference"])
    written(file, entry.line())
    own = hashed("token-abc123", "env", ["inference"])
    keys = Keys(GatewaySection(api_keys_file=file, api_keys=(own.line(),)))
    assert keys.holder("token-abc123") == own and keys.holder(key) == entry
    assert not Keys(GatewaySection()).are_asked_for


@pytest.mark.parametrize(
    ("section", "is_open"),
    [
        ({}, False),
        ({"host": "::1"}, False),
        ({"host": "localhost"}, False),
        ({"host": "0.0.0.0"}, True),
        ({"host": "10.0.0.7"}, True),
        ({"host": "0.0.0.0", "api_keys": ("x",)}, False),
    ],
)
def test_an_open_door_is_warned_of_where_strangers_reach_it(section: dict, is_open: bool) -> None:
    warning = open_door(GatewaySection.model_validate(section))
    assert bool(warning) is is_open
    assert not is_open or ("NO API KEYS" in warning and "--api-key-file" in warning and section["host"] in warning)
