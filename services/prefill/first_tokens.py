"""Decides what the first sampled tokens of a leg mean: which choices end with them, what the gateway and D are told. PURE.

A choice ends on P with its first token: at an end-of-sequence id (unless ignored), a stop id, or max_tokens (all attempts counted).
Before min_tokens neither eos nor stop ids count; the sampler masks them there. Under a constraint any of them ends the choice: the grammar
lets none through without reason (duomo/grammar/state.py).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from duomo.wire.messages import StartPrefill
from duomo.wire.values import EmittedToken, FinishReason, Sampling, Timings, TokenLogprob


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenToken:
    """A sampled token of one choice. logprob: None where the request asked for none; top: the most likely (id, logprob), best first."""

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstTokens:
    """emitted: for the gateway, without cancelled choices. first_token_ids, ended_choices: for D, in the order of StartPrefill.choices."""

    emitted: tuple[EmittedToken, ...]
    first_token_ids: tuple[int, ...]
    ended_choices: tuple[int, ...]


def finish_reason(token_id: int, index: int, sampling: Sampling, eos_ids: Collection[int]) -> FinishReason | None:
    """Whether token `index` (0-based over all attempts) ends its choice."""
    is_held = sampling.constraint is not None
    ends = token_id in sampling.stop_token_ids or (token_id in eos_ids and (is_held or not sampling.ignore_eos))
    if ends and (is_held or index + 1 > sampling.min_tokens):
        return "stop"
    return "length" if index + 1 >= sampling.max_tokens else None


def decide(
    request: StartPrefill, chosen: tuple[ChosenToken, ...], cancelled_choices: Collection[int], eos_ids: Collection[int], timings: Timings
) -> FirstTokens:
    """chosen: one token for each of request.choices, in that order. The first emitted token carries `timings`."""
    assert len(chosen) == len(request.choices), (len(chosen), request.choices)
    index = len(request.emitted_ids)
    emitted: list[EmittedToken] = []
    ended: list[int] = []
    for choice, token in zip(request.choices, chosen, strict=True):
        reason = finish_reason(token.token_id, index, request.sampling, eos_ids)
        if reason is not None or choice in cancelled_choices:
            ended.append(choice)
        if choice in cancelled_choices:
            continue
        logprob = TokenLogprob(logprob=token.logprob, top=token.top) if token.logprob is not None else None
        emitted.append(
            EmittedToken(
                request_id=request.request_id,
                choice=choice,
                attempt=request.attempt,
                index=index,
                token_id=token.token_id,
                logprob=logprob,
                finish_reason=reason,
                timings=timings if not emitted else None,
            )
        )
    return FirstTokens(emitted=tuple(emitted), first_token_ids=tuple(token.token_id for token in chosen), ended_choices=tuple(ended))
