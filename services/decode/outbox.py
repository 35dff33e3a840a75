"""Owns what goes to gateways: one TokensEmitted frame for each gateway and step, and the endings behind it. Knows no leg's state."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence

from msgspec.structs import replace

from duomo.errors import DuomoError, PeerError
from duomo.wire.connection import Connection
from duomo.wire.messages import Cancel, Message, Preempted, RequestFailed, RequestFinished, TokensEmitted
from duomo.wire.values import EmittedToken, Timings
from services.decode.leg import Choice, Leg
from services.decode.worker import StepOutput


def frame_of(
    emitted: Sequence[tuple[Choice, EmittedToken]], step: StepOutput, rtt_s: Callable[[str], float], now_s: float
) -> list[tuple[str, EmittedToken]]:
    """A step's tokens, each with its gateway; the first of a leg from here tells the times that led to it. rtt_s: to a prefill replica."""
    frame: list[tuple[str, EmittedToken]] = []
    for choice, token in emitted:
        leg = choice.leg
        if leg.times.first_token_s is None:
            timings = leg.times.first_token(step.started_s, now_s, rtt_s(leg.prefill.boot_id), len(step.tokens))
            token = replace(token, timings=timings)
        frame.append((leg.gateway, token))
    return frame


class Outbox:
    """The gateways' sockets by boot id. A gateway that is gone gets nothing: its reading task cancels its legs."""

    def __init__(self) -> None:
        self._gateways: dict[str, Connection] = {}

    def joined(self, connection: Connection) -> bool:
        """Whether the gateway came back by another socket, having given the first one up before we saw its end. That one is ended."""
        before = self._gateways.get(connection.peer.boot_id)
        self._gateways[connection.peer.boot_id] = connection
        if before is not None:
            before.end("replaced", "its gateway has another socket")
        return before is not None

    def left(self, connection: Connection) -> bool:
        """Whether it was the socket in use."""
        if self._gateways.get(connection.peer.boot_id) is not connection:
            return False
        del self._gateways[connection.peer.boot_id]
        return True

    def post(self, boot_id: str, message: Message) -> None:
        connection = self._gateways.get(boot_id)
        if connection is not None:
            with contextlib.suppress(PeerError):
                connection.post(message)

    def emit(self, tokens: Iterable[tuple[str, EmittedToken]]) -> None:
        """One frame for each gateway, tokens in step order; written at once, before the next step takes the interpreter."""
        frames: dict[str, list[EmittedToken]] = {}
        for gateway, token in tokens:
            frames.setdefault(gateway, []).append(token)
        for gateway, frame in frames.items():
            self.post(gateway, TokensEmitted(tokens=tuple(frame)))
            if gateway in self._gateways:
                self._gateways[gateway].flush()

    def finished(self, leg: Leg, now_s: float) -> None:
        self.post(
            leg.gateway,
            RequestFinished(
                request_id=leg.request_id,
                attempt=leg.attempt,
                traceparent=leg.traceparent,
                remaining_s=leg.deadline_s - now_s,
                cached_tokens=leg.done.cached_tokens if leg.done is not None else 0,
                timings=Timings(total_s=now_s - leg.times.started_s),
            ),
        )

    def preempted(self, choice: Choice, now_s: float) -> None:
        leg = choice.leg
        self.post(
            leg.gateway,
            Preempted(
                request_id=leg.request_id,
                attempt=leg.attempt,
                traceparent=leg.traceparent,
                remaining_s=leg.deadline_s - now_s,
                choice=choice.number,
                num_emitted=len(choice.output_ids),
                reason="no_blocks",
            ),
        )


def failure_of(leg: Leg, error: DuomoError, now_s: float) -> RequestFailed:
    """The typed ending of a leg, for its gateway and for its producer."""
    return RequestFailed(
        request_id=leg.request_id,
        attempt=leg.attempt,
        traceparent=leg.traceparent,
        remaining_s=leg.deadline_s - now_s,
        code=error.code,
        phase=error.phase,
        retryable=error.retryable,
        detail=error.detail,
    )


def cancel_of(request_id: str, attempt: int, traceparent: str, reason: str) -> Cancel:
    """To a producer: stop, and fence what was granted."""
    return Cancel(request_id=request_id, attempt=attempt, traceparent=traceparent, remaining_s=0.0, reason=reason)
