"""Owns the scoring of prompts whose own log-probabilities were asked for, behind their wave's last layer. Knows no tensor and no socket.

The logits of all rows at once would take much memory, and hold decode up: rows are scored a few at a time, each time as a turn of the step
thread, and told as soon as they are known. Of a prompt's last row the next token is sampled; it is no part of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from duomo.engine.prompt_scores import RowsToScore
from duomo.wire.prompt_logprobs import PromptScores
from services.kv_transfer.membership import Progress
from services.kv_transfer.step_thread import StepThread
from services.prefill.leg import Leg
from services.prefill.pending import Over, Pending
from services.prefill.worker import Computation, WaveWorker


class Scoring:
    """Of one replica. thread: where layers are computed; waiting_thread: where a device's work is waited for. scored: on the event loop."""

    def __init__(
        self,
        worker: WaveWorker,
        thread: StepThread,
        waiting_thread: StepThread,
        progress: Progress,
        scored: Callable[[Leg, PromptScores], None],
    ) -> None:
        self._worker = worker
        self._thread = thread
        self._waiting_thread = waiting_thread
        self._progress = progress
        self._scored = scored

    async def run(self, computation: Computation, legs: Sequence[Leg]) -> None:
        """All prompts of a wave that ask, in their order; one that is over is left where it is. legs: the wave's."""
        for leg, asked in rows_to_score(legs, self._worker.score_rows):
            if leg.is_over:
                continue
            pending = await self._thread.run("group", self._worker.score, computation, asked)
            scores = await self._landed(pending)
            self._progress.moved()
            if not leg.is_over:
                self._scored(leg, scores)

    async def _landed(self, pending: Pending[PromptScores]) -> PromptScores:
        return pending.result if isinstance(pending, Over) else await self._waiting_thread.run("group", pending.wait)


def rows_to_score(legs: Sequence[Leg], max_rows: int) -> Iterator[tuple[Leg, RowsToScore]]:
    """A wave's rows that have a next token in a prompt that asks, at most max_rows at a time."""
    row = 0
    for leg in legs:
        num_rows, num_top = len(leg.token_ids) - leg.cached_tokens, leg.request.sampling.prompt_logprobs
        if num_top is not None:
            assert not leg.cached_tokens, "a scored prompt is computed whole"
            prompt_ids = leg.request.prompt_ids
            for first in range(1, len(prompt_ids), max_rows):
                next_ids = prompt_ids[first : first + max_rows]
                yield leg, RowsToScore(row_lo=row + first - 1, next_ids=next_ids, first=first, num_top=num_top)
        row += num_rows
