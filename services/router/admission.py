"""Admits, queues or refuses a new request, and places whoever waits. Pure: the pools' views and the line in, one decision out.

A request is refused where it cannot be served in time, as early as that is known, and told when to come back: by then what is too much now
will be done. 429: there is too much to do. 503: something is missing. 400: it would never fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from services.router.policy import (
    Barred,
    DecodeView,
    Need,
    Patience,
    PrefillView,
    Route,
    blocks_for,
    decode_blocks,
    has_decode_room,
    has_prefill_room,
    known_tokens,
    pick_route,
)

RefusalCode = Literal["no_prefill_replica", "no_decode_replica", "queue_full", "never_fits", "too_late", "queue_timeout", "peer_too_old"]

# Other gateways admit too until the next report. A queue that is shorter by as much is still one: what it serves is the same.
CAUTION: Final = 1.15
MIN_RETRY_S: Final = 1.0
MAX_RETRY_S: Final = 60.0
# Restarting a replica takes a few seconds (facts.md: a killed one is replaced in 2.4 to 4.3 s).
_RESTART_S: Final = 3.0


@dataclass(frozen=True, slots=True)
class Admit:
    """Start now, on this route."""

    route: Route


@dataclass(frozen=True, slots=True)
class Queue:
    """Wait for room, at the place that its rank gives it."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """No, as an HTTP status says it. retry_after_s: when there will be room, as far as can be told."""

    status: int
    code: RefusalCode
    detail: str
    retry_after_s: float = MIN_RETRY_S


Decision = Admit | Queue | Refuse


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolsView:
    """Both pools now. barred: breakers that are open. answer_tokens: how long answers are; 0: not known."""

    prefills: Sequence[PrefillView]
    decodes: Sequence[DecodeView]
    barred: Barred = frozenset()
    answer_tokens: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LineView:
    """Who waits already, and what all of them need. may_displace: the request goes before the last of them, who leaves where it is full."""

    num_waiting: int = 0
    max_waiting: int = 0
    work_tokens: int = 0
    num_blocks: int = 0
    num_choices: int = 0
    may_displace: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Until when. left_s: until the first token would come too late: the deadline, or gateway.max_ttft_s, whichever is sooner."""

    left_s: float
    limit: str = "its deadline"


def decide(need: Need, pools: PoolsView, line: LineView, terms: Terms, draw: int = 0) -> Decision:
    """What to do with a new request: those that wait go first, so a line means queueing even where there is room."""
    if not any(view.is_open for view in pools.prefills):
        return Refuse(503, "no_prefill_replica", "No prefill replica is connected.", _RESTART_S)
    if not any(view.is_open for view in pools.decodes):
        return Refuse(503, "no_decode_replica", "No decode replica is connected.", _RESTART_S)
    pools = _knowing(need, pools)
    if (too_old := _too_old(need, pools)) is not None:
        return too_old
    limit = never_fits(need, pools.prefills, pools.decodes) or could_not_go_on(need, pools.prefills)
    if limit is not None:
        return Refuse(400, "never_fits", limit)
    if (now := _fits_none_open(need, pools)) is not None:
        return now
    patience = Patience(left_s=terms.left_s / CAUTION)
    route = None
    if not line.num_waiting:
        route = pick_route(pools.prefills, pools.decodes, need, barred=pools.barred, draw=draw, patience=patience)
    wait_s = 0.0 if not line.num_waiting and _is_idle(need, pools) else first_token_s(need, pools, line)
    if wait_s * CAUTION > terms.left_s:
        return _too_late(wait_s, terms)
    if route is not None:
        return Admit(route)
    if line.num_waiting >= line.max_waiting and not line.may_displace:
        return Refuse(429, "queue_full", told_full(line.num_waiting, line.max_waiting), retry_s(wait_s))
    return Queue()


def place(
    need: Need, pools: PoolsView, avoid: frozenset[str], terms: Terms | None, draw: int = 0, waited_s: float = 0.0
) -> Route | Refuse | None:
    """What to do with whoever leads the line: its route, None where it waits on, or why it can wait no more. Both pools are open.

    terms: None of a leg that was running before: what has begun is not given up for being late. waited_s: that it has led the line.
    """
    pools = _knowing(need, pools)
    if (too_old := _too_old(need, pools)) is not None:
        return too_old
    if (now := _fits_none_open(need, pools)) is not None:
        return now
    if terms is not None and not _is_idle(need, pools):
        wait_s = first_token_s(need, pools, LineView())
        if wait_s * CAUTION > terms.left_s:
            return _too_late(wait_s, terms)
    patience = Patience(waited_s) if terms is None else Patience(waited_s, terms.left_s / CAUTION)
    return pick_route(pools.prefills, pools.decodes, need, avoid, pools.barred, draw, patience)


def _knowing(need: Need, pools: PoolsView) -> PoolsView:
    """Without the replicas that are too old to know all that is asked: they would be told less, and answer something else."""
    if all(view.wire_version >= need.wire_version for pool in (pools.prefills, pools.decodes) for view in pool):
        return pools
    prefills = [view for view in pools.prefills if view.wire_version >= need.wire_version]
    return replace(pools, prefills=prefills, decodes=[view for view in pools.decodes if view.wire_version >= need.wire_version])


def _too_old(need: Need, pools: PoolsView) -> Refuse | None:
    """pools: without those that do not know it."""
    for name, views in (("prefill", pools.prefills), ("decode", pools.decodes)):
        if not any(view.is_open for view in views):
            detail = f"No {name} replica that takes requests is new enough to know all that was asked (wire version {need.wire_version})."
            return Refuse(503, "peer_too_old", detail, _RESTART_S)
    return None


def _is_idle(need: Need, pools: PoolsView) -> bool:
    """Whether it could begin now, behind nobody: then nothing that was measured on other prompts may turn it away."""
    is_prefill_idle = any(view.is_open and not view.queued_tokens and has_prefill_room(view, need) for view in pools.prefills)
    return is_prefill_idle and any(view.is_open and has_decode_room(view, need) for view in pools.decodes)


def first_token_s(need: Need, pools: PoolsView, line: LineView) -> float:
    """Predicted seconds until the first token of a request behind all that wait. What is not known counts as nothing.

    Where others wait, as many come behind it into its wave: its first token is there when the wave's are.
    """
    known = [view.tokens_per_s for view in pools.prefills if view.is_open and view.tokens_per_s > 0]
    # One that has just begun has not been measured: it is thought to be as fast as the others are.
    prefills = [_at_least(view, sum(known) / len(known)) for view in pools.prefills if view.is_open] if known else []
    alone_s, queue_s = 0.0, 0.0
    if prefills:
        queue_s, alone_s = min((_prefill_s(view, need, line) for view in prefills), key=sum)
        if line.work_tokens:
            total = sum(view.queued_tokens for view in prefills) + line.work_tokens
            queue_s = max(queue_s, total / sum(view.tokens_per_s for view in prefills))
    return max(queue_s, _decode_room_s(need, pools, line)) + alone_s


def _at_least(view: PrefillView, tokens_per_s: float) -> PrefillView:
    return view if view.tokens_per_s else replace(view, tokens_per_s=tokens_per_s)


def _prefill_s(view: PrefillView, need: Need, line: LineView) -> tuple[float, float]:
    """Until the prompt's wave begins there, and from then until it ends."""
    own = need.num_tokens - known_tokens(view, need)
    company = min(view.queued_tokens + line.work_tokens, max(view.wave_tokens - own, 0))
    return view.queued_tokens / view.tokens_per_s, max((own + company) / view.tokens_per_s, view.wave_s)


def _decode_room_s(need: Need, pools: PoolsView, line: LineView) -> float:
    """Until decode has room for all that wait and this one: so many choices have to end, at the rate of full batches."""
    decodes = [view for view in pools.decodes if view.is_open]
    if not line.num_choices and any(has_decode_room(view, need) for view in decodes):
        return 0.0
    own_blocks = min((decode_blocks(need, view.block_tokens) for view in decodes), default=0)
    num_free = sum(max(view.free_blocks - view.watermark_blocks, 0) for view in decodes)
    num_places = sum(max(view.max_choices - view.num_choices, 0) for view in decodes)
    lacking_blocks = max(line.num_blocks + own_blocks - num_free, 0)
    lacking = max(lacking_blocks * need.num_choices / max(own_blocks, 1), line.num_choices + need.num_choices - num_places, 0)
    ends_per_s = sum(
        min(max(view.num_choices, 1), view.max_choices) / (pools.answer_tokens * view.step_s)
        for view in decodes
        if pools.answer_tokens * view.step_s > 0
    )
    return lacking / ends_per_s if ends_per_s else 0.0


def retry_s(wait_s: float) -> float:
    """What Retry-After says where something is over in wait_s: neither at once nor never."""
    return min(max(wait_s, MIN_RETRY_S), MAX_RETRY_S)


def told_full(num_waiting: int, max_waiting: int) -> str:
    return f"{num_waiting} requests already wait for room in the pools, the limit is {max_waiting}."


def _too_late(wait_s: float, terms: Terms) -> Refuse:
    left_s = max(terms.left_s, 0.0)
    detail = f"The first token would come in about {wait_s:.1f} s, and {left_s:.1f} s are left until {terms.limit}."
    return Refuse(429, "too_late", detail, retry_s(wait_s * CAUTION - terms.left_s))


def never_fits(need: Need, prefills: Sequence[PrefillView], decodes: Sequence[DecodeView]) -> str | None:
    """Why this need fits no replica of a pool even when that is empty, with the limit; None where it fits one of each.

    D must hold the start of all choices at once, and one choice to its last token (it may be preempted, but must end).
    """
    most_prefill = max(view.num_blocks * view.block_tokens for view in prefills)
    if need.num_tokens > most_prefill:
        return f"The prompt has {need.num_tokens} tokens; the prefill pool holds at most {most_prefill} at once."
    total = need.num_tokens + need.new_tokens
    if not any(_fits_empty(view, need) for view in decodes):
        limit = max(view.num_blocks * view.block_tokens for view in decodes)
        return (
            f"{need.num_choices} choice(s) of {total} tokens (prompt and completion) do not fit the decode pool, which holds at most "
            f"{limit} tokens at once."
        )
    return None


def _fits_none_open(need: Need, pools: PoolsView) -> Refuse | None:
    """Where only replicas that take nothing any more could hold it, or none. Both pools are open."""
    limit = never_fits(need, [view for view in pools.prefills if view.is_open], [view for view in pools.decodes if view.is_open])
    return (
        None
        if limit is None
        else Refuse(503, "never_fits", f"Of the replicas that take requests now none could serve it: {limit}", _RESTART_S)
    )


def could_not_go_on(need: Need, prefills: Sequence[PrefillView]) -> str | None:
    """Why a new request could not go on elsewhere to its end, with the limit: P computes again what a choice has by then, at most all but
    its last token. Not asked of a leg that has begun: it may end long before.
    """
    total, most = need.num_tokens + need.new_tokens, max(view.num_blocks * view.block_tokens for view in prefills)
    if total - 1 <= most:
        return None
    return (
        f"A choice of {total} tokens (prompt and completion) could not go on elsewhere: the prefill pool, which computes it again then, "
        f"holds at most {most} tokens at once."
    )


def _fits_empty(view: DecodeView, need: Need) -> bool:
    whole = blocks_for(need.num_tokens + need.new_tokens, view.block_tokens)
    return max(whole, decode_blocks(need, view.block_tokens)) <= view.num_blocks
