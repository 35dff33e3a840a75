"""Owns the timing of GPU calls by graph replay with cold caches, the facts of a run, and its result file. Knows nothing of what it times.

How the bench of a kernel uses it (bench/kernels/bench_<op>.py, run by `duomo bench bench_<op>`):

    from bench.gpu_stopwatch import Row, checked, gpu_bench, interleaved_us, num_sets, Options

    def measure(options: Options) -> list[Row]:
        rows = []
        for tokens in (1, 64, 1024):
            sets = [make_inputs(seed) for seed in range(num_sets(bytes_of_one_set))]      # on the GPU, made once
            error = checked("my_op", my_op(*sets[0]), my_op_reference(*sets[0]))          # refuses to go on if wrong
            calls = {"ours": [partial(my_op, *s) for s in sets], "peer": [partial(theirs, *s) for s in sets]}
            times = interleaved_us(calls, repeats=options.repeats)
            rows.append(Row(case=f"{tokens} tokens", times=times, num_bytes=..., num_flop=..., error=error))
        return rows

    if __name__ == "__main__":
        gpu_bench("my_op", measure)        # --repeats --out --only; without a GPU it says so and exits 2

A call is a function without arguments that launches on the current stream, never waits for the GPU and always does the same work.
Every call of a list works on another set (weights, inputs), so that it finds nothing of its own in L2: sets together are at least 2.5
times the L2, and at least four. Calls become nodes of CUDA graphs; graphs of all sides are replayed in turn (A B A B) with events
between them, queued ahead so that the GPU never waits for the host; time per call = time of a replay / its calls.

An operation whose inputs are small has them in L2 in real life, since the kernel before has just written them: `[call] * 50` in place
of sets times it warm, as one of many dependent calls.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bench.stopwatch import ROOT, refuse_unless
from bench.stopwatch import commit as commit_of_checkout
from duomo_kernels._bounds import bound, error

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE

RESULTS = ROOT / "bench" / "results"
SEEN_BYTES_PER_S = 3.0e12  # of an H100's 3.35 TB/s: what floors count with, see the ceilings in each result file
SEEN_BF16_FLOP_PER_S = 790e12  # of 989
SEEN_FP8_FLOP_PER_S = 2 * SEEN_BF16_FLOP_PER_S
COLD_TIMES_L2 = 2.5  # bytes that pass through L2 between two uses of one set, in L2 sizes
MIN_GRAPH_US = 800.0  # a replay has about 2 us of its own: at most 0.3% of what is timed

Call = Callable[[], object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Microseconds of one call, over replays of `calls` calls each."""

    median_us: float
    best_us: float
    p90_us: float
    repeats: int
    calls: int

    @property
    def spread(self) -> float:
        """How far the 90th percentile lies above the median, as a share."""
        return self.p90_us / self.median_us - 1


def timing_of(samples_us: Sequence[float], calls: int) -> Timing:
    """Statistics of replays; samples_us is per replay."""
    per_call = sorted(sample / calls for sample in samples_us)
    return Timing(
        median_us=round(statistics.median(per_call), 3),
        best_us=round(per_call[0], 3),
        p90_us=round(per_call[min(len(per_call) - 1, int(0.9 * len(per_call)))], 3),
        repeats=len(per_call),
        calls=calls,
    )


def num_sets(num_bytes: int, l2_bytes: int | None = None, at_most: int = 256) -> int:
    """Sets of num_bytes each that make every call cold: at least four, together at least 2.5 times the L2."""
    l2_bytes = l2_size() if l2_bytes is None else l2_bytes
    return min(at_most, max(4, -(-int(COLD_TIMES_L2 * l2_bytes) // max(1, num_bytes)) + 1))


def l2_size() -> int:
    """Bytes of the current device's L2; an H100's where there is none."""
    return int(torch.cuda.get_device_properties("cuda").L2_cache_size) if torch.cuda.is_available() else 50 << 20


@dataclass(frozen=True, slots=True)
class _Side:
    """The graphs of one side, replayed in turn; each holds the same number of calls."""

    graphs: list[torch.cuda.CUDAGraph]
    calls: int


@functools.cache
def _stream() -> torch.cuda.Stream:
    """One stream for all warming and capturing: the allocator keeps what it freed for each stream apart."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch ships no types for it


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch ships no types for it


def _capture(calls: Sequence[Call], pool: _POOL_HANDLE) -> torch.cuda.CUDAGraph:
    """The calls as one graph. torch.cuda.graph() would empty the allocator's cache each time: longer than the measurement."""
    graph = torch.cuda.CUDAGraph()
    stream = _stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=pool)
        try:
            for call in calls:
                call()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph


def _warm(calls: Sequence[Call]) -> None:
    """What the first calls do (compile, allocate workspaces) must not happen inside a capture."""
    stream = _stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in [calls[0], *calls]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def _side(calls: Sequence[Call], pool: _POOL_HANDLE) -> _Side:
    """Long calls get a graph each; short ones share a graph, as often as it takes to reach MIN_GRAPH_US."""
    _warm(calls)
    one_pass = _capture(calls, pool)
    one_pass.replay()
    (pass_us,) = _replays([_Side([one_pass], 1)], 1)[0]
    if pass_us / len(calls) >= MIN_GRAPH_US:
        return _Side([_capture([call], pool) for call in calls], 1)
    passes = int(MIN_GRAPH_US // max(pass_us, 1.0)) + 1
    if passes == 1:
        return _Side([one_pass], len(calls))
    return _Side([_capture(list(calls) * passes, pool)], len(calls) * passes)


def _replays(sides: Sequence[_Side], repeats: int) -> list[list[float]]:
    """Microseconds of each replay by side, sides in turn. Everything is queued before anything is waited for."""
    marks = [_event() for _ in range(repeats * len(sides) + 1)]
    marks[0].record()
    for i in range(repeats):
        for at, side in enumerate(sides):
            side.graphs[i % len(side.graphs)].replay()
            marks[i * len(sides) + at + 1].record()
    marks[-1].synchronize()
    spans = [a.elapsed_time(b) * 1e3 for a, b in zip(marks, marks[1:], strict=False)]
    return [spans[at :: len(sides)] for at in range(len(sides))]


def interleaved_us(sides: Mapping[str, Sequence[Call]], *, repeats: int = 50) -> dict[str, Timing]:
    """Cold time per call of every side, replays in turn, so that clocks and temperature fall on all alike."""
    with torch.inference_mode():
        pool = torch.cuda.graph_pool_handle()
        captured = [_side(calls, pool) for calls in sides.values()]
        _replays(captured, 2)
        samples = _replays(captured, repeats)
    return {name: timing_of(times, side.calls) for name, times, side in zip(sides, samples, captured, strict=True)}


def cold_graph_us(calls: Sequence[Call], *, repeats: int = 50) -> Timing:
    """Time per call where each call works on another set (see the header)."""
    return interleaved_us({"ours": calls}, repeats=repeats)["ours"]


def checked(what: str, out: Tensor, ref: Tensor) -> float:
    """error(out, ref), or the end of the benchmark where it exceeds the bound of out's dtype."""
    wrong = error(out, ref)
    refuse_unless(wrong <= bound(out.dtype), f"{what} (error {wrong:.3g}, bound {bound(out.dtype):.3g})")
    return wrong


def floor_us(num_bytes: float, num_flop: float = 0.0, flop_per_s: float = SEEN_BF16_FLOP_PER_S) -> float:
    """The larger of the times that the bytes and the operations take at the rates that were seen."""
    return max(num_bytes / SEEN_BYTES_PER_S, num_flop / flop_per_s) * 1e6


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One case. times holds "ours" and any peers; bytes and operations are those that the maths needs; error is error() of ours."""

    case: str
    times: dict[str, Timing]
    num_bytes: float
    num_flop: float = 0.0
    flop_per_s: float = SEEN_BF16_FLOP_PER_S
    error: float | None = None
    about: dict[str, float | str] = field(default_factory=dict)

    @property
    def floor_us(self) -> float:
        return floor_us(self.num_bytes, self.num_flop, self.flop_per_s)

    def as_json(self) -> dict[str, object]:
        floor = {"floor_us": round(self.floor_us, 3), "floor_over_ours": round(self.floor_us / self.times["ours"].median_us, 4)}
        return asdict(self) | floor

    def line(self) -> str:
        """case | ours, its share of the floor and of the bandwidth | each peer and how many times as fast ours is."""
        ours = self.times["ours"]
        rates = f"{self.num_bytes / ours.median_us / 1e6:6.2f} TB/s {self.num_flop / ours.median_us / 1e6:6.1f} TFLOP/s"
        floor = f"floor {self.floor_us:8.2f} ({self.floor_us / ours.median_us:.0%})"
        peers = [f"{name} {t.median_us:.2f} us ({t.median_us / ours.median_us:.2f}x)" for name, t in self.times.items() if name != "ours"]
        head = f"{self.case:<44} {ours.median_us:9.2f} us  +{ours.spread:4.0%}"
        return "  ".join([head, floor, rates, *peers])


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What the command line of a kernel's bench says; `only` is a part of a case's name, "" for all."""

    repeats: int = 50
    only: str = ""


def facts(bench: str, repeats: int) -> dict[str, object]:
    """Device, driver, versions, commit and date: the head of a result file."""
    return {
        "bench": bench,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor(),
        "driver": _driver(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": os.environ.get("DUOMO_COMMIT") or commit_of_checkout(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "repeats": repeats,
    }


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


@functools.cache
def _driver() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        run = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return run.stdout.strip().splitlines()[0] if run.returncode == 0 and run.stdout.strip() else "unknown"


def require_gpu(what: str) -> None:
    """Exit 2 where no CUDA device is, and say what is missing."""
    if torch.cuda.is_available():
        return
    reason = "this torch is a CPU build" if torch.version.cuda is None else "torch finds no CUDA device (see nvidia-smi)"
    print(f"{what}: needs an NVIDIA GPU, and {reason}: torch {torch.__version__}. Nothing was measured.", file=sys.stderr)
    raise SystemExit(2)


def write_result(path: Path, content: Mapping[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def gpu_bench(op: str, measure: Callable[[Options], list[Row]]) -> None:
    """The command line of one operation's bench: measures, writes --out (bench/results/<op>.json), prints the table last."""
    parser = argparse.ArgumentParser(description=f"{op} on the GPU: graph replays, cold L2, against a float64 reference first")
    parser.add_argument("--repeats", type=int, default=50, help="replays of each graph (at least 50 for a result that counts)")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{op}.json", help="result file")
    options = parser.parse_args()
    require_gpu(op)
    rows = measure(Options(repeats=options.repeats, only=options.only))
    write_result(options.out, facts(op, options.repeats) | {"rows": [row.as_json() for row in rows]})
    print(f"{op}: {torch.cuda.get_device_name()}, {options.repeats} replays, result file {options.out}")
    for row in rows:
        print(row.line())
