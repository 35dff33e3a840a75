"""Owns the sequences that decode runs: they join, grow, are preempted, emit and end. Knows no socket, no handle and no tensor.

A turn is planned on the event loop (policy.plan_step), run by the step thread, and applied here. Where a worker answers late, the next
turn is planned before this one is applied: a choice then has a token in flight, whose place in its blocks is counted, whose id is unknown.

Blocks given back while a turn runs, or is queued on a GPU, may still be written by it; they are used again only by later turns (steps,
copies, prefill's groups), which the same thread runs after it, on the same stream. So a choice that ends gives its blocks back at once,
though a turn planned before the host knew may have one row more of it: nobody reads what that row writes before the blocks' new owner has
written there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from duomo.engine.decode_step import DecodeRow, Joining
from duomo.engine.sampler import RowSampling, SampledToken, ending_ids, ends_choice
from duomo.wire.values import EmittedToken, FinishReason, TokenLogprob
from services.decode.leg import Choice, Leg, LegState
from services.decode.policy import RunningSequence, plan_step
from services.decode.pool import Pool
from services.decode.worker import StepInput


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchEnds:
    """Whom the batch tells: a choice was preempted, the last choice of a leg has ended."""

    preempted: Callable[[Choice], None]
    finished: Callable[[Leg], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stops:
    """What ends a choice besides its own limits. max_model_tokens bounds prompt and output together."""

    eos_ids: tuple[int, ...]
    max_model_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedStep:
    """One step: whose rows it has, oldest sequence first, and what the worker is given; before the rows forks' blocks are copied."""

    rows: tuple[Choice, ...]
    work: StepInput

    @property
    def is_empty(self) -> bool:
        return not (self.rows or self.work.copies)


class Batch:
    """The running sequences, oldest first."""

    def __init__(self, pool: Pool, stops: Stops, ends: BatchEnds) -> None:
        self._pool = pool
        self._stops = stops
        self._ends = ends
        self._choices: dict[int, Choice] = {}
        self._copies: list[tuple[int, int]] = []
        self._sequence_ids = itertools.count(1)

    def __len__(self) -> int:
        return len(self._choices)

    @property
    def has_work(self) -> bool:
        return bool(self._choices)

    def join(self, leg: Leg) -> None:
        """Take in a leg whose KV is here: its first live choice takes the blocks, the others fork them."""
        assert leg.done is not None and leg.state is LegState.GRANTED
        leg.state = LegState.RUNNING
        ended = {*leg.done.ended_choices, *leg.cancelled_choices}
        self._pool.arrived(leg)
        table, leg.blocks = leg.blocks, []
        live = [
            (number, token_id) for number, token_id in zip(leg.choice_numbers, leg.done.first_token_ids, strict=True) if number not in ended
        ]
        if not live:
            self._pool.give_back(table)
            self._ends.finished(leg)
            return
        tables = [table]
        for _ in live[1:]:
            fork, copy = self._pool.fork(table, leg.num_tokens)
            tables.append(fork)
            if copy is not None:
                self._copies.append(copy)
        promise = leg.table_promise(self._pool.limits)
        ends = ending_ids(leg.sampling, self._stops.eos_ids)
        for (number, token_id), own_table in zip(live, tables, strict=True):
            output_ids = [*leg.emitted_ids, token_id]
            choice = Choice(
                sequence_id=next(self._sequence_ids),
                leg=leg,
                number=number,
                table=own_table,
                num_kv=leg.num_tokens,
                next_token_id=token_id,
                output_ids=output_ids,
                sampling=RowSampling(
                    sampling=leg.sampling,
                    choice=number,
                    prompt_ids=leg.prompt_ids,
                    output_ids=output_ids,
                    ending_ids=ends,
                    grammar=leg.grammar_state(),
                ),
                promised_blocks=promise,
            )
            leg.choices[number] = choice
            self._choices[choice.sequence_id] = choice

    def foreseen(self, leg: Leg) -> StepInput | None:
        """The leg's first step as far as it is known while its KV lands: one choice, and not yet its token. None where its tokens are
        counted or masked: tables of the size of prompt and vocabulary would be filled each time."""
        if leg.sampling.constraint is not None or leg.sampling.logit_bias:
            return None
        sampling = RowSampling(
            sampling=leg.sampling,
            choice=leg.choice_numbers[0],
            prompt_ids=leg.prompt_ids,
            output_ids=[*leg.emitted_ids, 0],
            ending_ids=ending_ids(leg.sampling, self._stops.eos_ids),
        )
        if sampling.has_penalty:
            return None
        table = [*leg.blocks, leg.blocks[-1]]  # the token's own place may lie in a block that it has not taken yet
        row = DecodeRow(source=Joining(token_id=0, sampling=sampling), position=leg.num_tokens, table=table)
        return StepInput(copies=(), rows=(row,))

    def plan(self) -> PlannedStep:
        """Preempt, grow, and say who runs. Every plan that is not empty is run and applied, in this order."""
        going_on = [choice for choice in self._choices.values() if not self._ends_in_flight(choice)]
        limits = self._pool.limits
        block_tokens = limits.block_tokens
        oldest = going_on[: limits.max_batch]
        growing = [choice for choice in oldest if choice.position >= len(choice.table) * block_tokens]
        num_beyond = sum(len(choice.table) >= choice.promised_blocks for choice in growing)
        unpromised = self._pool.unpromised_blocks() if num_beyond else 0
        if unpromised >= num_beyond:
            # The common step: all who grow do so within their promises, or there are blocks for them: nothing is to be decided.
            for choice in growing:
                choice.table.extend(self._pool.take(1))
            return self._planned(oldest)
        sequences = [self._as_sequence(choice) for choice in going_on]
        step = plan_step(limits, unpromised, sequences)
        for sequence_id in step.preempt:
            choice = self._choices[sequence_id]
            self.remove(choice)
            self._ends.preempted(choice)
        for sequence_id in step.grow:
            self._choices[sequence_id].table.extend(self._pool.take(1))
        return self._planned([self._choices[sequence_id] for sequence_id in step.run])

    def _ends_in_flight(self, choice: Choice) -> bool:
        """Whether the token in flight is the last one, whatever it is."""
        return choice.num_in_flight > 0 and self._is_full(choice, len(choice.output_ids) + choice.num_in_flight)

    def _planned(self, choices: Sequence[Choice]) -> PlannedStep:
        rows = tuple(_fed(choice) for choice in choices)
        for row, choice in enumerate(choices):
            choice.num_in_flight += 1
            choice.row = row
        copies, self._copies = tuple(self._copies), []
        return PlannedStep(rows=tuple(choices), work=StepInput(copies=copies, rows=rows))

    def apply(self, step: PlannedStep, tokens: Sequence[SampledToken], routed_RE: NDArray[np.int16]) -> list[tuple[Choice, EmittedToken]]:
        """Take in a step's tokens: what to emit, in row order. Choices that ended meanwhile (cancelled) emit nothing."""
        emitted: list[tuple[Choice, EmittedToken]] = []
        for row, (choice, token) in enumerate(zip(step.rows, tokens, strict=True)):
            if not choice.is_alive:
                continue
            leg = choice.leg
            choice.num_in_flight -= 1
            choice.num_kv += 1
            index = len(choice.output_ids)
            choice.output_ids.append(token.token_id)
            choice.next_token_id = token.token_id
            leg.routed.add(routed_RE[row])
            leg.num_decoded_tokens += 1
            finish_reason = self._finish_reason(choice, token.token_id)
            emission = EmittedToken(
                request_id=leg.request_id,
                choice=choice.number,
                attempt=leg.attempt,
                index=index,
                token_id=token.token_id,
                logprob=_logprob(token),
                finish_reason=finish_reason,
            )
            emitted.append((choice, emission))
            if finish_reason is not None:
                self.remove(choice)
        return emitted

    def _finish_reason(self, choice: Choice, token_id: int) -> FinishReason | None:
        num_output = len(choice.output_ids)
        if ends_choice(token_id, num_output, choice.leg.sampling, choice.sampling.ending_ids):
            return "stop"
        return "length" if self._is_full(choice, num_output) else None

    def _is_full(self, choice: Choice, num_output: int) -> bool:
        """Whether no token may follow so many."""
        return num_output >= choice.leg.sampling.max_tokens or len(choice.leg.prompt_ids) + num_output >= self._stops.max_model_tokens

    def remove(self, choice: Choice) -> None:
        """A choice ends, or gives way: its blocks come back at once. The leg is over when the caller sees that no choice is left."""
        choice.is_alive = False
        del self._choices[choice.sequence_id]
        del choice.leg.choices[choice.number]
        self._pool.ended(choice)

    def _as_sequence(self, choice: Choice) -> RunningSequence:
        return RunningSequence(
            sequence_id=choice.sequence_id,
            order=choice.leg.order,
            priority=choice.leg.priority,
            num_tokens=choice.position + 1,
            num_blocks=len(choice.table),
            own_blocks=self._pool.manager.num_sole(choice.table),
            promised_blocks=choice.promised_blocks,
            is_protected=choice.leg.is_protected,
        )


def _fed(choice: Choice) -> DecodeRow:
    """A token in flight is that of the choice's row in the step planned last: who was not in that step has none."""
    assert choice.num_in_flight <= 1, "a worker is one step ahead at most"
    source = choice.row if choice.num_in_flight else Joining(token_id=choice.next_token_id, sampling=choice.sampling)
    return DecodeRow(source=source, position=choice.position, table=choice.table)


def _logprob(token: SampledToken) -> TokenLogprob | None:
    return None if token.logprob is None else TokenLogprob(logprob=token.logprob, top=token.top)
