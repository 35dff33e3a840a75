"""Picks the pair (P, D) of one leg, with the reasons. Pure: views in, a route out; knows no socket, clock or request state.

P: where the least is to be done: what waits there to be computed, and of this prompt what is not known there. A known prefix counts more
than the work it saves this prompt: computed elsewhere it takes time from others there, and the place of what they know. But no prefix ties
everybody to one replica: a queue that is longer than it is worth is left for another, which then knows it too.
D: the emptier by the fuller of its memory and its batch, what it knows of the prompt counting in its favour: that is not sent again.
Who of several about as good: preference.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final

from duomo.wire.messages import WIRE_VERSION
from services.router.preference import Offer, Slack, choose
from services.router.prefix_index import PrefixIndex

Barred = frozenset[tuple[str, ...]]

PREFIX_WORTH: Final = 3  # times the tokens that are known: bench/results/routing_sim.json has it beside 1 and others
NEAR_SHARE: Final = 0.1  # prefill replicas within a tenth, and two blocks, of the least work are about as good: reports are no better
SESSION_SHARE: Final = 0.25  # of a wave: so much more work a session's own place may have
MAX_SLOWNESS: Final = 4.0  # more is rather what was measured (small waves, other work) than what the machine is
NEAR_FILL: Final = 0.05  # of a decode replica
SESSION_FILL: Final = 0.15
PREFIX_FILL: Final = 0.25  # a prompt that is all known to a decode replica makes up for so much of its fill


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillView:
    """A prefill replica as the gateway knows it now. queued_tokens: prompt tokens there yet to be computed, whoever sent them.

    room_tokens: prompts that wait there, but of each a wave at most: shorter prompts overtake what is longer than a wave, so that it keeps
    nobody here. tokens_per_s, wave_s: how fast it computes, and what its smallest wave takes; 0: not known. wire_version: what it reads.
    """

    key: str
    queued_tokens: int
    room_tokens: int
    num_blocks: int
    block_tokens: int
    wave_tokens: int
    max_queued_tokens: int
    is_open: bool = True
    prefixes: PrefixIndex | None = None
    tokens_per_s: float = 0.0
    wave_s: float = 0.0
    wire_version: int = WIRE_VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeView:
    """A decode replica. free_blocks: neither held nor promised to anybody; num_choices: those that run or wait there.

    step_s: what a step takes; 0: not known. wire_version: what it reads.
    """

    key: str
    free_blocks: int
    num_blocks: int
    block_tokens: int
    watermark_blocks: int
    num_choices: int
    max_choices: int
    is_open: bool = True
    prefixes: PrefixIndex | None = None
    step_s: float = 0.0
    wire_version: int = WIRE_VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What one leg takes. num_tokens: prompt and emitted tokens; new_tokens: still to be generated, at most, for each choice.

    ahead_tokens: how much of new_tokens is reserved at the start (decode.admit_ahead_tokens). digests: of the prompt's blocks
    (prefix_index.py). session: legs of the same one go to the same place where nothing speaks against it; "": none. wire_version: the least
    that both replicas have to read, to know all that is asked.
    """

    num_tokens: int
    new_tokens: int
    num_choices: int
    ahead_tokens: int
    digests: tuple[int, ...] = ()
    session: str = ""
    wire_version: int = 0


@dataclass(frozen=True, slots=True)
class Route:
    """The chosen pair, why each of them, how many of D's blocks it reserves, what it counts against P's room, what P seems to know."""

    prefill: str
    decode: str
    reason: str
    num_blocks: int
    room_tokens: int
    decode_reason: str = ""
    known_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a leg may wait for a replica that knows its prompt. waited_s: that it has led the line; left_s: until its first token is
    due."""

    waited_s: float = 0.0
    left_s: float = math.inf


PATIENT: Final = Patience()


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


def known_tokens(view: PrefillView | DecodeView, need: Need) -> int:
    """How many of the prompt's first tokens this replica seems to have the KV of."""
    return 0 if view.prefixes is None else view.prefixes.num_known(need.digests) * view.block_tokens


def pick_route(
    prefills: Sequence[PrefillView],
    decodes: Sequence[DecodeView],
    need: Need,
    avoid: frozenset[str] = frozenset(),
    barred: Barred = frozenset(),
    draw: int = 0,
    patience: Patience = PATIENT,
) -> Route | None:
    """The pair for this leg, or None where no replica of one pool has room now, or one is worth waiting for.

    Replicas in `avoid` (they just failed this request), and replicas (key,) and pairs (P, D) in `barred` (their breaker is open), are taken
    only where no other has room. draw: a number drawn anew for each choice, so that several gateways do not all take the same replica.
    """
    open_prefills = [view for view in prefills if view.is_open and has_prefill_room(view, need)]
    open_decodes = [view for view in decodes if view.is_open and has_decode_room(view, need)]
    if not open_prefills or not open_decodes:
        return None
    tier = ""
    if avoid or barred:
        pairs, tier = _least_bad(list(product(open_prefills, open_decodes)), avoid, barred)
        open_prefills = list({one.key: one for one, _ in pairs}.values())
    prefill, reason = _pick_prefill(open_prefills, need, draw)
    others = [view for view in prefills if view.is_open and view.key not in avoid and (view.key,) not in barred]
    if _is_worth_waiting(others, prefill, need, patience):
        return None
    if tier:
        open_decodes = [other for one, other in pairs if one is prefill]
    decode, decode_reason = _pick_decode(open_decodes, need, draw // 65_536)
    return Route(
        prefill.key,
        decode.key,
        tier or reason,
        decode_blocks(need, decode.block_tokens),
        _room_tokens(prefill, need),
        tier or decode_reason,
        known_tokens(prefill, need),
    )


Pair = tuple[PrefillView, DecodeView]


def _least_bad(pairs: list[Pair], avoid: frozenset[str], barred: Barred) -> tuple[list[Pair], str]:
    """Pairs that failed least, and what that says of the choice."""

    def badness(pair: Pair) -> tuple[bool, int]:
        return _is_barred(pair, barred), (pair[0].key in avoid) + (pair[1].key in avoid)

    bad = [badness(pair) for pair in pairs]
    least = min(bad)
    if least[0]:
        why = "only_barred_left"
    elif least[1]:
        why = "only_failed_left"
    else:
        why = "avoid_failed" if avoid else "avoid_barred"
    return [pair for pair, each in zip(pairs, bad, strict=True) if each == least], why


def _is_barred(pair: Pair, barred: Barred) -> bool:
    prefill, decode = pair[0].key, pair[1].key
    return (prefill,) in barred or (decode,) in barred or (prefill, decode) in barred


def _is_worth_waiting(others: Sequence[PrefillView], chosen: PrefillView, need: Need, patience: Patience) -> bool:
    """Whether one that has no room now knows more of the prompt, is cheaper with all that it has to do, and comes in time: its first token
    by prefill's pace, and its room before a wave of its own is over. What has no pace yet is not waited for.

    Else, once there is a line, its head would go to the one replica that has room, whatever that knows; all would be computed everywhere,
    caches would lose what others need, and the line would stay.
    """
    full = [view for view in others if view.tokens_per_s and not has_prefill_room(view, need)]
    offers = _prefill_offers([chosen, *full], need)
    known, cost = offers[chosen.key].worth, offers[chosen.key].cost
    return any(
        offers[view.key].worth > known
        and offers[view.key].cost < cost
        and patience.waited_s * view.tokens_per_s <= view.wave_tokens
        and view.queued_tokens + need.num_tokens - offers[view.key].worth <= patience.left_s * view.tokens_per_s
        for view in full
        if blocks_for(need.num_tokens, view.block_tokens) <= view.num_blocks
    )


def _prefill_offers(views: Sequence[PrefillView], need: Need) -> dict[str, Offer]:
    """Costs are tokens of the fastest one: what a slower one has to do takes as long as more of them."""
    fastest = max(view.tokens_per_s for view in views)
    offers = {}
    for view in views:
        known = known_tokens(view, need)
        slowness = min(fastest / view.tokens_per_s, MAX_SLOWNESS) if view.tokens_per_s else 1.0
        own = (view.queued_tokens + need.num_tokens - known) * slowness
        offers[view.key] = Offer(key=view.key, cost=own - min((PREFIX_WORTH - 1) * known, view.wave_tokens), worth=known)
    return offers


def _pick_prefill(views: Sequence[PrefillView], need: Need, draw: int) -> tuple[PrefillView, str]:
    offers = _prefill_offers(views, need)
    least = max(min(offer.cost for offer in offers.values()), 0.0)
    small = 2 * views[0].block_tokens
    slack = Slack(
        draw=NEAR_SHARE * least + small,
        session=NEAR_SHARE * least + SESSION_SHARE * views[0].wave_tokens,
        worth=NEAR_SHARE * need.num_tokens + small,
    )
    chosen, why = choose(list(offers.values()), slack, need.session, draw)
    view = next(view for view in views if view.key == chosen.key)
    if why in ("cheapest", "drawn") and chosen.worth > min(offer.worth for offer in offers.values()):
        return view, "prefix"
    return view, _REASONS[why]


def _pick_decode(views: Sequence[DecodeView], need: Need, draw: int) -> tuple[DecodeView, str]:
    offers = {}
    for view in views:
        known = known_tokens(view, need)
        blocks = view.num_blocks - view.free_blocks + decode_blocks(need, view.block_tokens)
        fill = max(blocks / view.num_blocks, (view.num_choices + need.num_choices) / view.max_choices)
        offers[view.key] = Offer(key=view.key, cost=fill - PREFIX_FILL * known / need.num_tokens, worth=known)
    worth = NEAR_SHARE * need.num_tokens + 2 * views[0].block_tokens
    chosen, why = choose(list(offers.values()), Slack(draw=NEAR_FILL, session=SESSION_FILL, worth=worth), need.session, draw)
    view = next(view for view in views if view.key == chosen.key)
    if why in ("cheapest", "drawn") and chosen.worth > min(offer.worth for offer in offers.values()):
        return view, "prefix"
    return view, _REASONS[why]


_REASONS: Final = {"only_one": "only_one", "session": "session", "cheapest": "least_loaded", "drawn": "drawn"}
