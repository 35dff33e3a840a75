"""What vLLM's clients send and expect beyond OpenAI's: usage in each chunk, salts, defaults spelled out, answers that fill the context."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from duomo.config_gateway import GatewaySection
from duomo.errors import RequestError
from duomo.wire.messages import StartPrefill
from services.router.cache_salt import cache_salt, salted
from services.router.common_fields import CommonReader
from services.router.openai import RequestParser
from tests.services.router.stub_system import StubSystem, stub_system

PARSER = RequestParser(GatewaySection(), CommonReader(GatewaySection(), "tiny-moe", 8192))
CHAT = {"model": "tiny-moe", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "tiny-moe", "prompt": ["hi", "a longer prompt"]}
COUNTED = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}


async def _events(system: StubSystem, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    answer = await system.client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return [json.loads(line[6:]) for line in answer.text.split("\n\n") if line.startswith("data: {")]


def _asked(system: StubSystem) -> list[StartPrefill]:
    return [one for replica in system.pools.of_role("prefill") for one in replica.of_type(StartPrefill)]


@pytest.mark.parametrize(("path", "body", "num_choices"), [("/v1/chat/completions", CHAT, 2), ("/v1/completions", TEXT, 4)])
def test_each_chunk_counts_its_choices_tokens_where_asked(tmp_path: Path, path: str, body: dict[str, Any], num_choices: int) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path) as system:
            events = await _events(system, path, body | COUNTED | {"n": 2, "max_tokens": 6})
            *chunks, end = events
            assert end["choices"] == [] and end["usage"]["completion_tokens"] == 6 * num_choices
            prompts = [len(start.prompt_ids) for start in _asked(system)]
            counted: dict[int, list[int]] = {}
            for chunk in chunks:
                (choice,), usage = chunk["choices"], chunk["usage"]
                assert usage["prompt_tokens"] == prompts[choice["index"] // 2]
                assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
                counted.setdefault(choice["index"], []).append(usage["completion_tokens"])
            assert len(counted) == num_choices
            for counts in counted.values():
                assert [count for count in counts if count] == [1, 2, 3, 4, 5, 6]
            told = await _events(system, path, body | {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 6})
            assert all(chunk["usage"] is None for chunk in told[:-1]), "null where nobody asked"
            quiet = await _events(
                system, path, body | {"stream": True, "stream_options": {"continuous_usage_stats": True}, "max_tokens": 6}
            )
            assert all("usage" not in chunk for chunk in quiet), "as in vLLM: nothing without include_usage"

    asyncio.run(scenario())


def test_values_that_ask_for_what_is_done_anyway_pass_and_others_are_refused_by_name() -> None:
    chat_only = {"add_generation_prompt": True, "continue_final_message": False, "add_special_tokens": False, "include_reasoning": True}
    shared = {"skip_special_tokens": True, "spaces_between_special_tokens": True, "include_stop_str_in_output": False, "bad_words": []}
    text = {"model": "tiny-moe", "prompt": "hi"}
    PARSER.chat(json.dumps(CHAT | chat_only | shared).encode())
    PARSER.completion(json.dumps(text | shared | {"add_special_tokens": True}).encode())
    asked = [(PARSER.chat, CHAT, chat_only | shared), (PARSER.completion, text, shared | {"add_special_tokens": True})]
    for parse, body, fields in asked:
        for name, value in fields.items():
            with pytest.raises(RequestError, match=name) as refusal:
                parse(json.dumps(body | {name: ["x"] if value == [] else not value}).encode())
            assert refusal.value.param == name


def test_a_salt_parts_prompts_of_one_key(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path) as system:
            for own in ("a", "b", None):
                await system.client.post(
                    "/v1/completions", json=TEXT | {"cache_salt": own, "max_tokens": 1}, headers={"authorization": "sk"}
                )
            assert [start.cache_salt for start in _asked(system)][::2] == [
                salted(cache_salt("sk"), "a"),
                salted(cache_salt("sk"), "b"),
                cache_salt("sk"),
            ]
            long = await system.client.post("/v1/completions", json=TEXT | {"cache_salt": "x" * 257})
            assert long.status_code == 400 and long.json()["error"]["param"] == "cache_salt"

    asyncio.run(scenario())
    assert len({salted("", "a"), salted("", "b"), salted(cache_salt("sk"), "a"), salted("", ""), cache_salt("sk")}) == 5
    assert salted("", "x") != cache_salt("/x") and salted(cache_salt("sk"), "x") != cache_salt(f"{cache_salt('sk')}/x"), "nobody's key"


def test_a_chat_that_names_no_length_may_fill_the_context(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, num_blocks=4096, told="A short answer.") as system:
            answer = await system.client.post("/v1/chat/completions", json=CHAT | {"min_tokens": 600})
            assert answer.status_code == 200, answer.text
            (start,) = _asked(system)
            assert start.sampling.max_tokens == system.gateway.card.context_tokens - len(start.prompt_ids)
            assert answer.json()["choices"][0]["finish_reason"] == "stop"

    asyncio.run(scenario())


def test_it_never_asks_for_more_than_the_pools_hold_or_the_operator_says(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path / "a", num_blocks=4) as system:
            answer = await system.client.post("/v1/chat/completions", json=CHAT)
            assert answer.status_code == 200 and answer.json()["choices"][0]["finish_reason"] == "length"
            (start,) = _asked(system)
            assert start.sampling.max_tokens == 64 - len(start.prompt_ids), "4 blocks of 16 tokens"
        for option, num in (("default_max_tokens", 7), ("max_completion_tokens", 9)):
            async with stub_system(tmp_path / option, overrides={"gateway": {option: num}}) as system:
                await system.client.post("/v1/chat/completions", json=CHAT)
                assert _asked(system)[0].sampling.max_tokens == num

    asyncio.run(scenario())
