"""A gateway that does as told: real sockets. Knows no decode internals."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from duomo.config import DuomoConfig
from duomo.wire.messages import (
    Cancel,
    Message,
    Preempted,
    Refused,
    ReplicaReport,
    RequestFailed,
    RequestFinished,
    Resume,
    StartDecode,
    TokensEmitted,
)
from duomo.wire.values import EmittedToken
from tests.services.decode.scripted_peers import Peer, Prompt, ScriptedPrefill, until


@dataclass
class Answer:
    """What a gateway has seen of one request: tokens by choice and index, in the order they came."""

    tokens: dict[int, dict[int, EmittedToken]] = field(default_factory=lambda: defaultdict(dict))
    finish: dict[int, str] = field(default_factory=dict)
    num_twice: int = 0

    def ids(self, choice: int = 0) -> list[int]:
        return [self.tokens[choice][index].token_id for index in sorted(self.tokens[choice])]


class ScriptedGateway(Peer):
    """Starts and cancels requests on D, and keeps what comes."""

    def __init__(self, config: DuomoConfig) -> None:
        super().__init__("gateway", config)
        self.answers: dict[str, Answer] = defaultdict(Answer)
        self.frames = 0
        self.report: ReplicaReport | None = None
        self.on_preempted: Callable[[Preempted], None] | None = None

    def take(self, message: Message) -> None:
        match message:
            case TokensEmitted():
                self.frames += 1
                for token in message.tokens:
                    answer = self.answers[token.request_id]
                    answer.num_twice += token.index in answer.tokens[token.choice]
                    answer.tokens[token.choice][token.index] = token
                    if token.finish_reason is not None:
                        answer.finish[token.choice] = token.finish_reason
            case ReplicaReport():
                self.report = message
            case Preempted() if self.on_preempted is not None:
                self.on_preempted(message)

    def start(self, prompt: Prompt, prefill: ScriptedPrefill, *, remaining_s: float = 60.0, traceparent: str = "") -> None:
        if prompt.emitted_ids:
            self.post(
                Resume(
                    request_id=prompt.request_id,
                    attempt=prompt.attempt,
                    traceparent=traceparent,
                    remaining_s=remaining_s,
                    prompt_ids=prompt.prompt_ids,
                    emitted_ids=prompt.emitted_ids,
                    sampling=prompt.sampling,
                    choice=prompt.choices[0],
                    prefill=prefill.address,
                )
            )
            return
        self.post(
            StartDecode(
                request_id=prompt.request_id,
                attempt=prompt.attempt,
                traceparent=traceparent,
                remaining_s=remaining_s,
                prompt_ids=prompt.prompt_ids,
                sampling=prompt.sampling,
                choices=prompt.choices,
                prefill=prefill.address,
            )
        )

    def cancel(self, request_id: str, attempt: int = 0, choice: int | None = None) -> None:
        self.post(Cancel(request_id=request_id, attempt=attempt, traceparent="", remaining_s=0.0, reason="test", choice=choice))

    async def ended(self, request_id: str) -> None:
        """Either way."""
        await until(lambda: bool(self.of(RequestFinished, request_id) or self.of(RequestFailed, request_id)), 90.0)

    async def finished(self, request_id: str) -> RequestFinished:
        await until(lambda: bool(self.of(RequestFinished, request_id) or self.of(RequestFailed, request_id)))
        failures = self.of(RequestFailed, request_id)
        assert not failures, failures
        return self.of(RequestFinished, request_id)[0]

    async def failed(self, request_id: str) -> RequestFailed:
        return await self.one(RequestFailed, request_id)

    def refusals(self) -> list[Refused]:
        return self.of(Refused)
