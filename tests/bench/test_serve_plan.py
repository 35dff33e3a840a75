"""Loads as they are drawn: arrivals, mixes, shared prefixes, traces and the prompts that are made of them."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.serve.serve_plan import (
    Arrivals,
    Piece,
    Request,
    Shape,
    TraceRow,
    Workload,
    lengths_asked,
    parse_arrivals,
    parse_mix,
    requests_of,
)
from bench.serve.serve_prompts import FIRST_ID, Dialect, body_of, ids_of, text_of
from bench.serve.serve_trace import TraceError, read_trace

kinds = st.one_of(st.just(Arrivals("poisson")), st.just(Arrivals("constant")), st.floats(0.1, 4.0).map(lambda b: Arrivals("gamma", b)))
shapes = st.builds(Shape, st.integers(1, 500), st.integers(1, 50), st.floats(0.1, 9.0))
loads = st.builds(
    Workload,
    mix=st.lists(shapes, min_size=1, max_size=3).map(tuple),
    arrivals=kinds,
    spread=st.floats(0.0, 0.9),
    prefix_share=st.floats(0.0, 1.0),
    prefix_groups=st.integers(1, 3),
    seed=st.integers(0, 9),
)
rates = st.floats(0.2, 20.0)


@settings(max_examples=40, deadline=None)
@given(load=loads, rate=rates, duration_s=st.floats(1.0, 8.0), point=st.integers(0, 3))
def test_a_load_is_what_was_asked(load: Workload, rate: float, duration_s: float, point: int) -> None:
    requests = requests_of(load, rate, duration_s, point)
    assert [request.index for request in requests] == list(range(len(requests))) and requests
    assert all(0.0 <= before.due_s <= after.due_s <= duration_s for before, after in itertools.pairwise(requests))
    for request in requests:
        assert any(_is_of(request, shape, load.spread) for shape in load.mix)
        prefix, own = request.pieces if len(request.pieces) == 2 else (None, request.pieces[0])
        assert own.num_tokens >= 1 and (
            prefix is None or prefix.num_tokens == min(round(load.prefix_share * request.prompt_tokens), request.prompt_tokens - 1)
        )
    assert len({request.pieces[-1].key for request in requests}) == len(requests)
    assert requests == requests_of(load, rate, duration_s, point), "drawn from the seed alone"
    means = lengths_asked(requests)
    assert (
        min(request.prompt_tokens for request in requests) <= means["prompt_tokens"] <= max(request.prompt_tokens for request in requests)
    )


def _is_of(request: Request, shape: Shape, spread: float) -> bool:
    asked = ((request.prompt_tokens, shape.prompt_tokens), (request.output_tokens, shape.output_tokens))
    return all(max(1, round(length * (1 - spread))) <= found <= math.ceil(length * (1 + spread)) for found, length in asked)


@settings(max_examples=40, deadline=None)
@given(load=loads, rate=rates, more=st.integers(1, 5))
def test_a_higher_rate_is_the_same_load_in_less_time(load: Workload, rate: float, more: int) -> None:
    slow, fast = requests_of(load, rate, 4.0, 1), requests_of(load, rate * more, 4.0, 2)
    assert len(slow) == max(1, round(rate * 4.0)) and len(fast) >= len(slow)
    unit = next((one.due_s / other.due_s for one, other in zip(slow, fast, strict=False) if other.due_s > 1e-3), 1.0)
    for one, other in zip(slow, fast, strict=False):
        assert one.due_s == pytest.approx(unit * other.due_s, abs=1e-6 * unit), "one pattern, at two paces"
        assert (one.prompt_tokens, one.output_tokens) == (other.prompt_tokens, other.output_tokens)
        assert not {piece.key for piece in one.pieces} & {piece.key for piece in other.pieces}, "another point's prompts are others"


@settings(max_examples=20, deadline=None)
@given(load=loads, rate=rates)
def test_another_salt_is_the_same_load_of_other_prompts(load: Workload, rate: float) -> None:
    one, other = requests_of(replace(load, salt="a"), rate, 4.0, 1), requests_of(replace(load, salt="b"), rate, 4.0, 1)
    for left, right in zip(one, other, strict=True):
        assert (left.due_s, left.output_tokens) == (right.due_s, right.output_tokens)
        assert [piece.num_tokens for piece in left.pieces] == [piece.num_tokens for piece in right.pieces]
        assert not {piece.key for piece in left.pieces} & {piece.key for piece in right.pieces}


@pytest.mark.parametrize(("told", "variation"), [("poisson", 1.0), ("constant", 0.0), ("gamma:0.25", 2.0), ("gamma:4", 0.5)])
def test_gaps_have_the_rate_and_the_burstiness_that_are_stated(told: str, variation: float) -> None:
    load = Workload(mix=(Shape(4, 2),), arrivals=parse_arrivals(told), seed=1)
    due = [request.due_s for request in requests_of(load, 50.0, 200.0, 0)]
    gaps = np.diff(due)
    assert len(due) == 10_000 and gaps.mean() == pytest.approx(1 / 50, rel=0.01)
    assert gaps.std() / gaps.mean() == pytest.approx(variation, abs=0.08)


def test_a_mix_comes_by_its_weights() -> None:
    load = Workload(mix=parse_mix("2048:128@3, 1024:256@1"), arrivals=parse_arrivals("constant"))
    prompts = [request.prompt_tokens for request in requests_of(load, 1000.0, 4.0, 0)]
    assert (
        len(prompts) == 4000 and prompts.count(2048) == pytest.approx(3000, rel=0.05) and prompts.count(1024) == 4000 - prompts.count(2048)
    )


def test_groups_share_a_prefix_and_nothing_else() -> None:
    load = Workload(mix=(Shape(100, 2),), arrivals=parse_arrivals("constant"), prefix_share=0.5, prefix_groups=3, spread=0.2)
    requests = requests_of(load, 40.0, 1.0, 0)
    groups = {request.pieces[0].key for request in requests}
    assert len(groups) == 3
    for one, other in itertools.combinations(requests, 2):
        first, second = ([each for piece in request.pieces for each in ids_of(piece, 8000)] for request in (one, other))
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
        is_group = one.pieces[0].key == other.pieces[0].key
        assert shared >= min(one.pieces[0].num_tokens, other.pieces[0].num_tokens) if is_group else shared < 5


@settings(max_examples=25, deadline=None)
@given(key=st.text(max_size=12), vocab=st.integers(FIRST_ID + 2, 200_000), shorter=st.integers(0, 300), more=st.integers(0, 300))
def test_prompts_are_of_the_vocabulary_and_begin_alike(key: str, vocab: int, shorter: int, more: int) -> None:
    ids = ids_of(Piece(key, shorter + more), vocab)
    assert len(ids) == shorter + more and all(FIRST_ID <= each < vocab for each in ids)
    assert ids[:shorter] == ids_of(Piece(key, shorter), vocab)


def test_bodies_say_what_the_server_takes() -> None:
    request = Request(0, 0.0, 9, (Piece("a", 10), Piece("b", 20)))
    whole = json.loads(body_of(request, Dialect(model="m", api="completions", vocab=50)))
    assert (whole["model"], whole["max_tokens"], whole["stream"], len(whole["prompt"])) == ("m", 9, True, 30)
    assert whole["ignore_eos"] is True and whole["return_token_ids"] is True and whole["stream_options"] == {"include_usage": True}
    told = json.loads(body_of(request, Dialect(model="m", api="completions", vocab=50, counting="usage")))
    assert told["stream_options"]["continuous_usage_stats"] is True and "return_token_ids" not in told
    bare = Dialect(model="m", api="chat", vocab=50, counting="events", ignores_eos=False, tokens_per_word=1.5, fixed_tokens=6.0)
    said = json.loads(body_of(request, bare))
    assert not {"ignore_eos", "return_token_ids", "prompt"} & set(said) and said["messages"][0]["content"] == text_of(request, bare)
    assert len(text_of(request, bare).split()) == (30 - 6) / 1.5
    other = Request(1, 0.0, 9, (Piece("a", 10), Piece("c", 20)))
    assert text_of(request, bare).split()[:6] == text_of(other, bare).split()[:6] and text_of(request, bare) != text_of(other, bare)


def test_a_trace_goes_at_its_own_pace_or_at_another() -> None:
    rows = tuple(TraceRow(10.0 + 2.0 * number, 1000 + number, 7, (1, number)) for number in range(5))
    load = Workload(mix=(Shape(1, 1),), arrivals=Arrivals("poisson"), salt="s", trace=rows)
    own = requests_of(load, None, 100.0, 0)
    assert [request.due_s for request in own] == [0.0, 2.0, 4.0, 6.0, 8.0] and [request.prompt_tokens for request in own] == list(
        range(1000, 1005)
    )
    assert [request.due_s for request in requests_of(load, 5.0, 100.0, 0)] == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8])
    assert len(requests_of(load, None, 5.0, 0)) == 3, "what is due later is left"
    assert [(piece.key, piece.num_tokens) for piece in own[3].pieces] == [("s 0 0 block 1", 512), ("s 0 0 block 3", 491)]
    instant = Workload(mix=(Shape(1, 1),), arrivals=Arrivals("poisson"), trace=(TraceRow(1.0, 5, 5), TraceRow(1.0, 5, 5)))
    assert [request.due_s for request in requests_of(instant, 7.0, 9.0, 0)] == [0.0, 0.0]


def test_three_ways_to_write_a_trace_down() -> None:
    ours = [
        '{"arrival_s": 2.5, "prompt_tokens": 30, "output_tokens": 4}',
        "",
        '{"arrival_s": 0.5, "prompt_tokens": 20, "output_tokens": 3}',
    ]
    assert read_trace(ours, "f") == (TraceRow(0.5, 20, 3), TraceRow(2.5, 30, 4))
    mooncake = ['{"timestamp": 1500, "input_length": 600, "output_length": 5, "hash_ids": [0, 7]}']
    assert read_trace(mooncake, "f") == (TraceRow(1.5, 600, 5, (0, 7)),)
    azure = ["TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-30 23:59:59.5000000,374,44", "2023-12-01 00:00:01.2500000,396,109"]
    assert read_trace(azure, "f") == (TraceRow(0.0, 374, 44), TraceRow(1.75, 396, 109))


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "f: no line"),
        (['{"arrival_s": 0}'], "f:1: prompt_tokens, output_tokens missing"),
        (["{}"], "f:1: timestamp, input_length, output_length missing"),
        (['{"arrival_s": 0, "prompt_tokens": 2, "output_tokens": 2}', "{"], "f:2: no JSON"),
        (['{"arrival_s": -1, "prompt_tokens": 2, "output_tokens": 2}'], "f:1: arrival_s is -1"),
        (['{"arrival_s": true, "prompt_tokens": 2, "output_tokens": 2}'], "f:1: arrival_s is True"),
        (['{"arrival_s": 0, "prompt_tokens": 2.5, "output_tokens": 2}'], "f:1: prompt_tokens is 2.5"),
        (['{"arrival_s": 0, "prompt_tokens": 2, "output_tokens": 2, "hash_ids": ["a"]}'], "f:1: hash_ids"),
        (["when,how,much"], "f:1: TIMESTAMP, ContextTokens, GeneratedTokens missing"),
        (["TIMESTAMP,ContextTokens,GeneratedTokens"], "f: no line below"),
        (["TIMESTAMP,ContextTokens,GeneratedTokens", "noon,1,1"], "f:2: TIMESTAMP is 'noon'"),
        (["TIMESTAMP,ContextTokens,GeneratedTokens", "", "2023-11-16 18:17:03,12,"], "f:3: GeneratedTokens is ''"),
    ],
)
def test_lines_that_are_no_request_are_named(lines: list[str], said: str) -> None:
    with pytest.raises(TraceError) as refused:
        read_trace(lines, "f")
    assert str(refused.value).startswith(said)


@pytest.mark.parametrize("told", ["", "2048", "2048:", "2048:128@", "0:5", "5:0", "5:5@0", "5:5;6:6", "-5:5"])
def test_mixes_that_are_none_are_refused(told: str) -> None:
    with pytest.raises(ValueError, match=r"PROMPT:OUTPUT|above 0"):
        parse_mix(told)


@pytest.mark.parametrize("told", ["", "gamma", "gamma:", "gamma:0", "gamma:-1", "poisson:2", "uniform"])
def test_arrivals_that_are_none_are_refused(told: str) -> None:
    with pytest.raises(ValueError, match="gamma:BURSTINESS"):
        parse_arrivals(told)
