"""`duomo bench beside`: which requests it sends when, which gaps count for which window, and a run against a real server."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from bench.serve import bench_beside
from bench.serve.bench_beside import Asked, parse, prompts_of, ratios_of, requests_of, windows_of
from bench.serve.serve_figures import Seen
from tests.bench.test_bench_serve import SmallServer, serving

ASKED = Asked(
    url="",
    vocab=None,
    streams=2,
    stream_prompt_tokens=5,
    stream_tokens=100,
    prompt_tokens=7,
    output_tokens=3,
    every_s=0.4,
    window_s=1.0,
    pairs=2,
    lead_s=1.0,
    salt="s",
    out=Path("x"),
)


def seen(index: int, due_s: float, event_s: list[float], error: str = "") -> Seen:
    return Seen(index=index, due_s=due_s, sent_s=due_s, prompt_tokens=7, output_tokens=3, event_s=tuple(event_s), error=error)


def test_prompts_are_due_in_every_second_window_alone() -> None:
    sent = requests_of(ASKED)
    assert [request.due_s for request in sent] == pytest.approx([0.0, 0.02, 2.0, 2.4, 4.0, 4.4])
    assert [request.prompt_tokens for request in sent] == [5, 5, 7, 7, 7, 7]
    assert len({piece.key for request in sent for piece in request.pieces}) == len(sent), "none is in a cache"
    assert ASKED.end_s == 6.0


def test_a_window_with_prompts_is_judged_by_its_neighbours() -> None:
    """Gaps grow by a tenth a window as the streams grow; prompts make every gap half as long again, and the first of them do not count."""
    times, now_s = [0.9], 0.9
    while now_s < 6.2:
        window = max(0, int(now_s - 1.0))
        gap_s = 0.01 * (1 + 0.1 * window) * (1.5 if window % 2 else 1.0) + (0.07 if 0 <= now_s - 1.0 - window < 0.01 else 0.0)
        now_s += gap_s
        times.append(now_s)
    windows = windows_of([seen(0, 0.0, times), seen(2, 2.0, [2.0, 3.0])], ASKED)
    assert [window.has_prompts for window in windows] == [False, True, False, True, False]
    assert all(window.itl is not None and window.itl.max_s < 0.05 for window in windows)
    assert ratios_of(windows)["mean"] == pytest.approx([1.5, 1.5], rel=0.02)
    assert ratios_of([dataclasses.replace(window, itl=None) for window in windows]) == {}


def test_prompts_tell_how_much_longer_than_a_step_their_second_token_takes() -> None:
    answers = [seen(number, 2.0, [2.1, 2.106, 2.109, 2.112]) for number in range(3, 6)]
    first, cut = seen(2, 2.0, [2.5, 2.9, 3.0]), seen(6, 4.0, [4.1], "unfinished when the load was cut off")
    told = prompts_of([seen(0, 0.0, [0.1, 0.2]), first, *answers, cut], ASKED)
    assert (told["requests"], told["failed"]) == (3, 1)
    assert told["ttft"]["p50_s"] == pytest.approx(0.1) and told["second_over_step_ms"] == pytest.approx(3.0)
    assert prompts_of([], ASKED)["second_over_step_ms"] is None


@pytest.mark.parametrize(("option", "value"), [("--pairs", "0"), ("--output-tokens", "2"), ("--every-s", "0"), ("--every-s", "9")])
def test_what_cannot_be_measured_is_refused_by_name(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse([option, value])
    assert f"{option} {value}" in capsys.readouterr().err


def test_a_run_writes_what_it_saw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, small = tmp_path / "beside.json", SmallServer()
    asked = ["--streams", "2", "--window-s", "0.5", "--pairs", "1", "--lead-s", "0.3", "--every-s", "0.2", "--prompt-tokens", "20"]
    with serving(small) as url:
        monkeypatch.setattr("sys.argv", ["beside", "--url", url, *asked, "--out", str(out)])
        bench_beside.main()
    content = json.loads(out.read_text())
    assert [window["has_prompts"] for window in content["windows"]] == [False, True, False]
    assert all(window["itl"]["count"] > 20 for window in content["windows"])
    assert content["prompts"]["failed"] == 0 and content["prompts"]["requests"] == 1, "of two, the first is left out"
    assert content["streams_that_ended_early"] == {} and len(content["itl_over_quiet"]["mean"]) == 1
    assert sorted(body["max_tokens"] for body in small.bodies if len(body["prompt"]) == 64) == [4000, 4000]


def test_streams_that_end_before_the_last_window_make_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "beside.json"
    asked = ["--streams", "1", "--stream-tokens", "8", "--window-s", "0.5", "--pairs", "1", "--lead-s", "0.1", "--every-s", "0.2"]
    with serving(SmallServer()) as url:
        monkeypatch.setattr("sys.argv", ["beside", "--url", url, *asked, "--prompt-tokens", "20", "--out", str(out)])
        assert bench_beside.main() == 1
    assert json.loads(out.read_text())["streams_that_ended_early"] == {"0": ""}
    assert "stream 0 ended early" in capsys.readouterr().out


def test_prompts_that_fail_make_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--streams", "0", "--window-s", "0.5", "--pairs", "1", "--lead-s", "0.1", "--every-s", "0.25", "--prompt-tokens", "20"]
    with serving(SmallServer(fails_every=1)) as url:
        monkeypatch.setattr("sys.argv", ["beside", "--url", url, *asked, "--out", str(tmp_path / "beside.json")])
        assert bench_beside.main() == 1
    assert "failed: 2;" in capsys.readouterr().out
