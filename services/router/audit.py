"""Who asked the admin API for what, and what became of it: a log line, a counter, and a line of a file. Knows no route."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from duomo.errors import ConfigError
from duomo.telemetry.metrics import Metrics

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Deed:
    """One call. who: the key's name, "-" where none is asked for or none was known. result: "ok", or the code of the refusal."""

    who: str
    address: str
    action: str
    target: str
    result: str
    detail: str = ""


class Audit:
    """Owns the file's handle; close() ends it. Lines are appended, whole, by one write each, so that several gateways may share a file."""

    def __init__(self, file: Path | None, metrics: Metrics) -> None:
        """Raises ConfigError where the file cannot be written: an audit that fails later is an error in the log."""
        self._metrics = metrics
        self._file = file
        self._handle: int | None = None
        if file is not None:
            try:
                self._handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            except OSError as error:
                raise ConfigError(f"gateway.audit_file {file} cannot be written: {error.strerror}") from error

    def record(self, deed: Deed) -> None:
        self._metrics.admin_actions.labels(deed.action, deed.result).inc()
        log.warning("admin: %s asked from %s to %s %s: %s", deed.who, deed.address, deed.action, deed.target, deed.result)
        if self._handle is None:
            return
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {
            "at": at,
            "who": deed.who,
            "from": deed.address,
            "action": deed.action,
            "target": deed.target,
            "result": deed.result,
            "detail": deed.detail,
        }
        try:
            os.write(self._handle, msgspec.json.encode(line) + b"\n")
        except OSError as error:
            log.error("gateway.audit_file %s lacks a line, which is in this log: %s", self._file, error.strerror)

    def close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
