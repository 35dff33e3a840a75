"""The exception tree: every fault that a user, a peer or a machine can cause. Knows no service and no library.

    DuomoError                     code, phase, retryable, detail
    |- RequestError                the client's fault: an HTTP status and the field at fault (param)
    |- ConfigError                 the operator's fault: names the option or file and what would be right
    |- ModelError                  a model folder that cannot be served: names the tensor, shape or architecture
    |- CapacityError               no room now: retryable, says when to come back (retry_after_s)
    |- DeadlineError               the request's time is over
    |- RequestCancelled            the client or the gateway took the request back
    |- PeerError                   a peer is gone, silent, or speaks another version or model
    |- WireError                   a frame that cannot be understood: a typed refusal
    |- TransferError               KV that did not arrive, or not as it was sent
    `- EngineError                 a step that failed or hangs

A programmer's fault is an assert, never one of these.
"""

from __future__ import annotations

from typing import ClassVar

PHASES = (
    "start",
    "gateway",
    "route",
    "prefill.queue",
    "prefill.compute",
    "kv.handoff",
    "decode.admit",
    "decode.stream",
    "wire",
)


class DuomoError(Exception):
    """A fault with an owner.

    code: a stable snake_case word, safe to show to clients and to count by.
    phase: one of PHASES, where it happened.
    retryable: whether the same request may succeed on another try or another replica.
    detail: one sentence for people: what is wrong and what would be right.
    """

    default_code: ClassVar[str] = "internal"
    default_phase: ClassVar[str] = "start"
    default_retryable: ClassVar[bool] = False

    def __init__(
        self,
        detail: str,
        *,
        code: str | None = None,
        phase: str | None = None,
        retryable: bool | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.code = code if code is not None else self.default_code
        self.phase = phase if phase is not None else self.default_phase
        self.retryable = retryable if retryable is not None else self.default_retryable

    def __str__(self) -> str:
        return f"{self.code} ({self.phase}): {self.detail}"


class RequestError(DuomoError):
    """A client's fault: answered with `status` (4xx) and OpenAI's error body naming `param`."""

    default_code = "invalid_value"
    default_phase = "gateway"

    def __init__(self, detail: str, *, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(detail, code=code)
        self.param = param
        self.status = status


class ConfigError(DuomoError):
    """An operator's fault: the detail names the option, variable or file and what would be right."""

    default_code = "bad_config"


class ModelError(DuomoError):
    """A model folder that cannot be served: the detail names the file, tensor, shape or architecture."""

    default_code = "bad_model"


class CapacityError(DuomoError):
    """No room now. `retry_after_s` is when another try makes sense."""

    default_code = "no_capacity"
    default_phase = "route"
    default_retryable = True

    def __init__(
        self,
        detail: str,
        *,
        retry_after_s: float = 1.0,
        code: str | None = None,
        phase: str | None = None,
    ) -> None:
        super().__init__(detail, code=code, phase=phase)
        self.retry_after_s = retry_after_s


class DeadlineError(DuomoError):
    """The request's remaining seconds ran out."""

    default_code = "deadline_exceeded"
    default_phase = "gateway"


class RequestCancelled(DuomoError):
    """The client left or the gateway took the request back; nobody waits for an answer."""

    default_code = "cancelled"
    default_phase = "gateway"


class PeerError(DuomoError):
    """A peer process is gone, silent, or may not pair with us."""

    default_code = "peer_gone"
    default_phase = "wire"
    default_retryable = True


class WireError(DuomoError):
    """A frame or message that cannot be understood; answered by a typed refusal."""

    default_code = "bad_message"
    default_phase = "wire"


class TransferError(DuomoError):
    """KV that did not arrive, arrived late, or not as it was sent."""

    default_code = "transfer_failed"
    default_phase = "kv.handoff"
    default_retryable = True


class EngineError(DuomoError):
    """A step that failed or makes no progress."""

    default_code = "engine_failed"
    default_phase = "prefill.compute"
    default_retryable = True
