"""Owns the requests of `duomo bench routing`: when they come, of which tokens, and the most that any routing could find of them in caches.

shared_prefixes(...)     prompts of groups that begin alike, as instructions and documents do
fresh(...)               prompts that share nothing, at a rate
trace_of_json(text)      recorded: a JSON list of SimRequest's fields
oracle_tokens(trace)     prompt tokens that an earlier prompt had: one cache of all replicas that forgets nothing, filled as prompts arrive
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

VOCAB = 8000
FIRST_ID = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class SimRequest:
    """One arrival. limit_s: until its first token is of no use; deadline_s: until all of it is. gateway: which of several it goes to."""

    name: str
    at_s: float
    prompt_ids: tuple[int, ...]
    output_tokens: int
    priority: int = 0
    session: str = ""
    gateway: int = 0
    limit_s: float | None = None
    deadline_s: float = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefixes:
    """prompt_tokens of each prompt, `share` of them those of one of num_groups, drawn by weights 1 / rank ** skew (0: evenly)."""

    num_groups: int
    prompt_tokens: int
    share: float
    skew: float = 0.0


def shared_prefixes(num: int, rate: float, kind: Prefixes, *, output_tokens: int, seed: int, num_gateways: int = 1) -> list[SimRequest]:
    """`num` Poisson arrivals at `rate` a second."""
    draw = random.Random(seed)
    shared = round(kind.prompt_tokens * kind.share)
    heads = [_ids(draw, shared) for _ in range(kind.num_groups)]
    weights = [1 / (rank + 1) ** kind.skew for rank in range(kind.num_groups)]
    trace, at_s = [], 0.0
    for number in range(num):
        at_s += draw.expovariate(rate)
        head = draw.choices(heads, weights)[0]
        prompt = (*head, *_ids(draw, kind.prompt_tokens - shared))
        trace.append(
            SimRequest(name=f"r{number}", at_s=at_s, prompt_ids=prompt, output_tokens=output_tokens, gateway=number % num_gateways)
        )
    return trace


def fresh(num: int, rate: float, *, prompt_tokens: tuple[int, int], output_tokens: tuple[int, int], seed: int) -> list[SimRequest]:
    """Poisson arrivals at `rate` a second; lengths drawn evenly between the bounds."""
    draw = random.Random(seed)
    trace, at_s = [], 0.0
    for number in range(num):
        at_s += draw.expovariate(rate)
        ids = _ids(draw, draw.randint(*prompt_tokens))
        trace.append(SimRequest(name=f"r{number}", at_s=at_s, prompt_ids=ids, output_tokens=draw.randint(*output_tokens)))
    return trace


def trace_of_json(text: bytes | str) -> list[SimRequest]:
    """A recorded trace. Raises msgspec.ValidationError naming what is wrong."""
    return msgspec.json.decode(text, type=list[SimRequest])


def oracle_tokens(trace: Sequence[SimRequest], block_tokens: int) -> int:
    """Of full blocks, one token of each prompt always computed, as replicas count."""
    seen: set[int] = set()
    known = 0
    for request in sorted(trace, key=lambda one: one.at_s):
        chain, is_known = 0, True
        for place in range((len(request.prompt_ids) - 1) // block_tokens):
            chain = hash((chain, request.prompt_ids[place * block_tokens : (place + 1) * block_tokens]))
            is_known = is_known and chain in seen
            known += block_tokens * is_known
            seen.add(chain)
    return known


def _ids(draw: random.Random, num: int) -> tuple[int, ...]:
    return tuple(draw.randrange(FIRST_ID, VOCAB) for _ in range(num))
