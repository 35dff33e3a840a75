"""Single requests of a load as their client sees them, where what answers is no server or an odd one."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from bench.serve.rest_client import OddEventError, post
from bench.serve.serve_client import Target, play_alone
from bench.serve.serve_figures import Seen
from bench.serve.serve_plan import Piece
from bench.serve.serve_plan import Request as Planned
from bench.serve.serve_pool import clients
from bench.serve.serve_prompts import Dialect

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
TOKEN = b'data: {"choices": [{"index": 0, "text": "x"}], "usage": {"completion_tokens": 1}}\n\n'


@contextmanager
def answering(*answers: bytes) -> Iterator[str]:
    """The address of what gives each connection the next of these streams, in a thread of this process."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(30.0)

    def answer() -> None:
        for each in answers:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(HEAD + each)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        thread.join(35.0)
        listener.close()


def target_at(url: str) -> Target:
    return Target(urls=(url,), dialect=Dialect(model="m", api="completions", vocab=99, counting="usage"))


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ('{"choices": [{"index": 0, "text": null}]}', "NoneType"),
        ('["choices"]', "'list' object has no attribute 'get'"),
        ('{"choices": [{"text": "x"}]}', "KeyError: 'index'"),
        ('{"choices": {"index": 0}}', "TypeError"),
        ('{"choices": [{"index": 0, "text": "x"}], "usage": {"completion_tokens": "2"}}', "TypeError"),
        ('{"choices": [', "JSONDecodeError"),
    ],
)
def test_an_odd_event_is_its_requests_failure_and_named(odd: str, said: str) -> None:
    heard: list[str] = []
    with answering(TOKEN + f"data: {odd}\n\n".encode()) as url:
        (seen,) = play_alone(target_at(url), [Planned(0, 0.0, 2, (Piece("a", 4),))], 30.0, heard.append)
    assert seen.error.startswith("odd event (") and said in seen.error and odd in seen.error and seen.error in heard[0]
    assert seen.event_tokens == (1,), "what came before it is kept"


def test_an_odd_event_leaves_the_client_process_and_its_other_requests() -> None:
    with answering(b"data: [1]\n\n", TOKEN + b"data: [DONE]\n\n", TOKEN + b"data: [DONE]\n\n") as url, clients(1) as pool:
        requests = [Planned(number, 0.3 * number, 1, (Piece("a", 4),)) for number in range(2)]
        (first,) = pool.play(target_at(url), requests, 30.0)
        (again,) = pool.play(target_at(url), requests[:1], 30.0)
    assert [one.error.split(" (")[0] for one in first.seen] == ["odd event", ""] and [one.error for one in again.seen] == [""]


def test_a_fault_of_what_takes_the_tokens_is_not_the_servers() -> None:
    def take(now_s: float, num_tokens: int) -> None:
        raise LookupError("ours")

    with answering(TOKEN) as url, pytest.raises(LookupError, match="^'ours'$|^ours$"):
        asyncio.run(post(url, "/v1/completions", b"{}", on_tokens=take))
    with answering(b"data: 7\n\n") as url, pytest.raises(OddEventError, match="'int' object .*: 7"):
        asyncio.run(post(url, "/v1/completions", b"{}"))


def test_a_connection_that_is_refused_is_one_failed_request() -> None:
    heard: list[str] = []
    (seen,) = play_alone(target_at("http://127.0.0.1:9"), [Planned(0, 0.0, 3, (Piece("a", 4),))], 5.0, heard.append)
    assert isinstance(seen, Seen) and "Connect" in seen.error and "4:3 alone" in heard[0]
    with pytest.raises(OSError):
        asyncio.run(post("http://127.0.0.1:9", "/v1/completions", b"{}"))
