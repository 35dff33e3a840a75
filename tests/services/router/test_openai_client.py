"""The real `openai` package against the gateway: what its users see."""

from __future__ import annotations

import asyncio
from collections import deque
from pathlib import Path

import openai
import pytest

from duomo.wire.messages import Cancel
from tests.services.router.stub_replicas import Script
from tests.services.router.stub_system import PATIENCE_S, stub_system

MESSAGES = [{"role": "user", "content": "Tell me a story."}]


def _client(base_url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=base_url + "/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)


def test_it_streams_a_chat_and_gets_usage(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path) as system, _client(system.base_url) as client:
            stream = await client.chat.completions.create(
                model="tiny-moe", messages=MESSAGES, max_completion_tokens=40, stream=True, stream_options={"include_usage": True}
            )
            text, finish, usage = "", None, None
            async for chunk in stream:
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    text += choice.delta.content or ""
                    finish = choice.finish_reason or finish
            assert (text, finish) == (system.story.text(0, 40), "length")
            assert usage is not None and usage.completion_tokens == 40 and usage.total_tokens == 40 + usage.prompt_tokens

    asyncio.run(scenario())


def test_it_reads_whole_answers_logprobs_models_and_completions(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path) as system, _client(system.base_url) as client:
            whole = await client.chat.completions.create(
                model="tiny-moe", messages=MESSAGES, max_tokens=7, n=2, logprobs=True, top_logprobs=1, stop=["zebra"], seed=5
            )
            assert [choice.message.content for choice in whole.choices] == [system.story.text(choice, 7) for choice in range(2)]
            assert whole.choices[0].logprobs is not None and len(whole.choices[0].logprobs.content or []) == 7
            text = await client.completions.create(model="tiny-moe", prompt=["a", "b"], max_tokens=3, logprobs=2)
            assert [choice.index for choice in text.choices] == [0, 1] and text.choices[0].logprobs is not None
            assert [model.id async for model in client.models.list()] == ["tiny-moe"]

    asyncio.run(scenario())


def test_it_raises_its_own_errors(tmp_path: Path) -> None:
    async def scenario() -> None:
        script, overrides = Script(decode_faults=deque([("die", 2)])), {"gateway": {"failover_wait_s": 0.2}}
        async with stub_system(tmp_path, script, overrides=overrides) as system, _client(system.base_url) as client:
            with pytest.raises(openai.BadRequestError) as refused:
                await client.chat.completions.create(model="tiny-moe", messages=[], max_tokens=3)
            assert refused.value.param == "messages"
            with pytest.raises(openai.NotFoundError):
                await client.chat.completions.create(model="other", messages=MESSAGES)
            with pytest.raises(openai.APIError, match="replica"):
                stream = await client.chat.completions.create(model="tiny-moe", messages=MESSAGES, max_tokens=30, stream=True)
                async for _ in stream:
                    pass

    asyncio.run(scenario())


def test_a_closed_stream_frees_the_request(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, Script(step_s=0.002)) as system, _client(system.base_url) as client:
            stream = await client.chat.completions.create(model="tiny-moe", messages=MESSAGES, max_tokens=1500, stream=True)
            async for _ in stream:
                break
            await stream.close()
            (decode,) = system.pools.of_role("decode")
            await system.until(lambda: bool(decode.of_type(Cancel)) and decode.used_blocks == 0)

    asyncio.run(scenario())
