"""Real prefill and decode services with a scripted gateway, in one process over loopback: one pair, and two by two under random delays."""

from __future__ import annotations

import asyncio
import random
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from duomo.wire.messages import Sampling
from services.kv_transfer.faults import SeededFaults
from tests.services.decode.rig import configuration
from tests.services.decode.scripted_peers import GREEDY, expected, ids
from tests.services.pair_rig import system


def test_a_pair_serves_prompts_of_odd_sizes(tmp_path: Path) -> None:
    async def go() -> None:
        async with system(configuration(tmp_path), 1, 1) as made:
            sizes = (1, 15, 16, 17, 63, 257)
            for size in sizes:
                made.start(f"r{size}", ids(size, size), GREEDY, p=0, d=0)
            for size in sizes:
                await made.ended(f"r{size}", p=0, d=0)
                assert made.tokens(f"r{size}", p=0, d=0) == expected(ids(size, size))
            await made.at_rest()

    asyncio.run(go())


def test_a_pair_serves_choices_and_single_tokens(tmp_path: Path) -> None:
    async def go() -> None:
        async with system(configuration(tmp_path), 1, 1) as made:
            sampling = Sampling(max_tokens=10, temperature=0.8, seed=5, ignore_eos=True)
            made.start("n", ids(21), sampling, p=0, d=0, choices=(0, 1, 2))
            one = Sampling(max_tokens=1, temperature=0.0)
            made.start("one", ids(40), one, p=0, d=0)
            await made.ended("n", p=0, d=0)
            await made.ended("one", p=0, d=0)
            for choice in range(3):
                assert made.tokens("n", p=0, d=0, choice=choice) == expected(ids(21), sampling, choice)
            assert made.tokens("one", p=0, d=0) == expected(ids(40), one)
            await made.at_rest()

    asyncio.run(go())


@pytest.mark.timeout(400)
@settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture], derandomize=True
)
@given(
    seed=st.integers(0, 2**31),
    max_delay_ms=st.sampled_from([0, 3, 30]),
    ring_slots=st.sampled_from([1, 2, 5]),
    num_blocks=st.sampled_from([10, 24]),
)
def test_two_by_two_never_stalls(seed: int, max_delay_ms: int, ring_slots: int, num_blocks: int) -> None:
    """Small pools, tiny rings, random delays and duplicates: every request ends with the right tokens, and everything comes back."""
    folder = Path(tempfile.mkdtemp(prefix="duomo-pair-"))
    draw = random.Random(seed)
    changes: dict[str, dict[str, object]] = {
        "decode": {"num_blocks": num_blocks, "watermark_blocks": 1, "ring_slots": ring_slots},
        "prefill": {"num_blocks": 16, "send_slots": 2, "grant_timeout_s": 60.0},
        "kv_transfer": {"write_timeout_s": 20.0},
    }
    faults = SeededFaults(seed=seed, max_delay_s=max_delay_ms / 1000, chance_duplicate=0.1, chance_announce_early=0.2)

    async def go() -> None:
        async with system(configuration(folder, changes), 2, 2, faults) as made:
            sampling = Sampling(max_tokens=6, temperature=0.0, ignore_eos=True)
            requests = []
            for number in range(12):
                p, d, size = draw.randrange(2), draw.randrange(2), draw.choice([1, 16, 33, 60])
                made.start(f"r{number}", ids(size, size), sampling, p=p, d=d)
                requests.append((f"r{number}", p, d, size))
                await asyncio.sleep(draw.random() * 0.02)
            for request_id, p, d, size in requests:
                await made.ended(request_id, p=p, d=d)
                assert made.tokens(request_id, p=p, d=d) == expected(ids(size, size), sampling)
            await made.at_rest()

    try:
        asyncio.run(go())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
