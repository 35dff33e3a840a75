"""Fifty prompts through REST against the float32 reference and against the monolithic run. Owns the comparison, not the systems."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from bench.reference.compare import differences, verdict
from bench.reference.fifty_prompts import NEW_TOKENS, Prompt, fifty_prompts
from bench.reference.monolith import monolithic_tokens
from bench.reference.tiny_moe import build_reference
from bench.serve.rest_client import completion_body, post

MODEL = Path(__file__).parents[2] / "models" / "tiny-moe"


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return fifty_prompts(MODEL)


@pytest.fixture(scope="module")
def monolith(prompts: list[Prompt]) -> list[list[int]]:
    """Our own engine's tokens, prefill and decode in one loop."""
    return monolithic_tokens(MODEL, [one.prompt_ids for one in prompts], NEW_TOKENS)


async def _answer(url: str, prompt: Prompt) -> list[int]:
    body: dict[str, Any] = completion_body(list(prompt.prompt_ids), NEW_TOKENS, stream=False)
    path = "/v1/completions"
    if prompt.is_chat:
        path = "/v1/chat/completions"
        del body["prompt"]
        body["messages"] = [{"role": role, "content": content} for role, content in prompt.messages]
    result = await post(url, path, body)
    assert result.status == 200, (prompt.name, result.body)
    answer = json.loads(result.body)
    assert answer["usage"]["prompt_tokens"] == len(prompt.prompt_ids), prompt.name
    assert answer["usage"]["completion_tokens"] == NEW_TOKENS, prompt.name
    assert answer["choices"][0]["finish_reason"] == "length", prompt.name
    return list(answer["choices"][0]["token_ids"])


async def _answers(url: str, prompts: list[Prompt], num_clients: int) -> list[list[int]]:
    gate = asyncio.Semaphore(num_clients)

    async def one(prompt: Prompt) -> list[int]:
        async with gate:
            return await _answer(url, prompt)

    return list(await asyncio.gather(*(one(prompt) for prompt in prompts)))


def test_monolith_equals_the_reference(prompts: list[Prompt], monolith: list[list[int]], record_property: Any) -> None:
    model = build_reference(MODEL)
    found = [
        one for prompt, tokens in zip(prompts, monolith, strict=True) for one in differences(model, prompt.name, prompt.prompt_ids, tokens)
    ]
    record_property("near_ties", [str(one) for one in found])
    print("near ties:", found)
    assert not verdict(found, NEW_TOKENS * len(prompts))


def test_comparison_catches_a_wrong_token(prompts: list[Prompt], monolith: list[list[int]]) -> None:
    model = build_reference(MODEL)
    tokens = list(monolith[5])
    tokens[40] = (tokens[40] + 1) % 8192
    assert verdict(differences(model, prompts[5].name, prompts[5].prompt_ids, tokens), NEW_TOKENS)


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_under_ray_it_equals_the_monolith(one_system: Any, prompts: list[Prompt], monolith: list[list[int]], step: int) -> None:
    """Every so many of the prompts; all of them without Ray: below."""
    asked = prompts[::step]
    answers = asyncio.run(_answers(one_system.url, asked, 4))
    wrong = [prompt.name for prompt, ours, theirs in zip(asked, answers, monolith[::step], strict=True) if ours != theirs]
    assert not wrong
    one_system.assert_quiet()


def test_two_by_two_with_sixteen_clients_equals_the_monolith(pair_system: Any, prompts: list[Prompt], monolith: list[list[int]]) -> None:
    answers = asyncio.run(_answers(pair_system.url, prompts, 16))
    wrong = [prompt.name for prompt, ours, theirs in zip(prompts, answers, monolith, strict=True) if ours != theirs]
    assert not wrong
    pair_system.assert_quiet()
