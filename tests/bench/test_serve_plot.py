"""Plots of result files: every file has its curves, and no two look alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.serve import serve_plot
from bench.serve.serve_options import parse

pytest.importorskip("matplotlib", reason="matplotlib comes with the extra `bench`")


def content_of(label: str) -> dict[str, Any]:
    spread = {"p50_s": 0.01, "p95_s": 0.02}
    figures = {"itl": spread, "tpot": spread, "output_tokens_per_s": 100.0, "goodput_per_s": 1.5}
    return {
        "label": label,
        "asked": {"load": {"trace": "t", "num_requests": 2}},
        "host": {"device": "", "cpu": "a processor"},
        "server": {"gpus": 0},
        "points": [{"rate": rate, "figures": figures} for rate in (1.0, 2.0)],
    }


@pytest.mark.parametrize("count", [1, 7, serve_plot.MOST_FILES])
def test_every_file_is_drawn_and_looks_like_no_other(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []

    def keep(figure: Any, stem: Path) -> list[Path]:
        drawn.append(figure)
        return [stem]

    monkeypatch.setattr(serve_plot, "save", keep)
    labels = [f"server {number}" for number in range(count)]
    assert len(serve_plot.draw_all([content_of(label) for label in labels], tmp_path / "both")) == 2
    pareto, goodput = (figure.axes[0].get_lines() for figure in drawn)
    assert [line.get_label() for line in pareto] == [f"{label}, {kind}" for label in labels for kind in ("TPOT p50", "ITL p95")]
    assert [line.get_label() for line in goodput][1:] == labels, "after the line of all within limits"
    for lines in (pareto, goodput[1:]):
        assert len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}) == len(lines)


def test_more_files_than_can_be_told_apart_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--compare", *[__file__] * (serve_plot.MOST_FILES + 1)], None)
    assert "--compare: 31 files, and plots tell 30 apart; name fewer, or add --no-plots" in capsys.readouterr().err
    with pytest.raises(ValueError, match="tells 30 files apart, and this is number 31"):
        serve_plot.look_of(30)
