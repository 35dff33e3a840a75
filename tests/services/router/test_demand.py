"""Replicas wanted, from the gateway's views: load, waiting requests, draining replicas."""

from __future__ import annotations

from services.router.demand import DesiredReplicas, desired_replicas
from services.router.policy import DecodeView, Need, PrefillView


def prefill(key: str, queued_tokens: int = 0, *, is_open: bool = True) -> PrefillView:
    limits = {"num_blocks": 512, "block_tokens": 16, "wave_tokens": 1000, "max_queued_tokens": 8000}
    return PrefillView(key=key, queued_tokens=queued_tokens, room_tokens=queued_tokens, is_open=is_open, **limits)


def decode(key: str, free_blocks: int = 100, num_choices: int = 0, *, is_open: bool = True) -> DecodeView:
    return DecodeView(
        key=key,
        free_blocks=free_blocks,
        num_blocks=100,
        block_tokens=16,
        watermark_blocks=1,
        num_choices=num_choices,
        max_choices=8,
        is_open=is_open,
    )


def need(num_tokens: int = 160) -> Need:
    return Need(num_tokens=num_tokens, new_tokens=160, num_choices=1, ahead_tokens=160)


def test_an_idle_system_wants_one_of_each_and_shrinks_one_at_a_time() -> None:
    assert desired_replicas([prefill("a")], [decode("b")], [], 1000) == DesiredReplicas(1, 1)
    assert desired_replicas([prefill(key) for key in "abc"], [decode(key) for key in "de"], [], 1000) == DesiredReplicas(2, 1)
    assert desired_replicas([], [], [need()], 1000) == DesiredReplicas(1, 1)


def test_prompt_tokens_want_prefill_and_blocks_or_batch_want_decode() -> None:
    assert desired_replicas([prefill("a", 3500)], [decode("b")], [], 1000) == DesiredReplicas(4, 1)
    assert desired_replicas([prefill("a")], [decode("b", free_blocks=10)], [], 1000) == DesiredReplicas(1, 2)
    assert desired_replicas([prefill("a")], [decode("b", num_choices=8)], [], 1000) == DesiredReplicas(1, 2)


def test_waiting_requests_count_against_the_pool_that_has_no_room() -> None:
    waiting = [need()] * 10
    full_decode = desired_replicas([prefill("a")], [decode("b", free_blocks=2, num_choices=4)], waiting, 1000)
    assert full_decode.prefill == 1 and full_decode.decode == 4, "98 and 10 x 20 blocks at 75 of 100"
    full_prefill = desired_replicas([prefill("a", 7950)], [decode("b")], waiting, 1000)
    assert full_prefill == DesiredReplicas(10, 1), "7,950 and 1,600 tokens in waves of 1,000"


def test_a_draining_replica_is_no_replica() -> None:
    views = [decode("a", free_blocks=20), decode("b", is_open=False)]
    assert desired_replicas([prefill("p")], views, [], 1000).decode == 2
