"""The API keys that a gateway knows: those of its configuration and of a file that is read again when it changes. Knows no request."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from duomo.api_keys import KeyEntry, KeyRing, parse_entries, parse_line
from duomo.config_gateway import GatewaySection, is_loopback
from duomo.errors import ConfigError

_LOOK_AGAIN_S: Final = 1.0  # a removed key is refused within this

log = logging.getLogger(__name__)

_Stamp = tuple[int, int, int]  # of a file: inode, size, time of its last change in ns


class Keys:
    """Of one gateway. clock: monotonic seconds.

    A file that cannot be read, or whose lines are wrong, stops a start; later it leaves the keys as they were, and an error in the log: a
    slip of the operator's editor neither locks everybody out nor lets anybody in. An empty file knows nobody.
    """

    def __init__(self, section: GatewaySection, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises ConfigError naming the file and the line."""
        self._file = section.api_keys_file
        self._clock = clock
        self._own = tuple(parse_line(line) for line in section.api_keys)
        self.are_asked_for = section.has_keys
        self._stamp: _Stamp | None = None
        self._ring = KeyRing(self._own)
        self._looked_s = clock()
        if self._file is not None:
            self._read(self._file)

    def holder(self, key: str) -> KeyEntry | None:
        """Whose key it is; None for nobody's."""
        if self._file is not None and self._clock() - self._looked_s >= _LOOK_AGAIN_S:
            self._look_again(self._file)
        return self._ring.holder(key)

    def _look_again(self, file: Path) -> None:
        self._looked_s = self._clock()
        try:
            if self._stamp == (stamp := _stamp_of(file)):
                return
            self._stamp = stamp  # once for each change, whatever comes of it
            self._read(file)
        except (OSError, ConfigError) as error:
            self._stamp = None if isinstance(error, OSError) else self._stamp
            log.error("API keys stay as they were: %s", error.detail if isinstance(error, ConfigError) else f"{file}: {error.strerror}")
        else:
            log.info("%s was read again: %d keys", file, len(self._ring.entries))

    def _read(self, file: Path) -> None:
        try:
            stamp = _stamp_of(file)
            entries = parse_entries(file.read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"gateway.api_keys_file (--api-key-file) {file} cannot be read: {error}") from error
        except ConfigError as error:
            raise ConfigError(f"gateway.api_keys_file (--api-key-file) {file}, {error.detail}") from error
        self._stamp, self._ring = stamp, KeyRing((*self._own, *entries))
        if not self._ring.entries:
            log.warning("%s holds no key: every call is refused (`duomo keys add` makes one)", file)


def open_door(section: GatewaySection) -> str:
    """What to warn of where strangers reach the gateway and no key is asked for; "" where that is not so."""
    if section.has_keys or section.ssl_ca_certs is not None or is_loopback(section.host):
        return ""
    return (
        f"NO API KEYS: whoever reaches {section.host}:{section.port} may use this gateway; name a file made by `duomo keys add` "
        "by --api-key-file (gateway.api_keys_file), or listen on 127.0.0.1"
    )


def _stamp_of(file: Path) -> _Stamp:
    told = os.stat(file)
    return told.st_ino, told.st_size, told.st_mtime_ns
