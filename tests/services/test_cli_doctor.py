"""What `duomo doctor` says of this machine: which implementation runs, and whose the port is."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from duomo.errors import ConfigError, ModelError
from services.cli_doctor import _kernels, _port

MODEL = Path(__file__).parents[2] / "models" / "tiny-moe"


@contextmanager
def answering(body: bytes) -> Iterator[int]:
    """A server that answers everything with `body`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Not into the test's output."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_it_names_the_implementation_that_runs() -> None:
    line = _kernels(MODEL)
    assert "products by chain" in line or "products by tile" in line, line
    with pytest.raises(ModelError, match="config.json"):
        _kernels(MODEL.parent)


def test_a_port_of_a_running_duomo_is_no_fault() -> None:
    with answering(json.dumps({"data": [{"id": "tiny-moe", "owned_by": "duomo"}]}).encode()) as port:
        assert "tiny-moe" in _port(port)


@pytest.mark.parametrize("body", [b"hello", b"[]", b'{"data": []}', b'{"data": [{"id": "x", "owned_by": "vllm"}]}'])
def test_a_port_of_somebody_else_is(body: bytes) -> None:
    with answering(body) as port, pytest.raises(ConfigError, match=f"--port {port}"):
        _port(port)
