"""What a GPU benchmark computes without a GPU: statistics, floors, refusals, result files. On a GPU: that a replay times what it holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import gpu_stopwatch
from bench.gpu_stopwatch import Options, Row, Timing, checked, facts, floor_us, gpu_bench, interleaved_us, num_sets, timing_of

MIB = 1 << 20


def timing(us: float) -> Timing:
    return Timing(median_us=us, best_us=us, p90_us=us * 1.1, repeats=50, calls=4)


def test_timing_is_per_call() -> None:
    got = timing_of([40.0, 20.0, 30.0, 100.0], calls=10)
    assert (got.median_us, got.best_us, got.p90_us, got.repeats) == (3.5, 2.0, 10.0, 4)
    assert got.spread == pytest.approx(10 / 3.5 - 1)


@pytest.mark.parametrize(("num_bytes", "expected"), [(800 * MIB, 4), (50 * MIB, 4), (25 * MIB, 6), (1, 256)])
def test_sets_are_cold(num_bytes: int, expected: int) -> None:
    """Between two uses of a set at least 2.5 times the L2 passes."""
    got = num_sets(num_bytes, l2_bytes=50 * MIB)
    assert got == expected and (got == 256 or (got - 1) * num_bytes >= 2.5 * 50 * MIB)


def test_the_floor_is_the_larger_time() -> None:
    assert floor_us(3.0e6) == pytest.approx(1.0)
    assert floor_us(3.0e6, 1.58e9) == pytest.approx(2.0)
    assert floor_us(3.0e6, 3.16e9, gpu_stopwatch.SEEN_FP8_FLOP_PER_S) == pytest.approx(2.0)


def test_a_row_says_its_share_of_the_floor() -> None:
    row = Row(case="64 tokens", times={"ours": timing(10.0), "peer": timing(15.0)}, num_bytes=24e6, error=0.001)
    assert row.as_json()["floor_over_ours"] == 0.8
    assert "(80%)" in row.line() and "peer 15.00 us (1.50x)" in row.line() and "2.40 TB/s" in row.line()
    json.dumps(row.as_json())


def test_a_wrong_result_ends_the_benchmark() -> None:
    ref = torch.randn(7, 33, dtype=torch.float64)
    assert checked("product", ref.bfloat16(), ref) < 2**-7
    with pytest.raises(SystemExit, match=r"refused: product \(error inf"):
        checked("product", torch.full_like(ref, torch.nan).bfloat16(), ref)


def test_facts_name_the_commit_that_the_caller_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUOMO_COMMIT", "abc123")
    got = facts("gate", 50)
    assert got["commit"] == "abc123" and {"device", "driver", "torch", "triton", "python", "date"} <= set(got)
    monkeypatch.delenv("DUOMO_COMMIT")
    assert facts("gate", 50)["commit"]


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["bench_gate", "--out", str(tmp_path / "gate.json")])

    def measure(options: Options) -> list[Row]:
        raise AssertionError(options)

    with pytest.raises(SystemExit) as ended:
        gpu_bench("gate", measure)
    assert ended.value.code == 2 and "needs an NVIDIA GPU" in capsys.readouterr().err
    assert not (tmp_path / "gate.json").exists()


@pytest.mark.gpu
def test_a_copy_takes_the_time_of_its_bytes() -> None:
    sets = [
        (torch.empty(64 * MIB, dtype=torch.uint8, device="cuda"), torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")) for _ in range(4)
    ]
    calls = [lambda a=a, b=b: a.copy_(b) for a, b in sets]
    times = interleaved_us({"once": calls, "twice": [lambda a=a, b=b: (a.copy_(b), a.copy_(b)) for a, b in sets]}, repeats=50)
    assert 30 < times["once"].median_us < 400
    assert 1.5 < times["twice"].median_us / times["once"].median_us < 2.2
