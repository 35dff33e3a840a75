"""Routing and admission of the whole system on the CPU: shared prompts meet in caches, and what is too much is told to come back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import httpx
import pytest

from bench.serve.bench_routing_cpu import KIND, open_loop
from bench.serve.route_traces import fresh, oracle_tokens, shared_prefixes
from tests.system.conftest import ReplicaSystem

pytestmark = pytest.mark.slow


def test_prompts_that_begin_alike_meet_on_the_replicas_that_know_them(replica_system: Callable[..., ReplicaSystem]) -> None:
    system = replica_system(num_prefill=4, num_decode=1)
    trace = shared_prefixes(96, 4.0, KIND, output_tokens=4, seed=2)
    outcomes = asyncio.run(open_loop(system.url, trace))
    assert [one.status for one in outcomes] == [200] * 96
    cached = sum(one.cached_tokens for one in outcomes)
    assert cached >= 0.75 * oracle_tokens(trace, 16), "the bench holds it to nine tenths, on a machine of its own"
    reasons = httpx.get(f"{system.url}/metrics", trust_env=False).text
    assert 'duomo_route_reasons_total{pool="prefill",reason="prefix"}' in reasons
    system.assert_quiet()


def test_under_three_times_the_load_everybody_is_answered_or_told_when_to_come_back(replica_system: Callable[..., ReplicaSystem]) -> None:
    deadline_s = 20.0
    system = replica_system(**{"gateway.max_ttft_s": 3.0, "gateway.request_deadline_s": deadline_s, "gateway.max_queued_requests": 64})
    asyncio.run(open_loop(system.url, fresh(8, 2.0, prompt_tokens=(384, 640), output_tokens=(4, 8), seed=1)))
    load = fresh(360, 15.0, prompt_tokens=(384, 640), output_tokens=(8, 24), seed=4)
    outcomes = asyncio.run(open_loop(system.url, load))
    assert {one.status for one in outcomes} <= {200, 429}, {(one.status, one.code) for one in outcomes}
    refused = [one for one in outcomes if one.status == 429]
    assert refused and {one.code for one in refused} <= {"too_late", "queue_timeout", "queue_full"}
    assert all(one.retry_after is not None and int(one.retry_after) >= 1 for one in refused)
    assert sum(one.status == 200 for one in outcomes) >= 20, "it goes on serving"
    assert max(one.ended_s for one in outcomes) <= deadline_s + 5
    system.assert_quiet()
