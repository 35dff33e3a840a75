"""PURE: API keys as hashed entries: made, written as lines, matched. Knows no file, no request and no clock.

A key is `duomo-ID-SECRET`: 256 random bits behind an id of 48. Its entry is a line of a file, `NAME SCOPES ID SALT HASH`: scopes joined by
commas, the rest in hex. Why a fast hash, and why a salt: docs/decisions/0018-gateway-doors.md.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

from duomo.errors import ConfigError

Scope = Literal["inference", "metrics", "admin"]
SCOPES: Final[tuple[Scope, ...]] = get_args(Scope)

_PREFIX: Final = "duomo"
_SECRET_BYTES: Final = 32
_ID_BYTES: Final = 6
_SALT_BYTES: Final = 16
_DIGEST_BYTES: Final = 32
_MAX_KEY_CHARS: Final = 512  # what a stranger has hashed, at most
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyEntry:
    """What is kept of a key. key_id: its public part, "" for a key whose form is its owner's (matched by trying)."""

    name: str
    scopes: tuple[Scope, ...]
    key_id: str
    salt: bytes
    digest: bytes

    def line(self) -> str:
        return f"{self.name} {','.join(self.scopes)} {self.key_id or '-'} {self.salt.hex()} {self.digest.hex()}"


def make_key(name: str, scopes: Sequence[str]) -> tuple[str, KeyEntry]:
    """A new key, to be shown once, and what is kept of it. Raises ConfigError where the name or a scope is none."""
    key_id = secrets.token_hex(_ID_BYTES)
    key = f"{_PREFIX}-{key_id}-{secrets.token_hex(_SECRET_BYTES)}"
    return key, hashed(key, name, scopes, key_id)


def hashed(key: str, name: str, scopes: Sequence[str], key_id: str = "") -> KeyEntry:
    """The entry of a key that is there already. Raises ConfigError where the key, the name or a scope is none."""
    if not key or len(key) > _MAX_KEY_CHARS or any(character.isspace() for character in key):
        raise ConfigError(f"the key {name}: 1 to {_MAX_KEY_CHARS} characters without spaces")
    salt = secrets.token_bytes(_SALT_BYTES)
    return KeyEntry(name=_checked_name(name), scopes=checked_scopes(scopes), key_id=key_id, salt=salt, digest=_digest(key, salt))


def parse_line(line: str) -> KeyEntry:
    """The entry of one line. Raises ConfigError saying what is wrong with it, and never showing its hash."""
    fields = line.split()
    if len(fields) != 5:
        raise ConfigError(f"a key is NAME SCOPES ID SALT HASH, as `duomo keys add` writes it, not {len(fields)} words")
    name, scopes, key_id, salt, digest = fields
    try:
        salt_bytes, digest_bytes = bytes.fromhex(salt), bytes.fromhex(digest)
    except ValueError as error:
        raise ConfigError(f"the salt and the hash of the key {name[:64]} must be hexadecimal") from error
    if len(salt_bytes) != _SALT_BYTES or len(digest_bytes) != _DIGEST_BYTES:
        raise ConfigError(f"the key {name[:64]} must have a salt of {_SALT_BYTES} and a hash of {_DIGEST_BYTES} bytes")
    return KeyEntry(
        name=_checked_name(name),
        scopes=checked_scopes(scopes.split(",")),
        key_id="" if key_id == "-" else key_id,
        salt=salt_bytes,
        digest=digest_bytes,
    )


def parse_entries(text: str) -> tuple[KeyEntry, ...]:
    """All entries of a file's text; blank lines and those that begin with # are left out. Raises ConfigError naming the line."""
    entries: list[KeyEntry] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            entry = parse_line(line)
        except ConfigError as error:
            raise ConfigError(f"line {number}: {error.detail}") from error
        if any(other.name == entry.name for other in entries):
            raise ConfigError(f"line {number}: there is another key called {entry.name}; names are unique")
        if entry.key_id and any(other.key_id == entry.key_id for other in entries):
            raise ConfigError(f"line {number}: the key {entry.name} has the ID of another, {entry.key_id[:64]}; IDs are unique")
        entries.append(entry)
    return tuple(entries)


def checked_scopes(scopes: Iterable[str]) -> tuple[Scope, ...]:
    """In the order of SCOPES, each once. Raises ConfigError naming what is none."""
    asked = set(scopes)
    unknown = sorted(asked - set(SCOPES))
    if unknown or not asked:
        raise ConfigError(f"a key's scope must be one of {', '.join(SCOPES)}" + (f", not {unknown[0]!r}" if unknown else ""))
    return tuple(scope for scope in SCOPES if scope in asked)


class KeyRing:
    """Who holds a key, by the key. Looking costs one hash, and one for each key that has no id."""

    def __init__(self, entries: Iterable[KeyEntry]) -> None:
        self.entries = tuple(entries)
        self._by_id = {entry.key_id: entry for entry in self.entries if entry.key_id}
        self._without_id = tuple(entry for entry in self.entries if not entry.key_id)

    def holder(self, key: str) -> KeyEntry | None:
        """The entry that this key is of; None for nobody's."""
        if not key or len(key) > _MAX_KEY_CHARS:
            return None
        prefix, _, rest = key.partition("-")
        named = self._by_id.get(rest.partition("-")[0]) if prefix == _PREFIX else None
        if named is not None and _is_of(key, named):
            return named
        return next((entry for entry in self._without_id if _is_of(key, entry)), None)


def _is_of(key: str, entry: KeyEntry) -> bool:
    """In a time that says nothing of how much of the hash is right."""
    return hmac.compare_digest(_digest(key, entry.salt), entry.digest)


def _digest(key: str, salt: bytes) -> bytes:
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=_DIGEST_BYTES, salt=salt, person=b"duomo api key").digest()


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ConfigError(f"a key's name must be 1 to 64 letters, digits or ._@- and begin with a letter or digit, not {name[:64]!r}")
    return name
