"""What a load's requests come to: percentiles, rates, limits, and the search for the highest rate that keeps them."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.serve.serve_figures import Seen, figures_of, spread_of
from bench.serve.serve_limits import Limit, Limits, Unloaded, parse_limit
from bench.serve.serve_search import Search, best_rate, finding, next_rate


def seen(due_s: float, *event_s: float, tokens: int = 1, error: str = "", prompt_tokens: int = 100) -> Seen:
    return Seen(
        index=0,
        due_s=due_s,
        sent_s=due_s + 0.001,
        prompt_tokens=prompt_tokens,
        output_tokens=len(event_s) * tokens,
        event_s=event_s,
        event_tokens=(tokens,) * len(event_s),
        num_tokens=len(event_s) * tokens,
        error=error,
    )


times = st.lists(st.floats(0.0, 2.0), min_size=1, max_size=8).map(sorted)
answers = st.builds(
    lambda due, after, error: seen(due, *(due + each for each in after), error=error),
    st.floats(0, 9),
    times,
    st.sampled_from(["", "", "503"]),
)


@settings(max_examples=40, deadline=None)
@given(found=st.lists(answers, max_size=12), ramp_s=st.floats(0.0, 5.0), strictest=st.floats(0.0, 2.0))
def test_rates_and_shares_add_up(found: list[Seen], ramp_s: float, strictest: float) -> None:
    def kept(one: Seen) -> bool:
        return not one.error and one.ttft_s <= strictest

    figures = figures_of(found, ramp_s, 10.0, kept)
    due = [one for one in found if one.due_s >= ramp_s]
    assert figures.num_requests == len(due) and figures.num_failed == sum(bool(one.error) for one in due)
    assert figures.window_s == 10.0 - ramp_s and sum(figures.errors.values()) == figures.num_failed
    assert figures.goodput_per_s == pytest.approx(sum(map(kept, due)) / figures.window_s)
    assert (figures.kept_share is None) == (not due) and (figures.kept_share or 0.0) <= 1.0
    assert figures.output_tokens_per_s * figures.window_s == pytest.approx(sum(ramp_s <= at < 10.0 for one in found for at in one.event_s))
    for one in (figures.ttft, figures.itl, figures.tpot, figures.e2e, figures.late):
        assert one is None or one.p50_s <= one.p90_s <= one.p95_s <= one.p99_s <= one.max_s
    assert (0 if figures.itl is None else figures.itl.count) == sum(len(one.event_s) - 1 for one in due)
    assert (0 if figures.ttft is None else figures.ttft.count) == len(due)


@given(samples=st.lists(st.floats(0.0, 9.0), min_size=1, max_size=50))
def test_percentiles_are_numpys(samples: list[float]) -> None:
    found = spread_of(samples)
    assert found is not None and found.p95_s == pytest.approx(np.quantile(samples, 0.95), abs=1e-6) and found.count == len(samples)
    assert found.mean_s == pytest.approx(np.mean(samples), abs=1e-6) and spread_of([]) is None


def test_times_are_from_when_a_request_was_due() -> None:
    one = seen(5.0, 5.1, 5.2, 5.4)
    assert one.ttft_s == pytest.approx(0.1) and one.e2e_s == pytest.approx(0.4) and one.gaps_s.tolist() == pytest.approx([0.1, 0.2])
    assert one.tpot_s == pytest.approx(0.15) and seen(5.0, 5.1).tpot_s is None
    assert seen(5.0, 5.1, 5.5, tokens=2).tpot_s == pytest.approx(0.2), "of each token after the first event's"


def test_tokens_that_only_usage_tells_are_spread_over_events() -> None:
    text = Seen(
        index=0,
        due_s=0.0,
        sent_s=0.0,
        prompt_tokens=8,
        output_tokens=8,
        event_s=(1.0, 2.0, 3.0, 11.0),
        event_tokens=(1, 1, 1, 1),
        num_tokens=8,
    )
    assert figures_of([text], 0.0, 10.0, None).output_tokens_per_s == pytest.approx(8 * 3 / 4 / 10)


def test_a_client_that_sends_late_is_found_out() -> None:
    assert figures_of([seen(1.0, 1.2)], 0.0, 10.0, None).was_in_time
    late = Seen(index=0, due_s=1.0, sent_s=1.1, prompt_tokens=8, output_tokens=1, event_s=(1.2,), event_tokens=(1,), num_tokens=1)
    figures = figures_of([late] * 50, 0.0, 10.0, None)
    assert not figures.was_in_time and figures.late is not None and figures.late.p99_s == pytest.approx(0.1)


def test_limits_are_of_each_prompts_length() -> None:
    unloaded = (Unloaded(100, 0.1, 0.01), Unloaded(1100, 1.1, 0.02))
    limits = Limits(ttft=parse_limit("4x"), itl=parse_limit("1.5x"), unloaded=unloaded)
    assert [limits.ttft_s(tokens) for tokens in (1, 100, 600, 1100, 9000)] == pytest.approx([0.4, 0.4, 2.4, 4.4, 4.4])
    assert limits.itl_s(600) == pytest.approx(1.5 * 0.015)
    assert (
        limits.are_kept_by(seen(0.0, 0.4, 0.414))
        and not limits.are_kept_by(seen(0.0, 0.41, 0.42))
        and not limits.are_kept_by(seen(0.0, 0.1, 0.2))
    )
    assert limits.are_kept_by(seen(0.0, 2.3, prompt_tokens=600)), "one token has no gap"
    assert not limits.are_kept_by(seen(0.0, 0.1, error="cut off")) and not limits.are_kept_by(seen(0.0))
    steady = [0.1 + 0.01 * number for number in range(100)]
    assert limits.are_kept_by(seen(0.0, *steady[:-1], steady[-1] + 5)), "one gap in a hundred may be longer"
    assert not limits.are_kept_by(seen(0.0, *steady[:90], *(each + 5 * n for n, each in enumerate(steady[90:], 1))))
    fixed = Limits(ttft=parse_limit("250ms"), itl=parse_limit("0.02s"), unloaded=())
    assert fixed.ttft_s(7) == 0.25 and fixed.itl_s(7) == 0.02 and str(fixed.ttft) == "250ms" and str(limits.itl) == "1.5x"


@pytest.mark.parametrize("told", ["", "4", "x", "0x", "-1s", "4 x", "4min", "1e3ms"])
def test_limits_that_are_none_are_refused(told: str) -> None:
    with pytest.raises(ValueError, match="such as 4x"):
        parse_limit(told)


@given(value=st.floats(0.01, 100.0).map(lambda value: float(f"{value:.3g}")), is_multiple=st.booleans())
def test_limits_are_read_as_they_are_said(value: float, is_multiple: bool) -> None:
    again = parse_limit(str(Limit(value, is_multiple)))
    assert again.is_multiple is is_multiple and again.value == pytest.approx(value)


@settings(max_examples=40, deadline=None)
@given(lowest=st.floats(0.1, 4.0), factor=st.floats(1.5, 200.0), bears=st.floats(0.05, 2000.0), precision=st.floats(0.01, 0.5))
def test_the_search_ends_at_the_highest_rate_that_is_borne(lowest: float, factor: float, bears: float, precision: float) -> None:
    search = Search(lowest=lowest, highest=lowest * factor, precision=precision, max_points=60)
    tried: dict[float, float] = {}
    while (rate := next_rate(search, tried)) is not None:
        assert rate not in tried and search.lowest <= rate <= search.highest
        tried[rate] = 1.0 if rate <= bears else 0.5
        assert len(tried) <= 40
    found = best_rate(search, tried)
    if bears < lowest:
        assert found is None and len(tried) == 1 and finding(search, tried).startswith("no rate")
    elif bears >= search.highest:
        assert found == search.highest and finding(search, tried).startswith("at least")
    else:
        assert found is not None and found <= bears <= found * (1 + precision) and "fails with 50%" in finding(search, tried)


def test_a_rate_that_passes_above_one_that_fails_is_luck() -> None:
    assert best_rate(Search(lowest=1.0, highest=8.0), {1.0: 1.0, 4.0: 0.5, 8.0: 0.95}) == 1.0


@pytest.mark.parametrize(
    ("highest", "bears", "said"),
    [
        (2048.0, 1.0, "1 requests/s; 1.414/s fails with 50% .*; the search is out of loads .3. where the two are 41.4% apart; within 5.0%"),
        (2048.0, 9.0, "at least 4 requests/s, the highest that was asked; the search is out of loads .3. below 2048/s"),
        (4.0, 9.0, "at least 4 requests/s, the highest that was asked$"),
    ],
)
def test_a_search_that_is_out_of_loads_says_so(highest: float, bears: float, said: str) -> None:
    search = Search(lowest=1.0, highest=highest, max_points=3)
    tried: dict[float, float] = {}
    while (rate := next_rate(search, tried)) is not None:
        tried[rate] = 1.0 if rate <= bears else 0.5
    assert re.match(said, finding(search, tried))
    search = Search(lowest=1.0, highest=highest, max_points=9)
    assert ("did not end" in finding(search, tried)) == ("out of loads" in said), "of the file that is written on the way"


@given(shares=st.lists(st.floats(0.0, 1.0), min_size=3, max_size=12))
def test_a_search_ends_whatever_it_is_told(shares: list[float]) -> None:
    search = Search(lowest=1.0, highest=64.0, max_points=len(shares))
    tried: dict[float, float] = {}
    while (rate := next_rate(search, tried)) is not None:
        tried[rate] = shares[len(tried)]
    found = best_rate(search, tried)
    assert found is None or (tried[found] >= search.share and all(share >= search.share for rate, share in tried.items() if rate <= found))
