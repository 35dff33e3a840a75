"""The pure choice of a pair: room, prefixes, load, sessions, faults, and that it does not herd."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from services.router.policy import (
    DecodeView,
    Need,
    Patience,
    PrefillView,
    decode_blocks,
    has_decode_room,
    has_prefill_room,
    known_tokens,
    pick_route,
)
from services.router.prefix_index import PrefixIndex


def prefill(key: str, queued: int = 0, **fields: object) -> PrefillView:
    limits = {"num_blocks": 512, "block_tokens": 16, "wave_tokens": 512, "max_queued_tokens": 4096}
    return PrefillView(**({"key": key, "queued_tokens": queued, "room_tokens": queued} | limits | fields))


def decode(key: str, free: int = 100, **fields: object) -> DecodeView:
    told = {"free_blocks": free, "num_blocks": 128, "block_tokens": 16, "watermark_blocks": 8, "num_choices": 1, "max_choices": 64}
    return DecodeView(**({"key": key} | told | fields))


def knowing(*digests: int) -> PrefixIndex:
    index = PrefixIndex(512)
    index.told(digests)
    return index


NEED = Need(num_tokens=100, new_tokens=64, num_choices=1, ahead_tokens=256)
CHAIN = Need(num_tokens=100, new_tokens=64, num_choices=1, ahead_tokens=256, digests=(1, 2, 3, 4, 5, 6))


def test_least_work_and_least_fill() -> None:
    route = pick_route([prefill("a", 900), prefill("b", 30)], [decode("x", 50), decode("y", 90)], NEED)
    assert route is not None and (route.prefill, route.decode) == ("b", "y")
    assert (route.reason, route.decode_reason) == ("least_loaded", "least_loaded")
    crowded = [decode("x", 100, num_choices=60), decode("y", 60, num_choices=2)]
    assert pick_route([prefill("a")], crowded, NEED).decode == "y", "the batch is the fuller of the two"
    assert pick_route([prefill("a")], [decode("x")], NEED).reason == "only_one"


def test_a_known_prefix_is_worth_the_work_it_saves_and_no_more() -> None:
    knows = prefill("a", 90, prefixes=knowing(4))
    route = pick_route([knows, prefill("b", 60)], [decode("x")], CHAIN)
    assert (route.prefill, route.reason, route.known_tokens) == ("a", "prefix", 64), "90 + 100 - 3 * 64 against 60 + 100"
    route = pick_route([prefill("a", 600, prefixes=knowing(4)), prefill("b", 60)], [decode("x")], CHAIN)
    assert (route.prefill, route.known_tokens) == ("b", 0), "a queue that is longer than the prefix is left for it"
    fast = [prefill("a", 200, tokens_per_s=4000.0), prefill("b", 60, tokens_per_s=1000.0)]
    assert pick_route(fast, [decode("x")], NEED).prefill == "a", "300 tokens at 4,000 a second against 160 at 1,000"


def test_a_replica_that_knows_the_prompt_is_waited_for_while_that_costs_less() -> None:
    full = {"room_tokens": 4096, "prefixes": knowing(4), "tokens_per_s": 100.0}
    knows, free = prefill("a", 90, **full), prefill("b", 60)
    assert pick_route([knows, free], [decode("x")], CHAIN) is None, "90 + 100 - 3 * 64 against 60 + 100"
    assert pick_route([prefill("a", 600, **full), free], [decode("x")], CHAIN).prefill == "b", "it would wait too long"
    assert pick_route([knows, prefill("b", 60, prefixes=knowing(4))], [decode("x")], CHAIN).prefill == "b", "which knows as much"
    assert pick_route([knows, free], [decode("x")], NEED).prefill == "b", "nobody knows this one"
    assert pick_route([prefill("a", 90, is_open=False, **full), free], [decode("x")], CHAIN).prefill == "b"
    assert pick_route([prefill("a", 90, num_blocks=6, **full), free], [decode("x")], CHAIN).prefill == "b", "it never fits there"
    for passed_by in ({"avoid": frozenset("a")}, {"barred": frozenset({("a",)})}):
        assert pick_route([knows, free], [decode("x")], CHAIN, **passed_by).prefill == "b", "nobody waits for what failed"
    elsewhere = {"barred": frozenset({("z",), ("a", "y")})}
    assert pick_route([knows, free], [decode("x")], CHAIN, **elsewhere) is None, "what others failed at says nothing of it"
    unmeasured = replace(knows, tokens_per_s=0.0)
    assert pick_route([unmeasured, free], [decode("x")], CHAIN).prefill == "b", "nobody knows how long"
    for patience, waits in (((5.12, 1.26), True), ((5.2, 9.0), False), ((0.0, 1.25), False)):  # a wave: 5.12 s; 126 tokens: 1.26 s
        route = pick_route([knows, free], [decode("x")], CHAIN, patience=Patience(*patience))
        assert (route is None) == waits, "a wave at most, and only where its first token comes in time"


def test_decode_sends_less_where_it_knows_the_prompt() -> None:
    route = pick_route([prefill("a")], [decode("x", 80, prefixes=knowing(6)), decode("y", 95)], CHAIN)
    assert (route.decode, route.decode_reason) == ("x", "prefix")
    assert pick_route([prefill("a")], [decode("x", 30, prefixes=knowing(6)), decode("y", 95)], CHAIN).decode == "y", "it is too full"


def test_a_session_keeps_its_place_unless_something_speaks_against_it() -> None:
    prefills, decodes = [prefill(key) for key in "abcd"], [decode(key) for key in "wxyz"]
    places = {}
    for number in range(64):
        need = Need(num_tokens=100, new_tokens=64, num_choices=1, ahead_tokens=256, session=f"s{number}")
        routes = {pick_route(prefills, decodes, need, draw=draw) for draw in range(0, 2**32, 2**28)}
        assert len(routes) == 1, "whatever is drawn"
        places[number] = route = routes.pop()
        assert (route.reason, route.decode_reason) == ("session", "session")
        fewer = [view for view in prefills if view.key != "a"]
        moved = pick_route(fewer, decodes, need)
        assert moved.prefill == route.prefill or route.prefill == "a", "only the sessions of the one that is gone move"
    assert set(Counter(route.prefill for route in places.values())) == set("abcd")
    need = Need(num_tokens=100, new_tokens=64, num_choices=1, ahead_tokens=256, session="s0", digests=CHAIN.digests)
    own = places[0].prefill
    assert pick_route([prefill(key, 900 * (key == own)) for key in "abcd"], decodes, need).prefill != own, "too much waits there"
    other = next(key for key in "abcd" if key != own)
    informed = [prefill(key, prefixes=knowing(6) if key == other else None) for key in "abcd"]
    assert pick_route(informed, decodes, need).prefill == other, "its prompts are known elsewhere"


@given(loads=st.lists(st.integers(0, 40), min_size=2, max_size=8), seed=st.integers(0, 2**32 - 1))
def test_among_those_about_as_good_gateways_spread(loads: list[int], seed: int) -> None:
    draws = random.Random(seed)
    prefills = [prefill(f"p{idx}", load) for idx, load in enumerate(loads)]
    chosen = Counter(pick_route(prefills, [decode("x")], NEED, draw=draws.getrandbits(32)).prefill for _ in range(200))
    near = [view for view in prefills if view.queued_tokens + 100 <= (min(loads) + 100) * 1.1 + 32]
    assert set(chosen) <= {view.key for view in near}
    if len(near) > 1:
        assert max(chosen.values()) < 200, "not all take the same one"


def test_the_failed_are_taken_last_and_the_reason_says_so() -> None:
    avoid = frozenset({"b"})
    route = pick_route([prefill("a", 900), prefill("b", 30)], [decode("x")], NEED, avoid)
    assert route is not None and (route.prefill, route.reason) == ("a", "avoid_failed")
    route = pick_route([prefill("b")], [decode("x")], NEED, avoid)
    assert route is not None and (route.prefill, route.reason) == ("b", "only_failed_left")


def test_open_breakers_of_replicas_and_pairs_are_passed_by_while_others_have_room() -> None:
    prefills, decodes = [prefill("a"), prefill("b", 900)], [decode("x"), decode("y", 20)]
    route = pick_route(prefills, decodes, NEED, barred=frozenset({("a",)}))
    assert (route.prefill, route.decode, route.reason) == ("b", "x", "avoid_barred")
    route = pick_route(prefills, decodes, NEED, barred=frozenset({("a", "x")}))
    assert (route.prefill, route.decode) in {("b", "x"), ("a", "y")} and route.reason == "avoid_barred"
    route = pick_route(prefills[:1], decodes[:1], NEED, barred=frozenset({("a", "x")}))
    assert (route.prefill, route.decode, route.reason) == ("a", "x", "only_barred_left")
    route = pick_route(prefills, decodes[:1], NEED, frozenset({"b"}), barred=frozenset({("a",)}))
    assert (route.prefill, route.reason) == ("b", "only_failed_left"), "what failed this request goes before what fails all"


def test_closed_full_or_draining_replicas_get_nothing() -> None:
    assert pick_route([prefill("a", is_open=False)], [decode("x")], NEED) is None
    assert pick_route([prefill("a")], [decode("x", 18)], NEED) is None, "11 blocks and the watermark of 8 are 19"
    assert pick_route([prefill("a")], [decode("x", 19)], NEED) is not None
    assert pick_route([prefill("a")], [decode("x", 11, num_choices=0)], NEED) is not None, "alone it needs no watermark"
    assert pick_route([prefill("a")], [decode("x", num_choices=64)], NEED) is None
    assert pick_route([prefill("a", 4000)], [decode("x")], NEED) is None
    assert pick_route([], [decode("x")], NEED) is None


def test_a_prompt_longer_than_a_wave_keeps_nobody_from_the_queue() -> None:
    """Shorter ones overtake it there. It counts as a wave, and another like it as one more."""
    long = Need(num_tokens=6000, new_tokens=64, num_choices=1, ahead_tokens=256)
    free, room = prefill("a"), 4096
    assert pick_route([free], [decode("x", 500, num_blocks=600)], long).room_tokens == 512
    busy = prefill("a", 6000, room_tokens=512)
    assert has_prefill_room(busy, NEED) and has_prefill_room(busy, long)
    assert not has_prefill_room(prefill("a", 48_000, room_tokens=room), long) and not has_prefill_room(
        prefill("a", 48_000, room_tokens=room), NEED
    )
    assert pick_route([busy, prefill("b", 900)], [decode("x")], NEED).prefill == "b", "where it would wait longer is still known"


def test_choices_share_full_prompt_blocks_only() -> None:
    assert decode_blocks(Need(num_tokens=33, new_tokens=15, num_choices=3, ahead_tokens=256), 16) == 2 + 3 * 1
    assert decode_blocks(Need(num_tokens=32, new_tokens=1000, num_choices=2, ahead_tokens=256), 16) == 2 + 2 * 16


@given(
    queued=st.lists(st.integers(0, 5000), min_size=1, max_size=5),
    known=st.lists(st.integers(0, 6), min_size=5, max_size=5),
    free=st.lists(st.integers(0, 128), min_size=1, max_size=5),
    new=st.integers(1, 900),
    draw=st.integers(0, 2**32 - 1),
)
def test_a_route_always_has_room_and_none_is_much_better(queued: list[int], known: list[int], free: list[int], new: int, draw: int) -> None:
    need = Need(num_tokens=100, new_tokens=new, num_choices=1, ahead_tokens=256, digests=CHAIN.digests)
    prefills = [prefill(f"p{idx}", num, prefixes=knowing(known[idx])) for idx, num in enumerate(queued)]
    decodes = [decode(f"d{idx}", num) for idx, num in enumerate(free)]
    route = pick_route(prefills, decodes, need, draw=draw)
    can = [view for view in prefills if has_prefill_room(view, need)], [view for view in decodes if has_decode_room(view, need)]
    assert (route is not None) == (bool(can[0]) and bool(can[1]))
    if route is None:
        return
    cost = {view.key: view.queued_tokens + 100 - 3 * known_tokens(view, need) for view in can[0]}
    least = min(cost.values())
    assert cost[route.prefill] <= least + 0.1 * max(least, 0) + 32
    freest = {view.key: view.free_blocks for view in can[1]}
    assert freest[route.decode] >= max(freest.values()) - 0.05 * 128
