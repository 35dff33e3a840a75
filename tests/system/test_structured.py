"""Structured output through the whole system: random schemas by the OpenAI client, streamed and not, and every other way to ask for it."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass
from typing import Any

import jsonschema
import openai
import pytest

from tests.grammar.schemas import Schema, random_schema

MODEL = "tiny-moe"
NUM_AT_ONCE = 12
ASK: Any = [{"role": "user", "content": "Tell me of a cat and its friend, as JSON."}]


@dataclass(frozen=True)
class Answered:
    """One choice."""

    text: str
    finish_reason: str


def client_of(system: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{system.url}/v1", api_key="none", max_retries=0, timeout=120)


async def chat(client: openai.AsyncOpenAI, *, stream: bool, **fields: Any) -> list[Answered]:
    """Every choice of a chat, by number."""
    made: Any = await client.chat.completions.create(model=MODEL, messages=ASK, stream=stream, **fields)
    if not stream:
        return [Answered(choice.message.content, choice.finish_reason) for choice in made.choices]
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    async for event in made:
        for choice in event.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index, "")
    return [Answered(texts[number], reasons[number]) for number in sorted(texts)]


def by_schema(schema: Schema) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}


async def answers_to(system: Any, num_schemas: int) -> dict[int, list[Answered]]:
    gate, client = asyncio.Semaphore(NUM_AT_ONCE), client_of(system)

    async def one(seed: int) -> list[Answered]:
        async with gate:
            fields = {"temperature": (0.0, 0.7, 1.0)[seed % 3], "seed": seed, "max_tokens": 512, "n": 2 if seed % 10 == 0 else 1}
            return await chat(client, stream=seed % 2 == 0, response_format=by_schema(random_schema(seed)), **fields)

    found = await asyncio.gather(*(one(seed) for seed in range(num_schemas)))
    await client.close()
    return dict(enumerate(found))


def judge(answers: dict[int, list[Answered]]) -> None:
    """Each that ended by itself is valid; all but one in a hundred ended by itself."""
    choices = [(seed, answered) for seed, found in answers.items() for answered in found]
    for seed, answered in choices:
        if answered.finish_reason == "stop":
            jsonschema.validate(json.loads(answered.text), random_schema(seed))
    num_stopped = sum(answered.finish_reason == "stop" for _, answered in choices)
    assert num_stopped >= 0.99 * len(choices), f"{num_stopped} of {len(choices)} ended within their tokens"


def test_answers_to_ten_schemas_are_valid(pair_system: Any) -> None:
    judge(asyncio.run(answers_to(pair_system, 10)))
    pair_system.assert_quiet()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_answers_to_two_hundred_schemas_are_valid(pair_system: Any) -> None:
    judge(asyncio.run(answers_to(pair_system, 200)))
    pair_system.assert_quiet()


def test_every_way_to_ask_is_kept(pair_system: Any) -> None:
    ways: list[tuple[dict[str, Any], str]] = [
        ({"extra_body": {"guided_regex": "[A-Z][a-z]{2,9}( (and|or) [A-Z][a-z]{2,9}){1,2}"}}, r"[A-Z]\w+( (and|or) [A-Z]\w+){1,2}"),
        ({"extra_body": {"guided_choice": ["red", "green and blue", "größer"]}}, "red|green and blue|größer"),
        ({"extra_body": {"guided_grammar": 'root ::= "cat" | "dog" [0-9] [0-9]'}}, r"cat|dog\d\d"),
        ({"extra_body": {"structured_outputs": {"grammar": 'start: ("a" | "b") "c" /[0-9]/'}}}, "[ab]c[0-9]"),
        ({"extra_body": {"structured_outputs": {"regex": "[0-9]{4}", "json": None}}}, "[0-9]{4}"),
        ({"extra_body": {"guided_json": {"const": "exactly so"}}}, '"exactly so"'),
    ]

    async def run() -> None:
        client = client_of(pair_system)
        for stream in (False, True):
            for fields, pattern in ways:
                for answered in await chat(client, stream=stream, seed=1, n=2, max_tokens=64, presence_penalty=0.5, **fields):
                    assert re.fullmatch(pattern, answered.text) and answered.finish_reason == "stop", (fields, answered)
        text = await client.completions.create(model=MODEL, prompt="It was ", max_tokens=64, extra_body={"guided_choice": ["so", "not so"]})
        assert text.choices[0].text in ("so", "not so") and text.choices[0].finish_reason == "stop"
        await client.close()

    asyncio.run(run())
    pair_system.assert_quiet()


def test_what_ends_an_answer_otherwise_ends_it_as_elsewhere(pair_system: Any) -> None:
    async def run() -> None:
        client = client_of(pair_system)
        words = {"extra_body": {"guided_regex": "([a-z]{2,5} ){40}end"}, "seed": 3}
        (cut,) = await chat(client, stream=False, max_tokens=7, **words)
        assert cut.finish_reason == "length" and re.fullmatch("([a-z]{2,5} )*[a-z]{0,5}", cut.text)
        (whole,) = await chat(client, stream=False, max_tokens=400, **words)
        assert whole.finish_reason == "stop" and whole.text.startswith(cut.text) and whole.text.endswith(" end")
        stop = whole.text.split(" ")[2]
        (stopped,) = await chat(client, stream=True, max_tokens=400, stop=[stop], **words)
        assert stopped.finish_reason == "stop" and stopped.text == whole.text[: whole.text.index(stop)]
        ignoring = {"guided_regex": "[a-z]{3}", "ignore_eos": True, "min_tokens": 30}
        (only_end,) = await chat(client, stream=False, max_tokens=50, extra_body=ignoring)
        assert re.fullmatch("[a-z]{3}", only_end.text) and only_end.finish_reason == "stop"
        whole_again = await chat(client, stream=True, max_tokens=400, **words)
        assert whole_again == [whole], "the same seed"
        await client.close()

    asyncio.run(run())
    pair_system.assert_quiet()


def test_any_object_is_one_object_and_logprobs_come_with_it(pair_system: Any) -> None:
    async def run() -> None:
        client = client_of(pair_system)
        made: Any = await client.chat.completions.create(
            model=MODEL, messages=ASK, max_tokens=200, seed=5, logprobs=True, top_logprobs=2, response_format={"type": "json_object"}
        )
        choice = made.choices[0]
        assert choice.message.content.startswith("{") and all(one.logprob <= 0 for one in choice.logprobs.content)
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)
        await client.close()

    asyncio.run(run())
    pair_system.assert_quiet()


def test_a_bias_bans_and_forces_tokens(pair_system: Any) -> None:
    async def run() -> None:
        client = client_of(pair_system)
        made: Any = await client.completions.create(
            model=MODEL,
            prompt="Once upon a time",
            max_tokens=6,
            temperature=0,
            logit_bias={"1000": 100},
            extra_body={"return_token_ids": True},
        )
        assert made.choices[0].token_ids == [1000] * 6
        plain: Any = await client.completions.create(
            model=MODEL, prompt="Once upon a time", max_tokens=6, temperature=0, extra_body={"return_token_ids": True}
        )
        banned = {str(token_id): -100 for token_id in set(plain.choices[0].token_ids)}
        other: Any = await client.completions.create(
            model=MODEL, prompt="Once upon a time", max_tokens=6, temperature=0, logit_bias=banned, extra_body={"return_token_ids": True}
        )
        assert not {str(token_id) for token_id in other.choices[0].token_ids} & set(banned)
        await client.close()

    asyncio.run(run())
    pair_system.assert_quiet()
