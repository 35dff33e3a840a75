"""Owns the compiled grammars of one model, on one event loop: compiled by a thread, one at a time, the latest kept. Knows no request.

A failure is kept like a grammar: the same constraint fails in the same way. What is asked for while it compiles is compiled once.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Final

from duomo.errors import CapacityError, DuomoError, EngineError, RequestError
from duomo.grammar.library import tokens_of
from duomo.grammar.state import Grammar
from duomo.wire.values import Constraint

CAPACITY: Final = 256
CAPACITY_CHARS: Final = 2 * 1024 * 1024  # of all kept together: compiled, a character takes some hundred bytes
LIMIT_S: Final = 10.0  # llguidance's own limits end each; many may stand in line
TOKENIZER: Final = "tokenizer.json"
BROKEN: Final = "constraint_failed"

log = logging.getLogger(__name__)


class Grammars:
    """Of the model in `folder`, which has so many ids. Loop thread only."""

    def __init__(self, folder: Path, vocab: int, eos_ids: tuple[int, ...], *, capacity: int = CAPACITY, limit_s: float = LIMIT_S) -> None:
        self._of_model = (folder / TOKENIZER, vocab, eos_ids)
        self._capacity = capacity
        self._limit_s = limit_s
        self._turn = asyncio.Lock()
        self._made: OrderedDict[Constraint, asyncio.Task[Grammar]] = OrderedDict()
        self._waiting: set[asyncio.Task[None]] = set()

    async def warm(self) -> None:
        """Read the tokenizer before a request asks; what is wrong with it only requests with a constraint are told."""
        try:
            await asyncio.to_thread(tokens_of, *self._of_model)
        except RequestError as error:
            log.info("requests with a constraint will be refused: %s", error.detail)

    def ask(self, constraint: Constraint, ready: Callable[[Grammar], None], failed: Callable[[DuomoError], None]) -> None:
        """One of them is called, at once where the answer is known: with RequestError where there is none, CapacityError after limit_s."""
        made = self._made.get(constraint)
        if made is None:
            made = self._made[constraint] = asyncio.get_running_loop().create_task(self._make(constraint))
        self._made.move_to_end(constraint)
        self._forget_oldest()
        if made.done():
            _tell(made, ready, failed)
            return
        waiting = asyncio.get_running_loop().create_task(self._wait(made, ready, failed))
        self._waiting.add(waiting)
        waiting.add_done_callback(self._waiting.discard)

    def _forget_oldest(self) -> None:
        """The one asked for last stays, however large."""
        num_chars = sum(len(constraint.text) for constraint in self._made)
        while len(self._made) > self._capacity or (num_chars > CAPACITY_CHARS and len(self._made) > 1):
            constraint, _ = self._made.popitem(last=False)
            num_chars -= len(constraint.text)

    async def _make(self, constraint: Constraint) -> Grammar:
        async with self._turn:
            return await asyncio.to_thread(compiled, self._of_model, constraint)

    async def _wait(self, made: asyncio.Task[Grammar], ready: Callable[[Grammar], None], failed: Callable[[DuomoError], None]) -> None:
        await asyncio.wait({made}, timeout=self._limit_s)
        if made.done():
            _tell(made, ready, failed)
        else:
            failed(CapacityError(f"the constraint was not compiled within {self._limit_s:g} s", code="constraint_timeout"))


def compiled(of_model: tuple[Path, int, tuple[int, ...]], constraint: Constraint) -> Grammar:
    """Of a tokenizer.json, its number of ids and eos ids; in any thread. Raises RequestError."""
    tokens = tokens_of(*of_model)
    return Grammar(tokens, tokens.matcher(constraint))


def _tell(made: asyncio.Task[Grammar], ready: Callable[[Grammar], None], failed: Callable[[DuomoError], None]) -> None:
    error = made.exception()
    if error is None:
        ready(made.result())
    elif isinstance(error, RequestError):
        failed(error)
    else:  # a fault of ours or of the library's: nobody may wait for it until the deadline
        log.error("a constraint could not be compiled", exc_info=error)
        failed(EngineError(f"the constraint could not be compiled: {type(error).__name__}", code=BROKEN, retryable=False))
