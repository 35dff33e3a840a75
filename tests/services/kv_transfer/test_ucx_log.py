"""UCX's log comes to us once UCX is loaded, tables as routes and the rest as our log; the environment is left as it was."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.kv_transfer.ucx_log import UcxLog

ROOT = Path(__file__).parents[3]
TABLE = (
    "[1.5] [vm:1:0]   +------+\n[1.5] [vm:1:0]   | kv-p intra-node cfg#1 |\n"
    "[1.5] [vm:1:0]   | remote memory write by ucp_put* from host memory to host |\n[1.5] [vm:1:0]   +------+\n"
    "[1.5] [vm:1:0]   | Range | Description | Config |\n[1.5] [vm:1:0]   +------+\n"
)
END = "[1.5] [vm:1:0]   | 0..inf | zero-copy | cma/memory |\n[1.5] [vm:1:0]   +------+\n"


@pytest.fixture
def ucx_log(monkeypatch: pytest.MonkeyPatch) -> UcxLog:
    monkeypatch.delenv("UCX_LOG_FILE", raising=False)
    monkeypatch.delenv("UCX_PROTO_INFO", raising=False)
    return UcxLog()


def opened(log: UcxLog) -> str:
    """Where UCX would write, told while the first agent is made."""
    with log.is_making_agent():
        return os.environ["UCX_LOG_FILE"]


def test_ucx_is_told_where_to_write_once_and_children_are_not(ucx_log: UcxLog) -> None:
    with ucx_log.is_making_agent():
        assert os.environ["UCX_PROTO_INFO"] == "*ucp_put*"
        place = os.environ["UCX_LOG_FILE"]
        written = subprocess.run([sys.executable, "-c", f"open({place!r}, 'w').write('from a child')"], check=False)
        assert written.returncode == 0, "one that was started meanwhile finds the file"
    assert not {"UCX_LOG_FILE", "UCX_PROTO_INFO"} & os.environ.keys()
    with ucx_log.is_making_agent():
        assert "UCX_LOG_FILE" not in os.environ and "UCX_PROTO_INFO" in os.environ


def test_tables_are_read_as_they_come_and_messages_go_into_our_log(ucx_log: UcxLog, caplog: pytest.LogCaptureFixture) -> None:
    with open(opened(ucx_log), "w") as written, caplog.at_level(logging.WARNING):
        written.write(TABLE)
        written.flush()
        assert ucx_log.routes() == [], "half a table"
        row, rule = END.splitlines(keepends=True)
        written.write(row + "[1.6] [vm:1:0]   sock.c:1 UCX  ERROR connection refused\n" + rule[:9])
        written.flush()
        assert ucx_log.routes() == [], "a line that is not whole"
        written.write(rule[9:])
        written.flush()
        assert [route.lanes for route in ucx_log.routes()] == [("cma/memory",)] == [route.lanes for route in ucx_log.routes()]
    assert [record.getMessage() for record in caplog.records] == ["UCX says: [1.6] [vm:1:0]   sock.c:1 UCX  ERROR connection refused"]


def test_what_was_read_takes_no_memory(ucx_log: UcxLog, caplog: pytest.LogCaptureFixture) -> None:
    with open(opened(ucx_log), "w") as written:
        for _ in range(40):
            written.write("[1.6] [vm:1:0]   sock.c:1 UCX  WARN " + "x" * 9000 + "\n")
            written.flush()
            ucx_log.routes()
        written.write(TABLE + END)
        written.flush()
        assert [route.lanes for route in ucx_log.routes()] == [("cma/memory",)], "found behind the hole"
        assert ucx_log._file is not None and os.fstat(ucx_log._file).st_blocks * 512 < 100_000
    assert len(caplog.records) == 40


@pytest.mark.parametrize("name", ["UCX_LOG_FILE", "UCX_PROTO_INFO"])
def test_an_operator_who_asks_ucx_for_its_log_gets_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "y")
    log = UcxLog()
    with log.is_making_agent():
        assert os.environ[name] == "y" and len({"UCX_LOG_FILE", "UCX_PROTO_INFO"} & os.environ.keys()) == 1
    assert log.routes() == []
