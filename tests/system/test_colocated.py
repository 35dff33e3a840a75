"""The layout colocated through REST: the tokens of any layout, cancels, choices, resumes, and long prompts beside running streams."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.reference.monolith import monolithic_tokens
from bench.serve.rest_client import StreamResult, completion_body, post
from duomo.telemetry.span_file import read_spans
from tests.system.conftest import ROOT, ReplicaSystem, ServeSystem, environment
from tests.system.patience import Patience

MAX_PAUSE_S = 0.08  # of the test's loop: four groups
MODEL = Path(__file__).parents[2] / "models" / "tiny-moe"


def _prompt(row: int, length: int = 12) -> list[int]:
    return [10 + (131 * row + 17 * column) % 8000 for column in range(length)]


def _stream(url: str, prompt: list[int], max_tokens: int, **more: Any) -> Any:
    return post(url, "/v1/completions", completion_body(prompt, max_tokens), **more)


def test_one_engine_serves_like_two_pools(replica_system: Callable[..., ReplicaSystem]) -> None:
    """A pool of 40 blocks for 24 requests of 5 to 9 blocks, cancels among them: tokens, choices, cached prefixes, and nothing is left."""
    small = {"decode.num_blocks": 40, "decode.watermark_blocks": 4, "decode.admit_ahead_tokens": 16, "decode.prefix_cache_blocks": 16}
    system = replica_system(layout="colocated", **small)

    async def run() -> tuple[list[StreamResult], list[StreamResult]]:
        kept = [_stream(system.url, _prompt(row, 20 + 3 * row), 60) for row in range(20)]
        dropped = [_stream(system.url, _prompt(row, 30), 60, stop_after=5) for row in range(4)]
        results = await asyncio.gather(*kept, *dropped)
        return list(results[:20]), list(results[20:])

    kept, dropped = asyncio.run(run())
    assert all(result.is_done and result.error is None for result in kept), [result.error for result in kept]
    assert not any(result.is_done for result in dropped)
    prompts = [tuple(_prompt(row, 20 + 3 * row)) for row in range(20)]
    assert [result.token_ids[0] for result in kept] == monolithic_tokens(MODEL, prompts, 60)
    system.assert_quiet()

    body = completion_body(_prompt(1, 50), 12, stream=False) | {"n": 2}
    answers = [asyncio.run(post(system.url, "/v1/completions", body)) for _ in range(2)]
    for answer in answers:
        choices = json.loads(answer.body)["choices"]
        assert [choice["token_ids"] for choice in choices] == 2 * monolithic_tokens(MODEL, [tuple(_prompt(1, 50))], 12)
    (prefill,) = system.reports("prefill")
    (decode,) = system.reports("decode")
    assert prefill["counters"]["prefill_tokens_cached"] >= 48
    assert prefill["pid"] == decode["pid"] and prefill["num_blocks"] == decode["num_blocks"] == 40
    assert prefill["transport"] == decode["transport"] == "owner change"
    assert decode["counters"]["preemptions"] > 0, "the pool was small enough for resumes"
    system.assert_quiet()
    patience = Patience(5.0)
    while len(handoffs := [span for span in read_spans(system.trace_dir) if span.name == "kv.handoff"]) < 22:
        assert not patience.is_over(), handoffs  # spans are written behind
        time.sleep(0.02)
    assert all(span.attributes["duomo.bytes"] == 0 for span in handoffs)


async def _beside_a_stream(url: str, prompts: list[tuple[int, ...]]) -> tuple[StreamResult, list[StreamResult], float]:
    """A stream, the answers to long prompts that come once it runs, and the longest that this loop stood still meanwhile."""
    pauses_s = [0.0]

    async def watch() -> None:
        while True:
            slept_s = time.monotonic()
            await asyncio.sleep(0.005)
            pauses_s.append(time.monotonic() - slept_s)

    runs, watching = asyncio.Event(), asyncio.create_task(watch())
    stream = asyncio.create_task(_stream(url, _prompt(0), 160, on_tokens=lambda *_: runs.set()))
    await runs.wait()
    results = await asyncio.gather(stream, *(_stream(url, list(prompt), 2) for prompt in prompts))
    watching.cancel()
    return results[0], results[1:], max(pauses_s)


@pytest.fixture
def serve_colocated() -> Any:
    system = ServeSystem("--set", "layout=colocated", "--set", "delays.prefill_group_s=0.02", "--set", "model.units=8")
    yield system
    system.stop()


def test_duomo_serve_runs_long_prompts_between_steps_and_refuses_to_scale(serve_colocated: ServeSystem) -> None:
    """A stream goes on, a step for each group at least, while prompts of 8 slowed groups are computed."""
    system = serve_colocated
    assert len(system.pids("engine")) == 1 and not system.pids("prefill") and not system.pids("decode")
    for number in range(20):  # until this process never stood still meanwhile: in what it reads at once afterwards no order is left
        prompts = [tuple(_prompt(2 * number + row, 1100)) for row in (1, 2)]
        stream, long, longest_pause_s = asyncio.run(_beside_a_stream(system.url, prompts))
        assert [stream.token_ids[0]] == monolithic_tokens(MODEL, [tuple(_prompt(0))], 160)
        assert [result.token_ids[0] for result in long] == monolithic_tokens(MODEL, prompts, 2)
        assert stream.is_done and all(result.is_done for result in long)
        began_s, ended_s = min(result.started_s for result in long), max(result.event_times_s[0] for result in long)
        meanwhile = sum(began_s < at_s < ended_s for at_s in stream.event_times_s)
        if longest_pause_s < MAX_PAUSE_S:
            break
    assert meanwhile >= 12, f"{meanwhile} tokens in the {ended_s - began_s:.2f} s of two waves of 8 groups"
    system.assert_quiet()
    command = [sys.executable, "-m", "services.cli", "scale", "--decode", "2", "--run-dir", str(system.run_dir)]
    refused = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2 and "layout is colocated" in refused.stderr, refused.stderr
