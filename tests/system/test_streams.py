"""Streams as client apps use them: the openai client, many at once, cancelled, more than fit. Owns the traffic, not the systems."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from bench.reference.monolith import monolithic_tokens
from bench.serve.rest_client import StreamResult, completion_body, post
from tests.system.conftest import ReplicaSystem

MODEL = Path(__file__).parents[2] / "models" / "tiny-moe"


def _prompt(row: int, length: int = 12) -> list[int]:
    return [10 + (131 * row + 17 * column) % 8000 for column in range(length)]


def test_the_openai_client_streams_a_chat(one_system: Any) -> None:
    client = openai.OpenAI(base_url=f"{one_system.url}/v1", api_key="none")
    chunks = list(
        client.chat.completions.create(
            model="tiny-moe",
            messages=[{"role": "user", "content": "Tell me about a red ball."}],
            max_tokens=32,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    whole = client.chat.completions.create(
        model="tiny-moe", messages=[{"role": "user", "content": "Tell me about a red ball."}], max_tokens=32, temperature=0
    )
    assert text and text == whole.choices[0].message.content
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    one_system.assert_quiet()


def test_thirty_two_streams_of_128_tokens_finish(one_system: Any) -> None:
    async def run() -> list[StreamResult]:
        return list(
            await asyncio.gather(*(post(one_system.url, "/v1/completions", completion_body(_prompt(row), 128)) for row in range(32)))
        )

    results = asyncio.run(run())
    assert all(result.is_done and result.error is None for result in results)
    expected = monolithic_tokens(MODEL, [tuple(_prompt(row)) for row in range(32)], 128)
    assert [result.token_ids[0] for result in results] == expected
    one_system.assert_quiet()


def test_half_of_a_hundred_streams_cancelled(one_system: Any) -> None:
    async def one(row: int) -> StreamResult:
        return await post(one_system.url, "/v1/completions", completion_body(_prompt(row), 64), stop_after=20 if row % 2 else None)

    async def run() -> list[StreamResult]:
        return list(await asyncio.gather(*(one(row) for row in range(100))))

    results = asyncio.run(run())
    kept = [result for row, result in enumerate(results) if not row % 2]
    assert all(result.is_done and result.num_tokens == 64 for result in kept)
    assert all(not result.is_done for row, result in enumerate(results) if row % 2)
    one_system.assert_quiet(within_s=1.0)  # the design's, once a client has left


@pytest.mark.parametrize("num_fitting", [6, pytest.param(16, marks=pytest.mark.slow)])
def test_four_times_as_many_requests_as_the_pool_holds(replica_system: Callable[..., ReplicaSystem], num_fitting: int) -> None:
    """5 blocks for the 20 + 60 tokens of each that fits, and the watermark of 8."""
    system = replica_system(**{"decode.num_blocks": 5 * num_fitting + 8, "decode.watermark_blocks": 8})
    prompts = [_prompt(row, 20) for row in range(4 * num_fitting)]

    async def run() -> list[StreamResult]:
        bodies = [completion_body(prompt, 60, stream=False) for prompt in prompts]
        return list(await asyncio.gather(*(post(system.url, "/v1/completions", body) for body in bodies)))

    results = asyncio.run(run())
    assert [result.status for result in results] == [200] * len(prompts)
    tokens = [json.loads(result.body)["choices"][0]["token_ids"] for result in results]
    assert tokens == monolithic_tokens(MODEL, [tuple(prompt) for prompt in prompts], 60)
    system.assert_quiet()


def _num_running(system: Any) -> list[int]:
    return [report["num_running"] for report in system.reports("decode")]


def test_scaling_decode_down_under_live_streams(scaled_system: Any) -> None:
    """Decode 2 -> 1 while 20 streams run: all complete, and the pool really has one replica afterwards."""

    async def run() -> list[StreamResult]:
        streams = [asyncio.create_task(post(scaled_system.url, "/v1/completions", completion_body(_prompt(row), 200))) for row in range(20)]
        while not (len(running := await asyncio.to_thread(_num_running, scaled_system)) == 2 and all(running)):
            assert not all(stream.done() for stream in streams), f"both decode replicas must be at work before scaling: {running}"
            await asyncio.sleep(0.02)
        await asyncio.to_thread(scaled_system.scale, "decode", 1)
        return list(await asyncio.gather(*streams))

    results = asyncio.run(run())
    assert all(result.is_done and result.error is None and result.num_tokens == 200 for result in results)
    assert [result.token_ids[0] for result in results] == monolithic_tokens(MODEL, [tuple(_prompt(row)) for row in range(20)], 200)
    scaled_system.wait_for_pools(1, 1)
    scaled_system.assert_quiet()
