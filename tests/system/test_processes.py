"""What runs where: process ids, the transport's name, and a push in flight while the next group computes. Reads reports and spans only."""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from bench.serve.rest_client import StreamResult, completion_body, post

NUM_GROUPS = 4


def _spans(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in sorted(directory.glob("*.jsonl")) for line in file.read_text().splitlines()]


def test_router_prefill_and_decode_are_processes_of_their_own(one_system: Any) -> None:
    asyncio.run(post(one_system.url, "/v1/completions", completion_body([5, 6, 7], 4)))
    pools = one_system.pool_report()
    pids = [pools["gateway"]["pid"], *(one["report"]["pid"] for one in pools["replicas"])]
    assert len(pids) == 3 and len(set(pids)) == 3 and os.getpid() not in pids
    for one in pools["replicas"]:
        assert one["report"]["transport"] == "nixl/UCX", one
    for pid in pids:
        assert b"ray::" in Path(f"/proc/{pid}/cmdline").read_bytes(), "each service runs in a Ray worker process"


def _shared_waves(spans: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Waves of three prompts at least: their compute spans."""
    waves = defaultdict(list)
    for span in spans:
        if span["name"] == "prefill.compute":
            waves[span["attributes"]["duomo.wave"]].append(span)
    return [members for members in waves.values() if len(members) >= 3]


def test_a_group_is_pushed_while_the_next_computes(replica_system: Any) -> None:
    """A slowed transport, a wave of three prompts behind another, four groups: push g overlaps compute g + 1 in the spans.

    A prompt of 40 tokens is 96 KiB a group, 0.08 s at this rate, and the three are pushed one after another; a group takes 0.3 s.
    """
    system = replica_system(num_prefill=1, num_decode=1, **{"kv_transfer.max_bytes_per_s": 1.2e6, "delays.prefill_group_s": 0.3})

    async def run(first_id: int) -> list[StreamResult]:
        first = asyncio.create_task(post(system.url, "/v1/completions", completion_body(list(range(first_id, first_id + 40)), 2)))
        while not first.done() and not any(report["num_running"] for report in await asyncio.to_thread(system.reports, "prefill")):
            await asyncio.sleep(0.02)
        starts = range(first_id + 1, first_id + 4)
        wave = [post(system.url, "/v1/completions", completion_body(list(range(start, start + 40)), 2)) for start in starts]
        return [*(await asyncio.gather(*wave)), await first]

    for first_id in range(10, 1010, 50):  # until three met, which they do unless this process stands still while the first computes
        assert all(result.is_done and result.error is None for result in asyncio.run(run(first_id)))
        system.assert_quiet()
        spans = _spans(system.trace_dir)
        if shared := _shared_waves(spans):
            break
    assert shared, "no wave of three prompts"
    overlapping: Counter[int] = Counter()
    for member in shared[0]:
        started = {e["attributes"]["duomo.group"]: e["at_ns"] for e in member["events"] if e["name"] == "group_started"}
        computed = {e["attributes"]["duomo.group"]: e["at_ns"] for e in member["events"] if e["name"] == "group_computed"}
        pushes = {s["attributes"]["duomo.group"]: s for s in spans if s["name"] == "kv.push" and s["parent_id"] == member["span_id"]}
        assert sorted(pushes) == sorted(computed) == list(range(NUM_GROUPS))
        for group in range(NUM_GROUPS - 1):
            push = pushes[group]
            overlapping[group] += push["start_ns"] < computed[group + 1] and started[group + 1] < push["end_ns"]
    # All three, but where this machine pauses between two groups.
    assert all(overlapping[group] for group in range(NUM_GROUPS - 1)), (overlapping, shared[0])
