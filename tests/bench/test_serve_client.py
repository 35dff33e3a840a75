"""Single requests of a load as their client sees them, where what answers is no server or an odd one."""

from __future__ import annotations

import asyncio

import pytest

from bench.serve.rest_client import post
from bench.serve.serve_client import Target, play_alone
from bench.serve.serve_figures import Seen
from bench.serve.serve_plan import Piece
from bench.serve.serve_plan import Request as Planned
from bench.serve.serve_prompts import Dialect


def test_a_connection_that_is_refused_is_one_failed_request() -> None:
    target = Target(urls=("http://127.0.0.1:9",), dialect=Dialect(model="m", api="completions", vocab=99))
    heard: list[str] = []
    (seen,) = play_alone(target, [Planned(0, 0.0, 3, (Piece("a", 4),))], 5.0, heard.append)
    assert isinstance(seen, Seen) and "Connect" in seen.error and "4:3 alone" in heard[0]
    with pytest.raises(OSError):
        asyncio.run(post("http://127.0.0.1:9", "/v1/completions", b"{}"))
