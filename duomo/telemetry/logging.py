"""One-line logs with who wrote them. Owns the handler of Duomo's loggers; knows no service, and never a prompt.

    2026-11-22T01:02:03.456Z INFO role=decode replica=decode-0 logger=services.decode.service msg="joined" request_id=a1 attempt=0

Values come from `log.info("...", extra={"request_id": ..., ...})`; only the names in FIELDS are written. An exception of ours or of the
system is written with its text; a stranger's only with its type and place, since its text may quote what a user sent, and a RequestError,
which does, with its code. Of a library's own warnings the first words are written: the rest shows the values that it stumbled over.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from typing import Final, TextIO

from duomo.errors import DuomoError, RequestError

FIELDS: Final = (
    "request_id",
    "attempt",
    "choice",
    "peer",
    "code",
    "phase",
    "reason",
    "handle_id",
    "wave_id",
    "group",
    "trace_id",
    "num_tokens",
    "num_bytes",
    "elapsed_s",
)
ROOTS: Final = ("duomo", "duomo_kernels", "services")
LIBRARIES: Final = ("asyncio", "uvicorn", "opentelemetry")  # else Python writes their tracebacks whole, to standard error
_MAX_LIBRARY_WORDS: Final = 5
_MAX_MESSAGE_CHARS: Final = 1000
_MAX_FRAMES: Final = 8


class LineFormatter(logging.Formatter):
    """logfmt, one line a record."""

    def __init__(self, role: str, replica_id: str) -> None:
        super().__init__()
        self._who = f"role={role}" + (f" replica={replica_id}" if replica_id else "")

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        message = record.getMessage()[:_MAX_MESSAGE_CHARS]
        if record.name.split(".")[0] in LIBRARIES:
            message = " ".join(str(record.msg).split()[:_MAX_LIBRARY_WORDS])
        parts = [
            f"{at}.{int(record.msecs):03d}Z {record.levelname} {self._who} logger={record.name}",
            f"msg={json.dumps(message, ensure_ascii=False)}",
        ]
        parts += [f"{name}={_value(getattr(record, name))}" for name in FIELDS if hasattr(record, name)]
        if record.exc_info is not None and record.exc_info[1] is not None:
            parts.append(f"error={json.dumps(_describe(record.exc_info[1]), ensure_ascii=False)}")
        return " ".join(parts)


def configure(role: str, replica_id: str = "", *, level: int = logging.INFO, stream: TextIO | None = None) -> None:
    """Send Duomo's loggers, and warnings of LIBRARIES, to `stream` (standard error) as lines; called again, it replaces what it set."""
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(LineFormatter(role, replica_id))
    for name in (*ROOTS, *LIBRARIES):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level if name in ROOTS else logging.WARNING)
        logger.propagate = False


def _value(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if text and not any(character.isspace() or character in '"=' for character in text) else json.dumps(text)


def _describe(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)[-_MAX_FRAMES:]
    place = " > ".join(f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno} {frame.name}" for frame in frames)
    if isinstance(error, RequestError):
        return f"RequestError: {error.code} at {place or '?'}"
    is_safe = isinstance(error, DuomoError | OSError | AssertionError)
    return f"{type(error).__name__}{f': {error}' if is_safe and str(error) else ''} at {place or '?'}"
