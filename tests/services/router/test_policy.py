"""The pure choice of a pair."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.router.policy import DecodeView, Need, PrefillView, decode_blocks, has_decode_room, has_prefill_room, pick_route


def prefill(key: str, queued: int = 0, **fields: object) -> PrefillView:
    limits = {"num_blocks": 512, "block_tokens": 16, "wave_tokens": 512, "max_queued_tokens": 4096}
    return PrefillView(**({"key": key, "queued_tokens": queued, "room_tokens": queued} | limits | fields))


def decode(key: str, free: int = 100, **fields: object) -> DecodeView:
    told = {"free_blocks": free, "num_blocks": 128, "block_tokens": 16, "watermark_blocks": 8, "num_choices": 1, "max_choices": 64}
    return DecodeView(**({"key": key} | told | fields))


NEED = Need(num_tokens=100, new_tokens=64, num_choices=1, ahead_tokens=256)


def test_fewest_queued_tokens_and_most_free_blocks() -> None:
    route = pick_route([prefill("a", 900), prefill("b", 30)], [decode("x", 50), decode("y", 51)], NEED)
    assert route is not None and (route.prefill, route.decode, route.reason) == ("b", "y", "least_loaded")
    assert pick_route([prefill("b"), prefill("a")], [decode("y"), decode("x")], NEED).prefill == "a", (
        "ties are broken the same way each time"
    )


def test_the_failed_are_taken_last_and_the_reason_says_so() -> None:
    avoid = frozenset({"b"})
    route = pick_route([prefill("a", 900), prefill("b", 30)], [decode("x")], NEED, avoid)
    assert route is not None and (route.prefill, route.reason) == ("a", "avoid_failed")
    route = pick_route([prefill("b")], [decode("x")], NEED, avoid)
    assert route is not None and (route.prefill, route.reason) == ("b", "only_failed_left")
    assert pick_route([prefill("a")], [decode("x")], NEED).reason == "only_pair"


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
    free=st.lists(st.integers(0, 128), min_size=1, max_size=5),
    tokens=st.integers(1, 3000),
    new=st.integers(1, 900),
)
def test_a_route_always_has_room_and_no_better_one_exists(queued: list[int], free: list[int], tokens: int, new: int) -> None:
    need = Need(num_tokens=tokens, new_tokens=new, num_choices=1, ahead_tokens=256)
    prefills = [prefill(f"p{idx}", num) for idx, num in enumerate(queued)]
    decodes = [decode(f"d{idx}", num) for idx, num in enumerate(free)]
    route = pick_route(prefills, decodes, need)
    can = [view for view in prefills if has_prefill_room(view, need)], [view for view in decodes if has_decode_room(view, need)]
    assert (route is not None) == (bool(can[0]) and bool(can[1]))
    if route is not None:
        assert min(view.queued_tokens for view in can[0]) == next(view.queued_tokens for view in can[0] if view.key == route.prefill)
        assert max(view.free_blocks for view in can[1]) == next(view.free_blocks for view in can[1] if view.key == route.decode)
