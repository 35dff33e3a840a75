"""Admits, queues or refuses a new request. Pure: the pools' views and the line's length in, one decision out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from services.router.policy import DecodeView, Need, PrefillView, Route, blocks_for, decode_blocks, pick_route

RefusalCode = Literal["no_prefill_replica", "no_decode_replica", "queue_full", "never_fits"]


@dataclass(frozen=True, slots=True)
class Admit:
    """Start now, on this route."""

    route: Route


@dataclass(frozen=True, slots=True)
class Queue:
    """Wait for room, behind those that already wait."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """No. status: 400 where it can never fit, 429 where too many wait, 503 where a pool has no replica.."""

    status: int
    code: RefusalCode
    detail: str
    retry_after_s: float = 1.0


Decision = Admit | Queue | Refuse

# Restarting a replica takes a few seconds (facts.md: a killed one is replaced in 2.4 to 4.3 s).
_RESTART_S = 3.0


def decide(
    need: Need,
    prefills: Sequence[PrefillView],
    decodes: Sequence[DecodeView],
    *,
    num_waiting: int,
    max_waiting: int,
    barred: frozenset[tuple[str, ...]] = frozenset(),
) -> Decision:
    """What to do with a new request: those that wait go first, so a line means queueing even where there is room."""
    if not any(view.is_open for view in prefills):
        return Refuse(503, "no_prefill_replica", "No prefill replica is connected.", _RESTART_S)
    if not any(view.is_open for view in decodes):
        return Refuse(503, "no_decode_replica", "No decode replica is connected.", _RESTART_S)
    limit = never_fits(need, prefills, decodes)
    if limit is not None:
        return Refuse(400, "never_fits", limit)
    route = pick_route(prefills, decodes, need, barred=barred) if num_waiting == 0 else None
    if route is not None:
        return Admit(route)
    if num_waiting >= max_waiting:
        detail = f"{num_waiting} requests already wait for room in the pools, the limit is {max_waiting}."
        return Refuse(429, "queue_full", detail, 1.0)
    return Queue()


def never_fits(need: Need, prefills: Sequence[PrefillView], decodes: Sequence[DecodeView]) -> str | None:
    """Why this need fits no replica of a pool even when that is empty, with the limit; None where it fits one of each.

    D must hold the start of all choices at once, and one choice to its last token (it may be preempted, but must end).
    """
    fits_prefill = any(blocks_for(need.num_tokens, view.block_tokens) <= view.num_blocks for view in prefills)
    if not fits_prefill:
        limit = max(view.num_blocks * view.block_tokens for view in prefills)
        return f"The prompt has {need.num_tokens} tokens; the prefill pool holds at most {limit} at once."
    if any(_fits_empty(view, need) for view in decodes):
        return None
    limit = max(view.num_blocks * view.block_tokens for view in decodes)
    total = need.num_tokens + need.new_tokens
    return (
        f"{need.num_choices} choice(s) of {total} tokens (prompt and completion) do not fit the decode pool, which holds at most "
        f"{limit} tokens at once."
    )


def _fits_empty(view: DecodeView, need: Need) -> bool:
    whole = blocks_for(need.num_tokens + need.new_tokens, view.block_tokens)
    return max(whole, decode_blocks(need, view.block_tokens)) <= view.num_blocks
