"""Logs: one line a record, who wrote it, and never what a user sent."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator

import pytest

from duomo.errors import RequestError, TransferError
from duomo.telemetry.logging import LIBRARIES, ROOTS, configure

log = logging.getLogger("services.decode.service")


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    roots = [logging.getLogger(name) for name in (*ROOTS, *LIBRARIES)]
    before = [(root.handlers[:], root.level, root.propagate) for root in roots]
    stream = io.StringIO()
    configure("decode", "decode-0", stream=stream)
    yield stream
    for root, (handlers, level, propagate) in zip(roots, before, strict=True):
        root.handlers[:], root.propagate = handlers, propagate
        root.setLevel(level)


def test_a_record_is_one_line_with_role_and_replica(stream: io.StringIO) -> None:
    log.info("joined\nthe batch", extra={"request_id": "a 1", "attempt": 0, "elapsed_s": 0.1 + 0.2})
    log.debug("not at this level")
    (line,) = stream.getvalue().splitlines()
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO role=decode replica=decode-0 logger=services\.decode\.service "
        r'msg="joined\\nthe batch" request_id="a 1" attempt=0 elapsed_s=0\.3',
        line,
    )


def test_unknown_fields_are_left_out(stream: io.StringIO) -> None:
    log.warning("refused", extra={"prompt": "my secret story", "code": "bad_value"})
    assert "secret" not in stream.getvalue() and "code=bad_value" in stream.getvalue()


def test_our_errors_keep_their_text_and_strangers_only_type_and_place(stream: io.StringIO) -> None:
    for error in (TransferError("hash of message 3 differs"), OSError(28, "No space left"), ValueError("'my secret story' is no number")):
        try:
            raise error
        except (TransferError, OSError, ValueError):
            log.exception("step failed")
    ours, system, stranger = stream.getvalue().splitlines()
    assert "hash of message 3 differs" in ours and "test_logging.py" in ours
    assert "No space left" in system
    assert "ValueError at test_logging.py" in stranger and "secret" not in stranger


def test_refusals_and_what_libraries_stumble_over_are_not_quoted(stream: io.StringIO) -> None:
    try:
        raise RequestError("'my secret story' is no role", code="bad_role")
    except RequestError:
        log.exception("refused")
    logging.getLogger("asyncio").error("Task exception was never retrieved\nfuture: <Task exception=ValueError('my secret story')>")
    logging.getLogger("asyncio").error("Exception in callback %s", "f('my secret story')")
    logging.getLogger("uvicorn.error").error("Exception in ASGI application\n", exc_info=ValueError("my secret story"))
    logging.getLogger("uvicorn.error").info("Started")
    refused, task, callback, answer = stream.getvalue().splitlines()
    assert "RequestError: bad_role" in refused and 'msg="Task exception was never retrieved"' in task and "ValueError" in answer
    assert 'msg="Exception in callback %s"' in callback
    assert "secret" not in stream.getvalue()


def test_configuring_again_replaces(stream: io.StringIO) -> None:
    other = io.StringIO()
    configure("prefill", stream=other)
    log.info("once")
    assert not stream.getvalue() and other.getvalue().count("\n") == 1
    assert "role=prefill logger" in other.getvalue()
