"""Which session a call belongs to, and that its calls meet on the same replicas."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from duomo.errors import RequestError
from duomo.wire.messages import StartDecode, StartPrefill
from services.router.session import MAX_SESSION_CHARS, asked_session, session_of
from tests.services.router.stub_replicas import Script
from tests.services.router.stub_system import stub_system

CHAT = {"model": "tiny-moe", "max_tokens": 2}


def test_the_header_goes_before_the_field_and_keys_have_sessions_of_their_own() -> None:
    assert (asked_session([]), asked_session([" a "])) == ("", "a")
    assert session_of("", "", "k") == "" and session_of("a", "b", "k") == session_of("a", "", "k") != session_of("a", "", "")
    assert session_of("", "b", "k") == session_of("b", "", "k")


@pytest.mark.parametrize("values", [["a", "a"], ["x" * (MAX_SESSION_CHARS + 1)]])
def test_a_header_that_is_none_is_refused_by_name(values: list[str]) -> None:
    with pytest.raises(RequestError, match="X-Session-Id") as refused:
        asked_session(values)
    assert refused.value.param == "X-Session-Id"


def test_calls_of_a_session_go_to_one_pair_and_sessions_spread(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, Script(), num_prefills=4, num_decodes=2) as system:

            async def call(number: int, session: str, *, by_header: bool) -> None:
                messages = [{"role": "user", "content": f"{number} says something else each time"}]
                named = {} if by_header else {"prompt_cache_key": session}
                headers = {"x-session-id": session} if by_header else {}
                answer = await system.client.post("/v1/chat/completions", json=CHAT | {"messages": messages} | named, headers=headers)
                assert answer.status_code == 200, answer.text

            places = set()
            for session in "abcdefghijklmnop":
                before = {replica.replica_id: len(replica.seen) for replica in system.pools.replicas}
                for number in range(2):
                    await call(number, session, by_header=number % 2 == 0)
                used = {
                    replica.replica_id
                    for replica in system.pools.replicas
                    if any(isinstance(one, StartPrefill | StartDecode) for one in replica.seen[before[replica.replica_id] :])
                }
                assert len(used) == 2, (session, used)
                places |= used
            assert len(places) >= 4
            long = await system.client.post("/v1/chat/completions", json=CHAT | {"messages": [], "prompt_cache_key": "x" * 257})
            assert long.status_code == 400
            assert 'reason="session"' in system.gateway.metrics.render().decode()

    asyncio.run(scenario())
