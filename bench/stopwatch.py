"""Times functions side by side on the CPU and writes the result with hardware, commit and repeats. Knows nothing of what it times."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Microseconds of one call (fastest and median of the repeats) and, where a peer ran beside it, the ratio of the fastest."""

    case: str
    best_us: float
    median_us: float
    peer: str
    peer_best_us: float
    times_as_fast_as_peer: float


def side_by_side(case: str, ours: Callable[[], object], peer: str, theirs: Callable[[], object], *, repeats: int = 30) -> Measured:
    """Call both in turn, so that what else the machine does falls on both."""
    times: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        for _ in range(repeats + 3):
            for run, seconds in zip((ours, theirs), times, strict=True):
                started_s = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - started_s)
    mine, other = (sorted(seconds[3:]) for seconds in times)
    return Measured(
        case=case,
        best_us=round(mine[0] * 1e6, 1),
        median_us=round(mine[len(mine) // 2] * 1e6, 1),
        peer=peer,
        peer_best_us=round(other[0] * 1e6, 1),
        times_as_fast_as_peer=round(other[0] / mine[0], 3),
    )


def refuse_unless(is_right: bool, what: str) -> None:
    """A benchmark of a wrong answer reports nothing."""
    if not is_right:
        raise SystemExit(f"refused: {what} is wrong, so its speed means nothing")


def report(bench: str, measure: Callable[[int], list[Measured]]) -> None:
    """The command line of a benchmark: --repeats, --threads, --out FILE.json. Prints one line a case."""
    parser = argparse.ArgumentParser(description=bench)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = measure(options.repeats)
    for one in results:
        print(
            f"{bench} {one.case}: {one.best_us} us (median {one.median_us}), "
            f"{one.peer} {one.peer_best_us} us, {one.times_as_fast_as_peer}x as fast"
        )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        about = {"bench": bench, "hardware": hardware(), "commit": commit(), "repeats": options.repeats, "torch_threads": options.threads}
        options.out.write_text(json.dumps(about | {"results": [asdict(one) for one in results]}, indent=2) + "\n")


def hardware() -> str:
    """Processor, cores, torch."""
    model = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{model[0] if model else platform.processor()}, {len(model)} cores, torch {torch.__version__}"


def commit() -> str:
    """The checkout's commit, with a + where files differ from it."""
    run = subprocess.run(["git", "describe", "--always", "--dirty=+", "--exclude=*"], cwd=ROOT, capture_output=True, text=True, check=False)
    return run.stdout.strip() or "unknown"
