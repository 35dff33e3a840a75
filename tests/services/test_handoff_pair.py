"""Real prefill and decode services with a scripted gateway, in one process over loopback: one pair, and two by two under random delays."""

from __future__ import annotations

import asyncio
import functools
import random
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from duomo.wire.messages import Preempted, RequestFailed, RequestFinished
from duomo.wire.values import Sampling
from services.kv_transfer.faults import SeededFaults
from tests.services.decode.rig import configuration
from tests.services.decode.scripted_gateway import ScriptedGateway
from tests.services.decode.scripted_peers import GREEDY, expected, ids, until
from tests.services.pair_rig import System, system


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


@pytest.mark.parametrize("transport", ["loopback", "nixl"])
def test_a_following_turn_sends_only_the_blocks_that_decode_lacks(tmp_path: Path, transport: str) -> None:
    """Bytes counted on both sides, tokens the monolith's. Nothing is shared between keys; a prompt of known whole blocks sends its last."""

    config = configuration(tmp_path, {"kv_transfer": {"transport": transport, "ucx_net_devices": "lo"}})

    async def go() -> None:
        async with system(config, 1, 1) as made:
            prefill, decode = made.prefills[0][0], made.decodes[0][0]
            block_bytes = decode._steps._worker.block_bytes * decode._steps._worker.config.num_layers
            longer = Sampling(max_tokens=70, temperature=0.0, ignore_eos=True)
            made.start("turn 1", ids(90), longer, p=0, d=0, salt="key")
            await made.ended("turn 1", p=0, d=0)
            turn = (*ids(90), *made.tokens("turn 1", p=0, d=0))  # 160 tokens, 159 of them fed: 9 blocks known on D, 5 on P
            follow_ups = {
                "turn 2": ((*turn, *ids(25, 9)), "key", 9, 5),
                "whole blocks": (turn[:144], "key", 8, 8),  # P knows them by now from turn 2
                "other key": ((*turn, *ids(25, 9)), "other key", 0, 0),
                "other head": ((7, *turn[1:]), "key", 0, 0),
            }
            for name, (prompt, salt, on_decode, on_prefill) in follow_ups.items():
                before = {key: decode.report().counters.get(key, 0) for key in ("landed_bytes", "unsent_bytes")}
                computed = prefill.report().counters["prefill_tokens_computed"]
                made.start(name, prompt, longer, p=0, d=0, salt=salt)
                await made.ended(name, p=0, d=0)
                assert made.tokens(name, p=0, d=0) == expected(prompt, longer), name
                after = decode.report().counters
                num_blocks = -(-len(prompt) // 16)
                assert after["landed_bytes"] - before["landed_bytes"] == (num_blocks - on_decode) * block_bytes, name
                assert after.get("unsent_bytes", 0) - before["unsent_bytes"] == on_decode * block_bytes, name
                assert prefill.report().counters["prefill_tokens_computed"] - computed == len(prompt) - 16 * on_prefill, name
            assert decode.report().transport.startswith(transport)
            digests = {service.report().role: service.report().prefix_digests for service in (prefill, decode)}
            assert digests["prefill"] and digests["decode"]
            await made.at_rest()

    asyncio.run(go())


def test_following_turns_over_faulty_rings_with_small_caches(tmp_path: Path) -> None:
    """Corrupt and repeated messages, forks, cancels while KV lands, pools that evict and preempt: whoever is answered is answered right."""
    changes: dict[str, dict[str, object]] = {
        "decode": {"num_blocks": 17, "watermark_blocks": 1, "ring_slots": 3, "admit_ahead_tokens": 4},
        "prefill": {"num_blocks": 24, "send_slots": 2, "grant_timeout_s": 60.0, "prefix_cache_blocks": 9},
        "kv_transfer": {"write_timeout_s": 20.0},
    }
    faults = SeededFaults(seed=3, max_delay_s=0.004, chance_duplicate=0.1, chance_corrupt=0.04, chance_announce_early=0.2)
    sampling = Sampling(max_tokens=20, temperature=0.7, seed=9, ignore_eos=True)

    def is_over(gateway: ScriptedGateway, name: str) -> bool:
        return any(gateway.of(kind, name) for kind in (RequestFinished, RequestFailed, Preempted))

    async def chat(made: System, chat_idx: int) -> int:
        """Turn after turn; how many were answered."""
        prompt, num_answered, draw = ids(20 + 9 * chat_idx, chat_idx % 2), 0, random.Random(chat_idx)
        for turn in range(4):
            name, choices = f"chat {chat_idx} turn {turn}", (0, 1) if chat_idx == 2 else (0,)
            made.start(name, prompt, sampling, p=0, d=0, choices=choices, salt=str(chat_idx % 2))
            if draw.random() < 0.2 or turn == chat_idx == 1:
                await asyncio.sleep(draw.random() * 0.05 * (chat_idx != 1))  # one of them as soon as it is asked for
                for _, gateway in (*made.prefills, *made.decodes):
                    gateway.cancel(name)
                continue
            to_prefill, to_decode = made.prefills[0][1], made.decodes[0][1]
            await until(functools.partial(is_over, to_decode, name), 60.0)
            if to_decode.of(RequestFinished, name):
                await to_prefill.ended(name)
                for choice in choices:
                    assert made.tokens(name, p=0, d=0, choice=choice) == expected(prompt, sampling, choice), name
                prompt, num_answered = (*prompt, *expected(prompt, sampling)[:13]), num_answered + 1
            else:
                for gateway in (to_prefill, to_decode):
                    gateway.cancel(name)
        return num_answered

    async def go() -> None:
        async with system(configuration(tmp_path, changes), 1, 1, faults) as made:
            answered = await asyncio.gather(*(chat(made, chat_idx) for chat_idx in range(5)))
            await made.at_rest()
            counters = made.decodes[0][0].report().counters
            assert sum(answered) >= 8
            for counter in ("unsent_bytes", "prefix_blocks_evicted", "messages_corrupt", "cancelled"):
                assert counters.get(counter), f"{counter}: the test shows nothing of it"

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
