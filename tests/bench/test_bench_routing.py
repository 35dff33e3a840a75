"""The simulator of routing: the real policy beside an oracle and baselines, overload, priorities, several gateways; its own machines."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from bench.serve import route_plot
from bench.serve.bench_routing import KIND as BENCH_KIND
from bench.serve.bench_routing import LIMIT_S, Overload, check, overload_row, overloads, prefix_rows
from bench.serve.route_gateway import Way
from bench.serve.route_machines import Machine
from bench.serve.route_simulator import Found, System, simulate
from bench.serve.route_traces import Prefixes, SimRequest, fresh, oracle_tokens, shared_prefixes, trace_of_json
from duomo.engine.blocks import BlockManager, allocate_prompt
from services.router import policy

KIND = Prefixes(num_groups=32, prompt_tokens=512, share=0.7)


@pytest.mark.parametrize("num_gateways", [1, 4])
def test_shared_prefixes_are_found_nearly_as_often_as_by_an_oracle_and_random_routing_finds_half(num_gateways: int) -> None:
    trace = shared_prefixes(500, 20.0, KIND, output_tokens=16, seed=5, num_gateways=num_gateways)
    oracle = oracle_tokens(trace, 16) / sum(len(one.prompt_ids) for one in trace)
    rates: dict[Way, float] = {}
    ways: tuple[Way, ...] = ("duomo", "random", "least_loaded")
    for way in ways:
        found = simulate(trace, System(num_prefills=4, num_gateways=num_gateways, way=way))
        check(found, trace)
        assert len(found.answers) == 500
        rates[way] = found.hit_rate / oracle
    assert rates["duomo"] >= 0.9 and max(rates["random"], rates["least_loaded"]) < 0.6, rates


def test_near_saturation_a_line_does_not_make_it_route_at_random(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = shared_prefixes(800, 32.0, BENCH_KIND, output_tokens=32, seed=1, num_gateways=1)
    oracle = oracle_tokens(trace, Machine().block_tokens) / sum(len(one.prompt_ids) for one in trace)
    waited = simulate(trace, System(num_prefills=4))
    check(waited, trace)
    assert waited.hit_rate >= 0.9 * oracle
    monkeypatch.setattr(policy, "_is_worth_waiting", lambda others, chosen, need, patience: False)
    assert simulate(trace, System(num_prefills=4)).hit_rate < 0.7 * oracle, "else this load says nothing of it"


@pytest.mark.parametrize("case", overloads(), ids=lambda case: case.name)
def test_at_three_times_the_load_goodput_stays_and_nobody_waits_in_vain(case: Overload) -> None:
    row = overload_row(case)
    assert row["goodput_over_best"] >= 0.9, row
    share = 0.97 if case.system.num_gateways == 1 else 0.9  # gateways do not see each other's lines
    assert row["good"] >= share * row["answered"], "what is admitted is served in time"
    assert set(row["refused"]) <= {"429 too_late", "429 queue_timeout", "429 queue_full"} and row["retry_after_s"][0] >= 1
    assert row["longest_until_refused_s"] <= LIMIT_S + 0.11


def test_priorities_are_served_first_and_nobody_starves() -> None:
    trace = fresh(300, 11.0, prompt_tokens=(400, 600), output_tokens=(8, 24), seed=7)
    mixed = [replace(one, priority=3 if number % 5 == 0 else 0, deadline_s=200.0) for number, one in enumerate(trace)]
    found = simulate(mixed, System(queue_ttl_s=200.0))
    check(found, mixed)
    assert len(found.answers) == 300, "what waits long enough is served"
    mean = {level: [one.ttft_s for one in found.answers if one.request.priority == level] for level in (0, 3)}
    assert sum(mean[3]) / len(mean[3]) < 0.9 * sum(mean[0]) / len(mean[0])


def test_a_full_line_keeps_the_higher_priorities() -> None:
    burst = [
        SimRequest(name=f"r{idx}", at_s=0.5 + idx / 1e4, prompt_ids=(10 + idx,) * 2000, output_tokens=4, priority=idx % 2)
        for idx in range(60)
    ]
    found = simulate(burst, System(max_waiting=8))
    check(found, burst)
    refused = Counter(one.request.priority for one in found.refusals)
    assert {one.code for one in found.refusals} == {"queue_full"} and refused[0] > refused[1] > 0


def test_the_oracle_counts_what_one_cache_that_forgets_nothing_would_find() -> None:
    trace = shared_prefixes(60, 5.0, replace(KIND, num_groups=4, prompt_tokens=100), output_tokens=4, seed=3)
    manager, found = BlockManager(4096, 16), 0
    for request in trace:
        table = allocate_prompt(manager, request.prompt_ids, "")
        assert table is not None
        manager.commit(table.blocks, table.hashes)
        manager.free(table.blocks)
        found += table.cached_tokens
    assert oracle_tokens(trace, 16) == found > 0


def test_one_request_takes_what_its_machine_takes() -> None:
    machine = Machine(row_s=0.001, least_s=0.01, step_s=0.02, step_row_s=0.0, handoff_s=0.005)
    request = SimRequest(name="r", at_s=1.0, prompt_ids=tuple(range(10, 110)), output_tokens=5)
    found = simulate([request, replace(request, name="again", at_s=3.0)], System(machine=machine))
    first, again = found.answers
    assert first.ttft_s == pytest.approx(0.1 + 3 * 0.0005) and first.ended_s == pytest.approx(1.0 + 0.105 + 4 * 0.02 + 3 * 0.0005)
    assert (first.cached_tokens, again.cached_tokens, again.decode_cached_tokens) == (0, 96, 96)
    assert again.ttft_s == pytest.approx(0.01 + 3 * 0.0005)


def test_a_report_is_refused_where_somebody_was_forgotten() -> None:
    trace = fresh(3, 1.0, prompt_tokens=(20, 30), output_tokens=(2, 3), seed=1)
    found = simulate(trace, System())
    check(found, trace)
    with pytest.raises(SystemExit, match="refusing to report"):
        check(Found(answers=found.answers[:2]), trace)


def test_a_recorded_trace_is_read_back() -> None:
    text = '[{"name": "a", "at_s": 0.5, "prompt_ids": [11, 12], "output_tokens": 3, "session": "s", "limit_s": 2.0}]'
    assert trace_of_json(text) == [SimRequest(name="a", at_s=0.5, prompt_ids=(11, 12), output_tokens=3, session="s", limit_s=2.0)]


def test_the_plot_draws_every_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("bench.serve.bench_routing.NUM_REQUESTS", 40)
    monkeypatch.setattr("bench.serve.bench_routing.RATES", (16.0,))
    result = tmp_path / "routing_sim.json"
    result.write_text(json.dumps({"prefix": prefix_rows()}))
    assert [path.suffix for path in route_plot.draw(result)] == [".png", ".svg"]
