"""Owns the compiling of legs' constraints on decode: while their KV is on its way. Knows no handoff and no step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from duomo.errors import DuomoError
from duomo.grammar.cache import Grammars
from duomo.grammar.state import Grammar
from services.decode.leg import Leg
from services.decode.worker import StepWorker
from services.kv_transfer.membership import ReplicaCard


class LegGrammars:
    """wake: a leg may join that could not; fail: a leg's constraint cannot be compiled. On the event loop."""

    def __init__(self, card: ReplicaCard, worker: StepWorker, wake: Callable[[], None], fail: Callable[[Leg, DuomoError], None]) -> None:
        self._grammars = Grammars(card.config.model.path, worker.config.vocab, worker.config.eos_ids)
        self._wake = wake
        self._fail = fail

    async def warm(self) -> None:
        """Read what every grammar needs."""
        await self._grammars.warm()

    def expect(self, leg: Leg) -> None:
        """Begin; a leg without a constraint needs nothing. It does not join before it has its grammar."""
        if leg.sampling.constraint is not None:
            self._grammars.ask(leg.sampling.constraint, partial(self._compiled, leg), partial(self._fail, leg))

    def _compiled(self, leg: Leg, grammar: Grammar) -> None:
        leg.grammar = grammar
        self._wake()
