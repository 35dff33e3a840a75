"""One authenticated stream of Messages to a peer. Owns its frames, heartbeats and ending; knows no address and no service.

Everything happens on one event loop: `post` may be called any number of times in a tick and costs one write. Whatever ends a
connection (a closed or silent peer, a peer too far behind, a frame that is none) ends it once, and everybody who waits hears why.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import statistics
import time
from collections import deque
from typing import Final, cast

from duomo.config import WireSection
from duomo.errors import PeerError, WireError
from duomo.wire.codec import FRAME_TOO_LARGE, NOT_MSGPACK, FrameReader, append_frame, decode
from duomo.wire.handshake import Handshake
from duomo.wire.messages import MIN_WIRE_VERSION, Heartbeat, Hello, Message, Refused

_HELLO_MAX_FRAME_BYTES: Final = 16 * 1024  # a stranger cannot make us store more
_WRITE_NOW_BYTES: Final = 256 * 1024  # a burst is written while it is still being posted
_WRITE_BUFFER_BYTES: Final = 4 * _WRITE_NOW_BYTES  # what the transport takes before it asks us to hold back
_READ_PAUSE_BYTES: Final = 16 * 1024 * 1024  # unread messages beyond this stop the reading, and so the peer
_CLOSE_WAIT_S: Final = 1.0  # how long a last write may take before the socket is cut
_NUM_RTTS: Final = 5  # the median of the last few: one slow answer (a start-up, a long step) is not the wire


class Connection(asyncio.Protocol):
    """A peer. Made by connect or a Listener (connection.py), which hand it out once both sides have proved themselves.

    peer: the other side's Hello. version: the wire version spoken. rtt_s: median round trip of the last heartbeats, None before the first.
    received_s: monotonic time at which the message last returned by `receive` was read off the socket.
    """

    peer: Hello
    version: int

    def __init__(self, wire: WireSection, handshake: Handshake, opening: Hello | None) -> None:
        self.rtt_s: float | None = None
        self._rtts_s: deque[float] = deque(maxlen=_NUM_RTTS)
        self.received_s = 0.0
        self.is_open = asyncio.Event()  # set once the peer is known, or never will be
        self._wire = wire
        self._handshake: Handshake | None = handshake
        self._opening = opening
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._reader = FrameReader(_HELLO_MAX_FRAME_BYTES)
        self._inbox: deque[tuple[Message | WireError, float]] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._ending: tuple[str, str, bool] | None = None
        self._lost = asyncio.Event()
        self._out = bytearray()
        self._is_flush_due = False
        self._is_write_paused = False
        self._is_read_paused = False
        self._unread_bytes = 0
        self._last_read_s = time.monotonic()
        self._last_tick_s = self._last_read_s
        self._ping: tuple[int, float] | None = None
        self._num_pings = 0
        self._timer: asyncio.TimerHandle | None = None

    # What services use

    @property
    def closed(self) -> bool:
        return self._ending is not None

    def post(self, message: Message) -> None:
        """Enqueue a message; it is written in this tick of the loop. Loop thread only.

        Raises PeerError once the connection has ended (or by this message exceeds wire.max_send_buffer_bytes and ends), WireError
        where the message is over the frame limit (nothing is sent, the connection lives).
        """
        if self._ending is not None:
            raise self._error()
        self._send(message)
        if self._ending is not None:
            raise self._error()

    def flush(self) -> None:
        """Write what was posted now and not at the tick's end: for tokens, which must not wait for whatever this tick does next."""
        if self._transport is not None and self._ending is None:
            # uvloop defers every write to the tick's end, unless the buffer is above its limit.
            self._transport.set_write_buffer_limits(high=0)
            self._flush()
            self._transport.set_write_buffer_limits(high=_WRITE_BUFFER_BYTES)

    async def receive(self) -> Message:
        """The next message, in order. One caller at a time.

        Raises WireError for a message that cannot be understood (the peer was told, go on receiving) and PeerError once the connection
        has ended and everything that came before was received.
        """
        while not self._inbox:
            if self._ending is not None:
                raise self._error()
            assert self._waiter is None, "one receiver for each connection"
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        message, self.received_s = self._inbox.popleft()
        if not self._inbox:
            self._unread_bytes = 0
            if self._is_read_paused and self._transport is not None and self._ending is None:
                self._is_read_paused = False
                self._transport.resume_reading()
        if isinstance(message, WireError):
            raise message
        return message

    async def close(self) -> None:
        """Write what was posted, then end. Returns when the socket is gone, within about a second."""
        self.end("closed", "this side closed the connection")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_WAIT_S):
                await self._lost.wait()
        if self._transport is not None:
            self._transport.abort()
            await self._lost.wait()

    async def wait_closed(self) -> None:
        """Return once the connection has ended."""
        await self._lost.wait()

    # What connect and Listener use

    def end(self, code: str, detail: str, *, is_retryable: bool = True) -> None:
        """End once: the first reason stays. What was posted is still written if the peer reads it soon."""
        if self._ending is not None:
            return
        self._ending = (code, detail, is_retryable)
        if self._timer is not None:
            self._timer.cancel()
        self.is_open.set()
        self._wake()
        if self._transport is None:
            self._lost.set()
            return
        if self._out and not self._transport.is_closing():
            self._transport.write(bytes(self._out))
        self._out = bytearray()
        self._transport.close()
        self._timer = self._loop.call_later(_CLOSE_WAIT_S, self._transport.abort)

    def check_open(self) -> None:
        """Raises PeerError once ended."""
        if self._ending is not None:
            raise self._error()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but its class
        if self._ending is not None:
            transport.abort()
            return
        transport.set_write_buffer_limits(high=_WRITE_BUFFER_BYTES)
        peer_socket = transport.get_extra_info("socket")
        if peer_socket is not None and peer_socket.family in (socket.AF_INET, socket.AF_INET6):
            peer_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._opening is not None:
            self._send(self._opening)
        self._timer = self._loop.call_later(self._wire.connect_timeout_s, self.end, "handshake_timeout", "no Hello came in time")

    def data_received(self, data: bytes) -> None:
        now_s = self._last_read_s = time.monotonic()
        try:
            for payload in self._reader.payloads(data):
                if self._ending is not None:
                    return
                self._take(payload, now_s)
        except WireError as error:
            self._refuse(error.code, error.detail)
            return
        self._unread_bytes = self._unread_bytes + len(data) if self._inbox else 0
        if self._unread_bytes > _READ_PAUSE_BYTES and not self._is_read_paused and self._transport is not None and self._ending is None:
            self._is_read_paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self.end("peer_gone", f"the peer's socket was closed{f': {exc}' if exc else ''}")
        if self._timer is not None:
            self._timer.cancel()
        self._lost.set()

    def pause_writing(self) -> None:
        self._is_write_paused = True

    def resume_writing(self) -> None:
        self._is_write_paused = False
        self._flush()

    # Inside

    def _take(self, payload: memoryview, now_s: float) -> None:
        try:
            message = decode(payload)
        except WireError as error:
            if error.code == NOT_MSGPACK or self._handshake is not None:
                raise
            self._send(Refused(code=error.code, detail=error.detail))
            self._inbox.append((error, now_s))
            return
        if self._handshake is not None:
            self._greet(self._handshake, message)
        elif type(message) is Heartbeat:
            self._beat(message, now_s)
        elif type(message) is Hello:
            self._send(Refused(code="unexpected_hello", detail="Hello comes once, first"))
            self._inbox.append((WireError("a second Hello", code="unexpected_hello"), now_s))
        else:
            self._inbox.append((message, now_s))

    def _greet(self, handshake: Handshake, message: Message) -> None:
        if isinstance(message, Refused):
            self.end(message.code, f"the peer refused us: {message.detail}", is_retryable=False)
            return
        if not isinstance(message, Hello):
            self._refuse("bad_hello", f"Hello must come first, not {type(message).__name__}")
            return
        try:
            answer = handshake.advance(message)
        except PeerError as error:
            self._refuse(error.code, error.detail)
            return
        if answer is not None:
            self._send(answer)
        if handshake.peer is None:
            return
        self.peer, self.version, self._handshake = handshake.peer, handshake.version, None
        self._reader.max_frame_bytes = self._wire.max_frame_bytes
        assert self._timer is not None
        self._timer.cancel()
        self._last_tick_s = time.monotonic()
        self._tick()
        self.is_open.set()

    def _beat(self, heartbeat: Heartbeat, now_s: float) -> None:
        if not heartbeat.is_reply:
            self._send(Heartbeat(seq=heartbeat.seq, is_reply=True))
        elif self._ping is not None and heartbeat.seq == self._ping[0]:
            self._rtts_s.append(now_s - self._ping[1])
            self.rtt_s = statistics.median_low(self._rtts_s)
            self._ping = None

    def _tick(self) -> None:
        """Every heartbeat_s: ask for a sign of life, and end the connection when none came for too long."""
        now_s = time.monotonic()
        wire = self._wire
        if now_s - self._last_tick_s > 2 * wire.heartbeat_s or self._is_read_paused:
            self._last_read_s = max(self._last_read_s, now_s - wire.heartbeat_s)  # we did not look: our stall is not the peer's silence
        if now_s - self._last_read_s > wire.silence_timeout_s:
            self.end("peer_silent", f"{self.peer.replica_id} gave no sign of life for {wire.silence_timeout_s:g} s")
            if self._transport is not None:
                self._transport.abort()
            return
        self._last_tick_s = now_s
        if self._ping is None or now_s - self._ping[1] > wire.silence_timeout_s:
            self._num_pings += 1
            self._ping = (self._num_pings, now_s)
            self._send(Heartbeat(seq=self._num_pings))
            self._flush()  # not at the tick's end: what else is posted now is not part of the round trip
        if self._ending is None:
            self._timer = self._loop.call_later(wire.heartbeat_s, self._tick)

    def _send(self, message: Message) -> None:
        if self._ending is not None:
            return
        version = self.version if self._handshake is None else MIN_WIRE_VERSION
        num_before = len(self._out)
        append_frame(self._out, message, version=version, max_frame_bytes=self._wire.max_frame_bytes)
        num_bytes = len(self._out)
        if num_bytes > _WRITE_NOW_BYTES and not self._is_write_paused:
            self._flush()
        elif num_bytes > self._wire.max_send_buffer_bytes and num_before > 0:
            self._out = bytearray()
            self.end("peer_behind", f"the peer is more than {self._wire.max_send_buffer_bytes} bytes behind")
            if self._transport is not None:
                self._transport.abort()
        elif not self._is_flush_due:
            self._is_flush_due = True
            self._loop.call_soon(self._flush_due)

    def _flush_due(self) -> None:
        self._is_flush_due = False
        self._flush()

    def _flush(self) -> None:
        if self._out and not self._is_write_paused and self._ending is None and self._transport is not None:
            out, self._out = self._out, bytearray()  # the transport keeps what it could not write at once
            self._transport.write(out)

    def _refuse(self, code: str, detail: str) -> None:
        """End a connection whose stream or peer is beyond repair, telling the peer why."""
        self._send(Refused(code=code, detail=detail))
        self.end(code, detail, is_retryable=code in (NOT_MSGPACK, FRAME_TOO_LARGE))

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done() and (self._inbox or self._ending is not None):
            self._waiter.set_result(None)

    def _error(self) -> PeerError:
        assert self._ending is not None
        code, detail, is_retryable = self._ending
        return PeerError(detail, code=code, retryable=is_retryable)
