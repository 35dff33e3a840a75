"""A clock that a test moves, for what the gateway times of its clients' connections. All else is real: sockets, loop, answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from services.router.client_protocol import ClientProtocol
from tests.services.router.stub_system import StubSystem


class Timer:
    """As asyncio's, for this clock."""

    def __init__(self, due_s: float, call: Callable[[], object]) -> None:
        self.due_s = due_s
        self.call = call
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


class HandClock:
    """The loop of every connection that is accepted from now on, as far as they see it: time passes by advance() alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.connections: list[ClientProtocol] = []
        self.num_read = 0  # bytes, by all of them
        self._now_s = 1000.0
        self._timers: list[Timer] = []
        made, received = ClientProtocol.__init__, ClientProtocol.data_received

        def with_this_clock(protocol: ClientProtocol, *arguments: object, **named: object) -> None:
            made(protocol, *arguments, **named)  # type: ignore[arg-type]  # uvicorn's own, handed on
            protocol.loop = self  # type: ignore[assignment]  # of which it uses what stands here
            self.connections.append(protocol)

        def counted(protocol: ClientProtocol, data: bytes) -> None:
            received(protocol, data)
            self.num_read += len(data)

        monkeypatch.setattr(ClientProtocol, "data_received", counted)
        monkeypatch.setattr(ClientProtocol, "__init__", with_this_clock)

    def time(self) -> float:
        return self._now_s

    def call_later(self, delay_s: float, call: Callable[..., object], *arguments: object) -> Timer:
        self._timers.append(timer := Timer(self._now_s + delay_s, lambda: call(*arguments)))
        return timer

    def __getattr__(self, name: str) -> object:
        return getattr(asyncio.get_running_loop(), name)

    def advance(self, seconds: float) -> None:
        """What becomes due within them is called, in order, each at its time."""
        end_s = self._now_s + seconds
        while due := [timer for timer in self._timers if not timer.is_cancelled and timer.due_s <= end_s]:
            first = min(due, key=lambda timer: timer.due_s)
            self._timers.remove(first)
            self._now_s = max(self._now_s, first.due_s)
            first.call()
        self._timers = [timer for timer in self._timers if not timer.is_cancelled]
        self._now_s = end_s

    async def sent(self, system: StubSystem, writer: asyncio.StreamWriter, data: bytes) -> None:
        """Written by a client and read by the gateway."""
        num_before = self.num_read
        writer.write(data)
        await system.until(lambda: self.num_read >= num_before + len(data))

    @property
    def is_last_open(self) -> bool:
        return not self.connections[-1].transport.is_closing()
