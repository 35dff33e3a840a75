"""A burst of tokens through a connection: nothing is written, carried over or woken for more often than it must be."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import uvloop

from duomo.wire.codec import encode
from duomo.wire.connection import Connection
from duomo.wire.messages import TokensEmitted
from duomo.wire.values import EmittedToken
from tests.wire.test_stream import WIRE, Runner, pair


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_a_burst_of_tokens_is_encoded_once_and_copied_once(run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would make a burst slow is counted: writes, bytes written or carried over twice, wake-ups. The speed: `duomo bench gateway`."""
    frame = TokensEmitted(tokens=(EmittedToken(request_id="r" * 16, choice=0, attempt=0, index=1, token_id=5),))
    num_frames, frame_bytes = 20_000, len(encode(frame))
    written: list[int] = []
    carried: list[int] = []
    num_sleeps = 0

    class Counting:
        """A transport that counts what passes."""

        def __init__(self, transport: asyncio.Transport) -> None:
            self._transport = transport

        def write(self, data: bytes) -> None:
            written.append(len(data))
            self._transport.write(data)

        def __getattr__(self, name: str) -> object:
            return getattr(self._transport, name)

    def read(connection: Connection, data: bytes, original: Callable[[Connection, bytes], None] = Connection.data_received) -> None:
        original(connection, data)
        carried.append(len(connection._reader._tail))

    async def main() -> None:
        nonlocal num_sleeps
        monkeypatch.setattr(Connection, "data_received", read)  # before there is one: uvloop keeps the method that it finds
        async with pair(tmp_path, WIRE.model_copy(update={"heartbeat_s": 60.0, "silence_timeout_s": 120.0})) as (near, far):
            assert near._transport is not None
            near._transport = cast(asyncio.Transport, Counting(near._transport))
            carried.clear()
            for _ in range(num_frames):
                near.post(frame)
            for _ in range(num_frames):
                num_sleeps += not far._inbox
                assert await far.receive() == frame
            assert 0 <= sum(written) - num_frames * frame_bytes < frame_bytes, "each frame is written once, beside at most a heartbeat"
            assert len(written) <= num_frames * frame_bytes // (256 * 1024) + 1, "a burst is written in large pieces"
            assert max(carried) < frame_bytes, "nothing is carried from one read to the next but a frame's beginning"
            assert num_sleeps <= len(carried), "a receiver wakes once for a read, not once for a message"

    run(main())
