"""PURE: which of several offers is taken: the cheapest, or one as good as that. Knows no replica and no request.

Gateways that all took the cheapest would all take the same one until the next report. So among offers that cost about the same two are
drawn and the cheaper of them is taken (the power of two choices); and where there is a session, its own place among them, which is the same
at every gateway and stays when others come or go (rendezvous hashing).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Why = Literal["only_one", "session", "cheapest", "drawn"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """key: whose. cost: in any unit. worth: what would be lost elsewhere (known tokens): a session goes to no place with less of it."""

    key: str
    cost: float
    worth: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Slack:
    """How much dearer than the cheapest counts as about the same: for a draw, and for a session's own place, which may also be worth so
    much less: what all prompts begin with is no reason to bring all sessions to whoever knows it."""

    draw: float
    session: float
    worth: float = 0.0


def choose(offers: Sequence[Offer], slack: Slack, session: str, draw: int) -> tuple[Offer, Why]:
    """One of the offers (at least one), and why. draw: any number, drawn anew for each choice; session: "" for none."""
    assert offers and draw >= 0
    cheapest = min(offers, key=lambda offer: (offer.cost, offer.key))
    if len(offers) == 1:
        return cheapest, "only_one"
    if session:
        near = [offer for offer in offers if offer.cost <= cheapest.cost + slack.session and offer.worth >= cheapest.worth - slack.worth]
        own = max(near, key=lambda offer: _weight(session, offer.key))
        return own, "session"
    near = [offer for offer in offers if offer.cost <= cheapest.cost + slack.draw]
    if len(near) == 1:
        return cheapest, "cheapest"
    near.sort(key=lambda offer: offer.key)
    first, second = (
        near[draw % len(near)],
        near[draw // len(near) % len(near)],
    )  # maybe the same one: of two, too, the dearer is taken at times
    return second if second.cost < first.cost else first, "drawn"


def _weight(session: str, key: str) -> bytes:
    """Of this place for this session; the largest is its own."""
    return hashlib.blake2b(f"{session}\0{key}".encode(), digest_size=8).digest()
