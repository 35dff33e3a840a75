"""The pure figure of replicas."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.router.scaling import DecodeLoad, PrefillLoad, ScalingLimits, desired_decode, desired_prefill

TOKENS = ScalingLimits(min_replicas=1, max_replicas=8, target=1000)
BLOCKS = ScalingLimits(min_replicas=1, max_replicas=8, target=0.5)


def test_it_grows_at_once_and_shrinks_by_one() -> None:
    assert desired_prefill([PrefillLoad(queued_tokens=3500)], TOKENS) == 4
    assert desired_prefill([PrefillLoad(queued_tokens=0)] * 4, TOKENS) == 3
    assert desired_prefill([PrefillLoad(queued_tokens=2500), PrefillLoad(queued_tokens=0), PrefillLoad(queued_tokens=0)], TOKENS) == 3
    assert desired_prefill([PrefillLoad(queued_tokens=10**6)], TOKENS) == 8 and desired_prefill([], TOKENS) == 1


def test_decode_counts_those_that_wait() -> None:
    idle, busy = DecodeLoad(used_blocks=0, num_blocks=100), DecodeLoad(used_blocks=60, num_blocks=100)
    assert desired_decode([busy], BLOCKS) == 2 and desired_decode([idle, idle], BLOCKS) == 1
    assert desired_decode([DecodeLoad(used_blocks=100, num_blocks=100, queued_blocks=100)], BLOCKS) == 4


@given(loads=st.lists(st.integers(0, 20_000), min_size=1, max_size=8))
def test_it_does_not_flap(loads: list[int]) -> None:
    num = desired_prefill([PrefillLoad(queued_tokens=load) for load in loads], TOKENS)
    assert 1 <= num <= 8 and num >= len(loads) - 1
    if num < len(loads):
        spread = [PrefillLoad(queued_tokens=sum(loads) // num)] * num
        assert desired_prefill(spread, TOKENS) <= num, "what it shrank to does not grow again under the same load"
