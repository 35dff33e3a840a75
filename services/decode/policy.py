"""Decides which announced prompts get blocks, which sequences run a step, and which give way. Pure: no clock, no tensor, no socket.

Two rules make the pool free of stalls, and everything below follows from them:

1. A leg is granted with a **promise**: blocks for its prompt and min(remaining max_tokens, admit_ahead_tokens) of every choice. Free
   blocks never fall below the promises still open, so growing within a promise always succeeds.
2. Growing beyond a promise takes a block that nobody was promised, or preempts the newest sequence of the lowest priority, which may be
   the growing one itself. A leg preempted max_preemptions times is **protected**: its promise covers all it can ever need, so it
   neither needs a victim nor is one.

Grants follow the order of announcement strictly (a big prompt is never overtaken for ever). Priority: a higher number is more important.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeLimits:
    """The pool's size and the operator's choices (config.DecodeSection)."""

    num_blocks: int
    block_tokens: int
    watermark_blocks: int
    admit_ahead_tokens: int
    max_batch: int
    max_preemptions: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolView:
    """The pool now. open_promise_blocks: promised to live legs and not yet allocated by them."""

    num_free_blocks: int
    open_promise_blocks: int
    num_live_legs: int
    num_live_choices: int


@dataclass(frozen=True, kw_only=True, slots=True)
class WaitingLeg:
    """An announced and expected leg. num_tokens: prompt and emitted tokens, whose KV arrives; max_new_tokens: still to be generated."""

    leg_id: int
    num_tokens: int
    max_new_tokens: int
    num_choices: int
    is_protected: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Grant:
    """Allocate num_blocks for the KV that lands; promised_blocks is the leg's total over its life, those included."""

    leg_id: int
    num_blocks: int
    promised_blocks: int


@dataclass(frozen=True, kw_only=True, slots=True)
class GrantPlan:
    """never_fit: legs that an empty pool could not hold."""

    grants: tuple[Grant, ...]
    never_fit: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunningSequence:
    """One choice in the batch. num_tokens: KV entries after its next step; promised_blocks: how far its table may grow unasked.

    order: counts up with the leg's admission, so that the largest is the newest. own_blocks: those that no other choice reads.
    """

    sequence_id: int
    order: int
    priority: int
    num_tokens: int
    num_blocks: int
    own_blocks: int
    promised_blocks: int
    is_protected: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPlan:
    """run: the sequences of this step, oldest first; grow: those of them that need one more block first; preempt: who gives way."""

    run: tuple[int, ...]
    grow: tuple[int, ...]
    preempt: tuple[int, ...]


def blocks_for(num_tokens: int, block_tokens: int) -> int:
    """How many blocks hold the KV of num_tokens."""
    return -(-num_tokens // block_tokens)


def table_promise(leg: WaitingLeg, limits: DecodeLimits) -> int:
    """How long one choice's block table may grow without asking, the shared prompt blocks included."""
    ahead = leg.max_new_tokens if leg.is_protected else min(leg.max_new_tokens, limits.admit_ahead_tokens)
    return blocks_for(leg.num_tokens + ahead, limits.block_tokens)


def promised_blocks(leg: WaitingLeg, limits: DecodeLimits) -> int:
    """Distinct blocks of the whole leg: full prompt blocks once, everything after them for every choice."""
    shared = leg.num_tokens // limits.block_tokens
    return shared + leg.num_choices * (table_promise(leg, limits) - shared)


def plan_grants(limits: DecodeLimits, pool: PoolView, waiting: Sequence[WaitingLeg]) -> GrantPlan:
    """Grant from the head of `waiting` (order of announcement) while blocks and places last.

    A leg alone in the pool needs no watermark: otherwise one that just fits would wait for ever.
    """
    grants: list[Grant] = []
    never_fit: list[int] = []
    unpromised = pool.num_free_blocks - pool.open_promise_blocks
    num_legs, num_choices = pool.num_live_legs, pool.num_live_choices
    for leg in waiting:
        promise = promised_blocks(leg, limits)
        if promise > limits.num_blocks:
            never_fit.append(leg.leg_id)
            continue
        is_alone = num_legs == 0
        reserve = 0 if is_alone else limits.watermark_blocks
        has_place = is_alone or num_choices + leg.num_choices <= limits.max_batch
        if promise + reserve > unpromised or not has_place:
            break
        grants.append(Grant(leg_id=leg.leg_id, num_blocks=blocks_for(leg.num_tokens, limits.block_tokens), promised_blocks=promise))
        unpromised -= promise
        num_legs += 1
        num_choices += leg.num_choices
    return GrantPlan(grants=tuple(grants), never_fit=tuple(never_fit))


def plan_step(limits: DecodeLimits, unpromised_blocks: int, sequences: Sequence[RunningSequence]) -> StepPlan:
    """Choose who runs. unpromised_blocks: free blocks beyond all open promises; sequences: oldest first.

    The oldest max_batch sequences run (the rest wait with their blocks). One that grows beyond its promise takes an unpromised block;
    where there is none, the newest unprotected sequence of the lowest priority is preempted, until there is one or the grower is gone.
    """
    candidates = sequences[: limits.max_batch]
    grow: list[int] = []
    beyond: set[int] = set()
    gone: set[int] = set()
    victims: list[RunningSequence] | None = None
    for sequence in candidates:
        if sequence.sequence_id in gone or sequence.num_tokens <= sequence.num_blocks * limits.block_tokens:
            continue
        if sequence.num_blocks < sequence.promised_blocks:
            grow.append(sequence.sequence_id)
            continue
        while unpromised_blocks < 1 and sequence.sequence_id not in gone:
            if victims is None:
                victims = victims_in_order(sequences)
            victim = victims.pop()
            gone.add(victim.sequence_id)
            unpromised_blocks += victim.own_blocks + max(0, victim.promised_blocks - victim.num_blocks)
            unpromised_blocks += victim.sequence_id in beyond  # the block it was given above is not taken after all
        if sequence.sequence_id not in gone:
            grow.append(sequence.sequence_id)
            beyond.add(sequence.sequence_id)
            unpromised_blocks -= 1
    return StepPlan(
        run=tuple(sequence.sequence_id for sequence in candidates if sequence.sequence_id not in gone),
        grow=tuple(sequence_id for sequence_id in grow if sequence_id not in gone),
        preempt=tuple(sequence.sequence_id for sequence in sequences if sequence.sequence_id in gone),
    )


def victims_in_order(sequences: Sequence[RunningSequence]) -> list[RunningSequence]:
    """The unprotected sequences, the next victim last: lowest priority first, the newest of them first."""
    open_to_preemption = [sequence for sequence in sequences if not sequence.is_protected]
    return sorted(open_to_preemption, key=lambda sequence: (-sequence.priority, sequence.order, sequence.sequence_id))
