"""Owns which legs may start here: attempts that were taken back, drain, and what this replica can never serve. Knows no socket."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from duomo.errors import CapacityError, DuomoError, RequestError, WireError
from duomo.wire.values import Sampling
from services.decode.leg import Leg

MAX_VOID_REQUESTS = 4096  # how many cancelled requests are remembered, to drop what was under way for them


class Intake:
    """vocab and max_model_tokens are the model's. check: raises RequestError for what the worker cannot sample."""

    def __init__(self, vocab: int, max_model_tokens: int, check: Callable[[Sampling], None]) -> None:
        self._vocab = vocab
        self._max_model_tokens = max_model_tokens
        self._check = check
        self._void: OrderedDict[str, int] = OrderedDict()
        self.is_draining = False
        self.failure: DuomoError | None = None

    def take_back(self, request_id: str, attempt: int) -> None:
        """This attempt and all earlier ones are void."""
        self._void[request_id] = max(attempt, self._void.pop(request_id, -1))
        while len(self._void) > MAX_VOID_REQUESTS:
            self._void.popitem(last=False)

    def is_void(self, request_id: str, attempt: int) -> bool:
        return self._void.get(request_id, -1) >= attempt

    def refusal(self, leg: Leg) -> DuomoError | None:
        """Why this replica cannot serve the leg; None where it can."""
        if self.failure is not None:
            return self.failure
        if self.is_draining:
            return CapacityError("this decode replica is draining", code="draining", phase="decode.admit")
        if not leg.prompt_ids or not leg.choice_numbers:
            return WireError("a request needs a prompt and a choice", code="bad_field")
        if max(leg.prompt_ids) >= self._vocab or max(leg.emitted_ids, default=0) >= self._vocab:
            return WireError(f"a token id is not below the vocabulary of {self._vocab}", code="bad_field")
        if leg.num_tokens >= self._max_model_tokens:
            return WireError(f"{leg.num_tokens} tokens leave no room below the context limit of {self._max_model_tokens}", code="bad_field")
        try:
            self._check(leg.sampling)
        except RequestError as error:
            return error
        return None
