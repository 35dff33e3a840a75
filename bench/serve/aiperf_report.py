"""Owns a result file made of what NVIDIA's AIPerf wrote about its runs, and of the host. Runs nothing: docs/operations.md has commands.

    python bench/serve/aiperf_report.py FOLDER [FOLDER ...] --into bench/results/aiperf_cpu.json

Each folder is one run's --output-artifact-dir. A run with failed requests makes no result.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # `duomo bench` runs this file by its path

from bench.serve.host_facts import commit, cpu_name  # noqa: E402  # the line above makes it importable

LATENCIES = ("time_to_first_token", "inter_token_latency", "request_latency")
RATES = ("request_throughput", "output_token_throughput")
STATISTICS = ("avg", "p50", "p90", "p99")


def run_summary(report: dict[str, Any]) -> dict[str, Any]:
    """Of one run. Raises ValueError where requests failed, or some are missing."""
    if report["error_summary"] or not report["is_complete"] or report["was_cancelled"]:
        raise ValueError(f"AIPerf's run is no result: {report['error_summary'] or 'it was not complete'}")
    endpoint = report["input_config"]["endpoint"]
    return {
        "endpoint": endpoint["type"],
        "streaming": endpoint["streaming"],
        "command": report["run_info"]["cli_command"].replace(f"{ROOT}/", ""),
        "num_requests": int(report["request_count"]["avg"]),
        "input_tokens_avg": report["input_sequence_length"]["avg"],
        "output_tokens_avg": report["output_sequence_length"]["avg"],
        **{f"{name}_ms": {one: round(report[name][one], 3) for one in STATISTICS} for name in LATENCIES},
        **{f"{name}_per_s": round(report[name]["avg"], 3) for name in RATES},
    }


def result(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """The result file: the host, the commit, the version that measured, and every run."""
    return {
        "benchmark": "aiperf",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "aiperf": reports[0]["aiperf_version"],
        "runs": [run_summary(report) for report in reports],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="AIPerf's runs as a result file.")
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--into", type=Path, required=True)
    asked = parser.parse_args()
    reports = [json.loads((folder / "profile_export_aiperf.json").read_text()) for folder in asked.folders]
    asked.into.write_text(json.dumps(result(reports), indent=2) + "\n")


if __name__ == "__main__":
    main()
