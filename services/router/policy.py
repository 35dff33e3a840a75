"""Picks the pair (P, D) of one leg, with the reason. Pure: views in, a route out; knows no socket, clock or request state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillView:
    """A prefill replica as the gateway knows it now. queued_tokens: prompt tokens sent and not answered by a first token.

    room_tokens: the same, but of each prompt wave_tokens at most: shorter prompts overtake what is longer than a wave, so that it keeps
    nobody here.
    """

    key: str
    queued_tokens: int
    room_tokens: int
    num_blocks: int
    block_tokens: int
    wave_tokens: int
    max_queued_tokens: int
    is_open: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeView:
    """A decode replica. free_blocks: after every reservation of this gateway; num_choices: those this gateway has there."""

    key: str
    free_blocks: int
    num_blocks: int
    block_tokens: int
    watermark_blocks: int
    num_choices: int
    max_choices: int
    is_open: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What one leg takes. num_tokens: prompt and emitted tokens; new_tokens: still to be generated, at most, for each choice.

    ahead_tokens: how much of new_tokens is reserved at the start (decode.admit_ahead_tokens).
    """

    num_tokens: int
    new_tokens: int
    num_choices: int
    ahead_tokens: int


@dataclass(frozen=True, slots=True)
class Route:
    """The chosen pair, why, how many of D's blocks it reserves, and what it counts against P's room."""

    prefill: str
    decode: str
    reason: str
    num_blocks: int
    room_tokens: int


def blocks_for(num_tokens: int, block_tokens: int) -> int:
    return -(-num_tokens // block_tokens)


def decode_blocks(need: Need, block_tokens: int) -> int:
    """Distinct blocks that D promises to the leg: full prompt blocks once, everything after them for every choice."""
    shared = need.num_tokens // block_tokens
    table = blocks_for(need.num_tokens + min(need.new_tokens, need.ahead_tokens), block_tokens)
    return shared + need.num_choices * (table - shared)


def has_decode_room(view: DecodeView, need: Need) -> bool:
    """A leg alone on a replica needs neither watermark nor a place in the batch beside others (as D's own policy has it)."""
    if view.num_choices == 0:
        return decode_blocks(need, view.block_tokens) <= view.free_blocks
    has_place = view.num_choices + need.num_choices <= view.max_choices
    return has_place and decode_blocks(need, view.block_tokens) + view.watermark_blocks <= view.free_blocks


def has_prefill_room(view: PrefillView, need: Need) -> bool:
    """The prompt fits the replica at all, and its queue is not so long that waiting here serves better."""
    if blocks_for(need.num_tokens, view.block_tokens) > view.num_blocks:
        return False
    return view.room_tokens == 0 or view.room_tokens + _room_tokens(view, need) <= view.max_queued_tokens


def _room_tokens(view: PrefillView, need: Need) -> int:
    return min(need.num_tokens, view.wave_tokens)


def pick_route(
    prefills: Sequence[PrefillView],
    decodes: Sequence[DecodeView],
    need: Need,
    avoid: frozenset[str] = frozenset(),
    barred: frozenset[tuple[str, ...]] = frozenset(),
) -> Route | None:
    """The pair for this leg, or None where no replica of one pool has room now.

    P: fewest queued tokens. D: most free blocks. Replicas in `avoid` (they just failed this request), and replicas (key,) and pairs
    (P, D) in `barred` (their breaker is open), are taken only where no other has room. Ties go to the smallest key, so that the choice can
    be repeated.
    """
    open_prefills = [view for view in prefills if view.is_open and has_prefill_room(view, need)]
    open_decodes = [view for view in decodes if view.is_open and has_decode_room(view, need)]
    if not open_prefills or not open_decodes:
        return None

    def rank(pair: tuple[PrefillView, DecodeView]) -> tuple[object, ...]:
        prefill, decode = pair
        num_failed = (prefill.key in avoid) + (decode.key in avoid)
        return (_is_barred(pair, barred), num_failed, prefill.queued_tokens, prefill.key, -decode.free_blocks, decode.key)

    prefill, decode = pair = min(product(open_prefills, open_decodes), key=rank)
    reason = _reason((len(open_prefills), len(open_decodes)), pair, avoid, barred)
    return Route(prefill.key, decode.key, reason, decode_blocks(need, decode.block_tokens), _room_tokens(prefill, need))


def _is_barred(pair: tuple[PrefillView, DecodeView], barred: frozenset[tuple[str, ...]]) -> bool:
    prefill, decode = pair[0].key, pair[1].key
    return (prefill,) in barred or (decode,) in barred or (prefill, decode) in barred


def _reason(
    num_open: tuple[int, int], pair: tuple[PrefillView, DecodeView], avoid: frozenset[str], barred: frozenset[tuple[str, ...]]
) -> str:
    if _is_barred(pair, barred):
        return "only_barred_left"
    if pair[0].key in avoid or pair[1].key in avoid:
        return "only_failed_left"
    if avoid:
        return "avoid_failed"
    if barred:
        return "avoid_barred"
    return "only_pair" if num_open == (1, 1) else "least_loaded"
