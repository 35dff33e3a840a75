"""`max_tokens: 0` with `echo` through the gateway with stub replicas: the prompt alone, whole and streamed, and what is refused."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from pathlib import Path
from typing import Any

import openai
import pytest

from duomo.config_gateway import GatewaySection
from duomo.errors import RequestError
from duomo.wire.messages import StartPrefill
from services.router.common_fields import CommonReader
from services.router.openai import RequestParser
from tests.services.router.stub_replicas import Script
from tests.services.router.stub_system import StubSystem, loaded_text, stub_system

PARSER = RequestParser(GatewaySection(), CommonReader(GatewaySection(), "tiny-moe", 8192))
PROMPT = "Once upon a time"
IDS = list(loaded_text().encode(PROMPT, add_special_tokens=True))
ASKED = {"model": "tiny-moe", "prompt": PROMPT, "max_tokens": 0, "echo": True}
LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


async def completed(system: StubSystem, body: dict[str, Any]) -> dict[str, Any]:
    answer = await system.client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def starts(system: StubSystem) -> list[StartPrefill]:
    return [one for replica in system.pools.of_role("prefill") for one in replica.of_type(StartPrefill)]


def test_the_answer_is_that_of_one_token_less_the_token(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, Script(cached_tokens=3, prefill_s=0.01)) as system:
            for beside in (
                {"logprobs": 2},
                {"logprobs": 0, "prompt_logprobs": 1, "n": 3},
                {"logprobs": 1, "prompt": [IDS, IDS[:1], IDS[:4]]},
            ):
                one = await completed(system, ASKED | beside | {"max_tokens": 1})
                none = await completed(system, ASKED | beside)
                assert len(none["choices"]) == len(one["choices"]) >= 1
                for with_token, without in zip(one["choices"], none["choices"], strict=True):
                    assert without["logprobs"] == {name: with_token["logprobs"][name][:-1] for name in LISTS}
                    assert without["finish_reason"] == "length" and without.get("prompt_logprobs") == with_token.get("prompt_logprobs")
                    assert with_token["text"].startswith(without["text"]) and len(with_token["text"]) > len(without["text"])
                usage = none["usage"]
                assert usage["prompt_tokens"] == usage["total_tokens"] == one["usage"]["prompt_tokens"] and usage["completion_tokens"] == 0
            plain = await completed(system, ASKED | {"return_token_ids": True})
            (choice,) = plain["choices"]
            assert (choice["text"], choice["logprobs"], choice["token_ids"]) == (PROMPT, None, []) and plain["usage"][
                "completion_tokens"
            ] == 0
            assert not system.gateway.dropped_tokens

    asyncio.run(scenario())


def test_it_streams_the_prompt_and_its_end(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path) as system:
            whole = await completed(system, ASKED | {"logprobs": 2})
            async with openai.AsyncOpenAI(base_url=system.base_url + "/v1", api_key="none", max_retries=0) as client:
                options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
                for beside in ({"logprobs": 2}, {}):
                    chunks = [one async for one in await client.completions.create(**ASKED, **beside, **options)]
                    parts = [choice for one in chunks for choice in one.choices]
                    assert "".join(part.text for part in parts) == PROMPT and [part.finish_reason for part in parts] == [None, "length"]
                    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 0
                    assert chunks[-1].usage.prompt_tokens == len(IDS)
                    if beside:
                        told = {name: [value for part in parts for value in getattr(part.logprobs, name)] for name in LISTS}
                        assert told == whole["choices"][0]["logprobs"]

    asyncio.run(scenario())


def test_nothing_is_sampled_by_what_was_asked_and_no_stop_ends_it(tmp_path: Path) -> None:
    """Prefill gives a token whatever was asked: the cheapest one."""

    async def scenario() -> None:
        async with stub_system(tmp_path, Script(eos_at=0)) as system:
            heavy = {"temperature": 1.5, "stop": ["Once"], "logit_bias": {"5": 9}, "guided_regex": "a+", "frequency_penalty": 1, "seed": 3}
            (choice,) = (await completed(system, ASKED | heavy | {"logprobs": 1}))["choices"]
            assert (choice["text"], choice["finish_reason"]) == (PROMPT, "length")
            (start,) = starts(system)
            assert (start.sampling.max_tokens, start.sampling.temperature, start.sampling.prompt_logprobs) == (1, 0.0, 1)
            assert start.sampling.constraint is None and not start.sampling.logit_bias and start.sampling.logprobs is None
            best = await completed(system, ASKED | {"n": 2, "best_of": 5})
            assert len(best["choices"]) == 2 and starts(system)[-1].choices == (0, 1), "of prompts alone none is best"

    asyncio.run(scenario())


def test_it_is_tried_again_where_prefill_fails(tmp_path: Path) -> None:
    async def scenario() -> None:
        script = Script(prefill_faults=deque(["fail"]))
        async with stub_system(tmp_path, script, num_prefills=2, num_decodes=2) as system:
            answer = await completed(system, ASKED | {"logprobs": 1, "n": 2})
            assert [choice["text"] for choice in answer["choices"]] == [PROMPT] * 2 and len(starts(system)) == 2

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("body", "param", "told"),
    [
        ({"echo": False}, "max_tokens", "'max_tokens' must be at least 1: 0 asks for the prompt alone, and needs 'echo' to be true."),
        ({"echo": None, "logprobs": 1, "prompt_logprobs": 1}, "max_tokens", "needs 'echo' to be true"),
        ({"max_tokens": -1}, "max_tokens", "'max_tokens' must be between 0 and 2147483648, got -1."),
        ({"n": 3, "best_of": 2}, "best_of", "must be at least 'n'"),
    ],
)
def test_what_it_cannot_mean_is_refused_by_its_name(body: dict[str, Any], param: str, told: str) -> None:
    with pytest.raises(RequestError) as refusal:
        PARSER.completion(json.dumps(ASKED | body).encode())
    assert refusal.value.param == param and told in refusal.value.detail and refusal.value.status == 400


def test_chats_have_a_token_and_min_tokens_stays_below(tmp_path: Path) -> None:
    chat = {"model": "tiny-moe", "messages": [{"role": "user", "content": "x"}]}
    for name in ("max_tokens", "max_completion_tokens"):
        with pytest.raises(RequestError, match=f"'{name}' must be between 1 and"):
            PARSER.chat(json.dumps(chat | {name: 0}).encode())

    async def scenario() -> None:
        async with stub_system(tmp_path) as system:
            answer = await system.client.post("/v1/completions", json=ASKED | {"min_tokens": 2})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "min_tokens")

    asyncio.run(scenario())
