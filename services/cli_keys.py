"""Owns `duomo keys`: makes, lists and removes API keys in a file of hashed ones. Knows no gateway, which reads that file by itself."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from duomo.api_keys import KeyEntry, make_key, parse_entries
from duomo.errors import ConfigError

HEAD = "# API keys of a Duomo gateway, hashed: NAME SCOPES ID SALT HASH. Written by `duomo keys`; read again when it changes.\n"


def add_key(file: Path, name: str, scopes: Sequence[str]) -> int:
    """Print a new key, once, and keep its hash. Raises ConfigError where the file cannot be used or has a key of that name."""
    key, entry = make_key(name, scopes)
    with _locked(file):
        text = _text(file)
        if any(other.name == name for other in _entries(file, text)):
            raise ConfigError(f"NAME: {file} has a key called {name}; remove it first (`duomo keys remove {name}`), or choose another name")
        _replace(file, (text or HEAD).rstrip("\n") + f"\n{entry.line()}\n")
    print(key)
    print(f"duomo: the key {name} ({', '.join(entry.scopes)}) is shown this once; {file} holds its hash", file=sys.stderr)
    return 0


def list_keys(file: Path) -> int:
    """Names and scopes. Raises ConfigError where the file cannot be read."""
    if not file.exists():
        raise ConfigError(f"--file: {file} does not exist; `duomo keys add NAME` makes it")
    for entry in _entries(file, _text(file)):
        print(f"{entry.name:<24} {','.join(entry.scopes)}")
    return 0


def remove_key(file: Path, name: str) -> int:
    """A gateway that reads the file refuses the key a second later. Raises ConfigError where there is none of that name."""
    with _locked(file):
        text = _text(file)
        if not any(entry.name == name for entry in _entries(file, text)):
            raise ConfigError(f"NAME: {file} has no key called {name}")
        _replace(file, "".join(line for line in text.splitlines(keepends=True) if line.split(maxsplit=1)[:1] != [name]))
    print(f"duomo: the key {name} is removed", file=sys.stderr)
    return 0


def _text(file: Path) -> str:
    try:
        return file.read_text() if file.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--file: {file} cannot be read: {error}") from error


def _entries(file: Path, text: str) -> tuple[KeyEntry, ...]:
    try:
        return parse_entries(text)
    except ConfigError as error:
        raise ConfigError(f"--file: {file}, {error.detail}") from error


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Two who change the file at once do so one after the other. The lock is the folder's: the file itself is replaced."""
    try:
        folder = os.open(file.resolve().parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ConfigError(f"--file: the folder of {file} cannot be used: {error.strerror}") from error
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _replace(file: Path, text: str) -> None:
    """At once and whole, so that a gateway never reads half of it; readable by its owner alone, or as it was."""
    file = file.resolve()
    try:
        mode = file.stat().st_mode & 0o777 if file.exists() else 0o600
        handle, scratch = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        try:
            with os.fdopen(handle, "w") as out:
                out.write(text)
                out.flush()
                os.fsync(out.fileno())
            os.chmod(scratch, mode)
            os.replace(scratch, file)
        except OSError:
            os.unlink(scratch)
            raise
    except OSError as error:
        raise ConfigError(f"--file: {file} cannot be written: {error.strerror}") from error
