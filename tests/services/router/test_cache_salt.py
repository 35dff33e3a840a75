"""Prompts share KV within one API key alone: the salt of a key, and that every leg of a call carries it to both pools."""

from __future__ import annotations

import asyncio
from collections import deque
from pathlib import Path

import pytest

from duomo.wire.messages import Resume, StartDecode, StartPrefill
from services.router.cache_salt import cache_salt
from tests.services.router.stub_replicas import Fault, Script
from tests.services.router.stub_system import stub_system

TEXT = {"model": "tiny-moe", "prompt": "hi", "max_tokens": 12}


def test_a_key_has_one_salt_that_does_not_show_it_and_no_key_has_none() -> None:
    salts = [cache_salt(f"Bearer {key}") for key in ("sk-1", "sk-2", "", "none")]
    assert len({*salts}) == 4 and all(len(salt) == 32 and "sk" not in salt for salt in salts)
    assert cache_salt("Bearer sk-1") == cache_salt(" bearer  sk-1 ") == cache_salt("sk-1")
    assert cache_salt("") == cache_salt("  ") == ""


@pytest.mark.parametrize("fault", [None, "preempt"])
def test_every_leg_of_a_call_is_salted_by_its_key(tmp_path: Path, fault: Fault | None) -> None:
    async def scenario() -> None:
        script = Script(decode_faults=deque([(fault, 4), (None, 0)] * 3))  # the leg that a resume begins meets nothing
        async with stub_system(tmp_path, script) as system:
            (prefill,), (decode,) = system.pools.of_role("prefill"), system.pools.of_role("decode")
            for headers in ({"authorization": "Bearer sk-1"}, {"authorization": "Bearer sk-2"}, {}):
                prefill.seen.clear()
                decode.seen.clear()
                answer = await system.client.post("/v1/completions", json=TEXT, headers=headers)
                assert answer.status_code == 200, answer.text
                starts = [
                    one for replica in (prefill, decode) for one in replica.seen if isinstance(one, StartPrefill | StartDecode | Resume)
                ]
                assert len(starts) == (4 if fault else 2)
                assert {one.cache_salt for one in starts} == {cache_salt(headers.get("authorization", ""))}

    asyncio.run(scenario())
