"""`duomo keys`: a file of hashes, changed whole and by one at a time; a key is shown once."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from duomo.api_keys import KeyRing, parse_entries
from duomo.errors import ConfigError
from services.cli_keys import add_key, list_keys, remove_key

ROOT = Path(__file__).resolve().parents[2]


def test_a_key_is_shown_once_and_comes_and_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys"
    add_key(file, "alice", ["inference"])
    key = capsys.readouterr().out.strip()
    file.chmod(0o640)
    add_key(file, "ops", ["admin", "inference"])
    assert file.stat().st_mode & 0o777 == 0o640, "as its owner left it"
    capsys.readouterr()
    list_keys(file)
    shown = capsys.readouterr().out
    assert [line.split() for line in shown.splitlines()] == [["alice", "inference"], ["ops", "inference,admin"]]
    assert key not in file.read_text() and key not in shown
    holder = KeyRing(parse_entries(file.read_text())).holder(key)
    assert holder is not None and holder.name == "alice"
    remove_key(file, "alice")
    assert KeyRing(parse_entries(file.read_text())).holder(key) is None and "ops" in file.read_text()
    assert [entry.name for entry in tmp_path.iterdir()] == ["keys"], "no scratch file is left"


def test_a_new_file_is_its_owners_alone(tmp_path: Path) -> None:
    add_key(tmp_path / "keys", "alice", ["inference"])
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o600


def test_two_at_once_lose_nothing(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda number: add_key(file, f"k{number}", ["inference"]), range(24))) == {0}
    assert len(parse_entries(file.read_text())) == 24


def test_mistakes_name_the_option_and_change_nothing(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    add_key(file, "alice", ["inference"])
    before = file.read_text()
    for call, named in (
        (lambda: add_key(file, "alice", ["admin"]), "NAME: .*alice"),
        (lambda: add_key(file, "b", ["root"]), "inference, metrics, admin"),
        (lambda: remove_key(file, "bob"), "NAME: .*bob"),
        (lambda: list_keys(tmp_path / "none"), "--file: .*none"),
        (lambda: add_key(tmp_path / "no" / "folder", "b", ["inference"]), "--file: .*folder"),
    ):
        with pytest.raises(ConfigError, match=named):
            call()
    assert file.read_text() == before
    file.write_text("alice broken\n")
    with pytest.raises(ConfigError, match="--file: .*line 1"):
        add_key(file, "b", ["inference"])
    assert file.read_text() == "alice broken\n"


def test_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "services.cli", "keys", "add", "ops", "--scope", "admin", "--file", str(tmp_path / "keys")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("duomo-") and done.stdout.count("\n") == 1 and "(admin)" in done.stderr
