"""Streams of every kind while prefill and decode replicas are killed at random: each ends as if nothing had happened, or typed and in time.

The same requests run twice through the same system: undisturbed, then under kills. Owns the kills and the comparison; how one moment of
one request is hit: test_faults.py.
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from bench.serve.rest_client import StreamResult, post
from tests.kept_reports import keep
from tests.system.patience import Patience

Phase = Literal["prefill", "handoff", "decode"]

# Whose report says by which figure that it is in the middle of one.
PHASES: dict[Phase, tuple[str, str]] = {
    "prefill": ("prefill", "num_running"),
    "decode": ("decode", "num_running"),
    "handoff": ("decode", "num_open_handles"),
}
PHASE_S = 2.0  # for how long a replica in a phase is looked for
DEADLINE_S = 120.0
# Long enough that a report of a tenth of a second ago still says where a request is.
SLOW = {"delays.prefill_group_s": 0.03, "delays.decode_step_s": 0.01, "gateway.request_deadline_s": DEADLINE_S}
TYPED = {"replica_lost", "prefill_lost", "decode_lost", "deadline_exceeded", "kv_lost", "no_capacity"}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 40}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def bodies(num: int) -> list[dict[str, Any]]:
    """Streamed completions: greedy, sampled with penalties, with log-probabilities, structured, several choices, stop strings; in turns."""
    made = []
    for number in range(num):
        told: dict[str, Any] = {
            "model": "tiny-moe",
            "prompt": f"Story number {number}: once upon a time there was a {('fox', 'bird', 'child', 'bear')[number % 4]} who",
            "max_tokens": 40 + number % 41,
            "seed": 1000 + number,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        kinds: tuple[dict[str, Any], ...] = (
            {"temperature": 0},
            {"temperature": 0.9, "top_p": 0.95, "presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.1},
            {"temperature": 0.7, "guided_json": SCHEMA, "max_tokens": 120},
            {"temperature": 0.8, "n": 3, "ignore_eos": True},
            {"temperature": 0.6, "logprobs": 2, "min_tokens": 20},
            {"temperature": 0.8, "stop": [". The", "and then"], "min_p": 0.02, "top_k": 50},
        )
        made.append(told | kinds[number % len(kinds)])
    return made


def shown(result: StreamResult) -> dict[str, Any]:
    """What must not depend on who died: all that a client is told, but for ids, times and what caches spared."""
    usage = dict(result.usage or {})
    usage.pop("prompt_tokens_details", None)
    told = {"text": result.text, "token_ids": result.token_ids, "finish": result.finish_reasons, "logprobs": scored(result)}
    return told | {"usage": usage, "done": result.is_done}


def scored(result: StreamResult) -> dict[int, dict[str, list[Any]]]:
    """Log-probabilities of each choice, joined: how tokens come together into events is no part of what is said."""
    joined: dict[int, dict[str, list[Any]]] = {}
    for choice, events in result.logprobs.items():
        lists = joined.setdefault(choice, {})
        for event in events:
            for name, values in event.items():
                lists.setdefault(name, []).extend(values)
    return joined


async def run_all(system: Any, asked: list[dict[str, Any]], num_at_once: int) -> list[tuple[StreamResult, float]]:
    """Every answer with the seconds that it took."""
    gate = asyncio.Semaphore(num_at_once)

    async def one(body: dict[str, Any]) -> tuple[StreamResult, float]:
        async with gate:
            started_s = time.monotonic()
            result = await post(system.url, "/v1/completions", body, timeout_s=DEADLINE_S + 30)
            return result, time.monotonic() - started_s

    return await asyncio.gather(*(one(body) for body in asked))


@dataclass
class Killer:
    """A thread that kills replicas in named phases, in turns, and starts each again; at most one of a pool is down at a time."""

    system: Any
    seed: int
    kills: Counter[Phase] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    _over: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Killer:
        self._thread = threading.Thread(target=self._guarded)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        assert self._thread is not None
        self._thread.join(150)
        assert not self._thread.is_alive() and not self.failed, self.failed

    def _guarded(self) -> None:
        try:
            self._run(random.Random(self.seed))
        except Exception as error:  # told by the test's own thread
            self.failed.append(repr(error))

    def _run(self, draw: random.Random) -> None:
        phases, turn, patience = list(PHASES), 0, Patience(PHASE_S)
        while not self._over.is_set():
            phase = phases[turn % len(phases)]
            victim = self._victim(phase, draw)
            if victim is None:
                turn += patience.is_over()  # reports of a busy machine miss what is short: the next phase, rather than no kill
                time.sleep(0.02)
                continue
            self.system.kill(victim)
            self.kills[phase] += 1
            turn, patience = turn + 1, Patience(PHASE_S)
            self.system.processes[victim].wait(10)
            self.system.start(victim.split("-")[0], victim)
            self.system.wait_for_pools(2, 2)
            self._over.wait(draw.uniform(0.0, 1.0))

    def _victim(self, phase: Phase, draw: random.Random) -> str | None:
        """A replica that is in that phase now, by its own report. A handoff's is one that has granted slots which have not all landed."""
        role, fact = PHASES[phase]
        found = [report for report in self.system.reports(role) if report[fact]]
        return str(draw.choice(found)["replica_id"]) if found else None


def storm(system: Any, num_streams: int, num_at_once: int) -> dict[str, Any]:
    """Run it, check it, and tell what happened."""
    asked = bodies(num_streams)
    calm = asyncio.run(run_all(system, asked, num_at_once))
    bad = [
        (body, result.status, result.body[:300], result.error) for body, (result, _) in zip(asked, calm, strict=True) if not result.is_done
    ]
    assert not bad, bad
    with Killer(system, seed=7) as killer:
        stormy = asyncio.run(run_all(system, asked, num_at_once))
    errors: Counter[str] = Counter()
    for (expected, _), (result, took_s) in zip(calm, stormy, strict=True):
        error = result.error or (json.loads(result.body)["error"] if result.status != 200 else None)
        if error is None:
            assert shown(result) == shown(expected)
            continue
        assert error["code"] in TYPED and took_s < DEADLINE_S + 5, (error, took_s)
        errors[error["code"]] += 1
        for choice, ids in result.token_ids.items():
            assert ids == expected.token_ids[choice][: len(ids)]
            assert expected.text[choice].startswith(result.text.get(choice, ""))
    system.wait_for_pools(2, 2)
    system.assert_quiet(15)
    return {"num_streams": num_streams, "kills": dict(killer.kills), "errors": dict(errors), "causes": _causes(system)}


def _causes(system: Any) -> dict[str, float]:
    """What the gateway began again, by its own counters."""
    _, body = system.get("/metrics")
    lines = [line for line in body.decode().splitlines() if line.startswith(("duomo_retries_total", "duomo_resumes_total"))]
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines}


@pytest.mark.slow
def test_200_streams_survive_kills_in_every_phase(replica_system: Any) -> None:
    slower = SLOW | {"delays.decode_step_s": 0.08}  # for more kills: a replica takes seconds to start
    told = storm(replica_system(num_prefill=2, num_decode=2, **slower), num_streams=200, num_at_once=16)
    keep("kill_storm", **told)
    assert min(told["kills"].get(phase, 0) for phase in PHASES) >= 2, told
    assert sum(told["errors"].values()) <= 10 and sum(told["causes"].values()) > 20, told


def test_streams_survive_a_kill_in_each_phase(replica_system: Any) -> None:
    told = storm(replica_system(num_prefill=2, num_decode=2, **SLOW), num_streams=24, num_at_once=12)
    assert told["kills"] and sum(told["causes"].values()) > 0, told
