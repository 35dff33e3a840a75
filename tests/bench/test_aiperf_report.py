"""What is kept of AIPerf's reports: a run that is whole, and none that failed."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from bench.serve.aiperf_report import result, run_summary

TIMES = {"avg": 1.23456, "p50": 1.0, "p90": 2.0, "p99": 3.0, "unit": "ms"}
REPORT: dict[str, Any] = {
    "aiperf_version": "0.13.0",
    "error_summary": [],
    "is_complete": True,
    "was_cancelled": False,
    "input_config": {"endpoint": {"type": "chat", "streaming": True}},
    "run_info": {"cli_command": "aiperf profile --model tiny-moe"},
    "request_count": {"avg": 100.0},
    "input_sequence_length": {"avg": 128.5},
    "output_sequence_length": {"avg": 32.0},
    "time_to_first_token": TIMES,
    "inter_token_latency": TIMES,
    "request_latency": TIMES,
    "request_throughput": {"avg": 4.0},
    "output_token_throughput": {"avg": 128.0},
}


def test_a_whole_run_is_kept() -> None:
    made = result([REPORT])
    (run,) = made["runs"]
    assert (made["aiperf"], run["endpoint"], run["num_requests"]) == ("0.13.0", "chat", 100) and made["commit"]
    assert run["time_to_first_token_ms"] == {"avg": 1.235, "p50": 1.0, "p90": 2.0, "p99": 3.0}


@pytest.mark.parametrize("wrong", [{"error_summary": [{"count": 1}]}, {"is_complete": False}, {"was_cancelled": True}])
def test_a_run_that_failed_is_none(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no result"):
        run_summary(copy.deepcopy(REPORT) | wrong)
