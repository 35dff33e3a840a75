"""What `duomo bench soak` concludes, and what its clients see of a real server that stalls, fails and sends several tokens at once."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.serve import bench_soak, soak_plot
from bench.serve.bench_soak import RAMP_S, Asked, Seen, parse, report
from bench.serve.rest_client import StreamResult
from bench.serve.soak_client import Load, fault_of, run_client
from bench.serve.soak_verdicts import (
    MAX_RISE_BYTES,
    by_minute,
    client_verdict,
    counter_verdicts,
    itl_verdict,
    line_of,
    memory_verdict,
    spread,
)
from bench.serve.soak_watch import Sample, Watch, counters_in

GIB = 2**30
LOAD = Load(url="http://127.0.0.1:1", model="m", num_streams=8, duration_s=600.0, prompt_tokens=(4, 9), new_tokens=(20, 40), vocab=50)


def drawn(level: float, noise: float, slope: float, *, start_rise: float = 0.0, seed: int = 0) -> tuple[list[float], list[float]]:
    """Ten minutes of a sample every 5 s."""
    at = np.arange(0.0, 600.0, 5.0)
    values = level + noise * np.random.default_rng(seed).standard_normal(len(at)) + slope * at - start_rise * np.exp(-at / 15)
    return at.tolist(), values.tolist()


@pytest.mark.parametrize("noise", [0.0, 4e6, 2e7])
def test_memory_that_only_trembles_or_settles_is_flat(noise: float) -> None:
    for seed in range(10):
        line = line_of(*drawn(6 * GIB, noise, 0.0, start_rise=GIB, seed=seed), 0.0, 600.0)
        assert line is not None and line.is_flat, line
        assert abs(line.slope_bytes_per_s) <= 2 * line.error_bytes_per_s + 2e4


def test_a_leak_of_a_megabyte_in_ten_seconds_is_found_beneath_noise() -> None:
    for seed in range(10):
        line = line_of(*drawn(6 * GIB, 4e6, 1e5, seed=seed), 0.0, 600.0)
        assert line is not None and not line.is_flat
        assert memory_verdict("RSS", line).passed is False


def test_one_step_up_is_found_though_no_line_fits_it() -> None:
    at, values = drawn(2 * GIB, 1e6, 0.0)
    stepped = [value + 3 * MAX_RISE_BYTES * (time_s > 500) for time_s, value in zip(at, values, strict=True)]
    line = line_of(at, stepped, 0.0, 600.0)
    assert line is not None and line.step_bytes > 0.02 * 2 * GIB and not line.is_flat


def test_a_short_soak_says_nothing_of_memory() -> None:
    at, values = drawn(GIB, 0.0, 0.0)
    assert line_of(at[:20], values[:20], 0.0, 100.0) is None and memory_verdict("RSS", None).passed is None


def test_gaps_are_counted_in_total_and_by_minute() -> None:
    gap_s = np.full(1000, 0.008)
    gap_s[::50] = 0.012  # two in a hundred
    gap_end_s = np.linspace(0.0, 150.0, 1000, endpoint=False)
    total = spread(gap_s, np.ones(1000), 150.0)
    assert (total.num_events, total.max_s) == (1000, 0.012) and total.ratio == pytest.approx(1.5)
    assert total.tokens_per_s == pytest.approx(1000 / 150)
    assert itl_verdict(total, 1.3).passed is False and itl_verdict(total, 1.5001).passed is True
    minutes = by_minute(gap_end_s, gap_s, np.ones(1000), 0.0, 150.0)
    assert [minute.num_events for minute in minutes] == [400, 400, 200] and minutes[2].tokens_per_s == pytest.approx(200 / 30)
    assert itl_verdict(spread(np.empty(0), np.empty(0), 1.0), 1.3).passed is False, "no token is no pass"


def test_clients_that_are_late_or_busy_are_not_believed() -> None:
    late, in_time = np.full(100, 0.004), np.full(100, 0.0008)
    assert client_verdict({"0": in_time}, {"0": 0.2}).passed is True
    assert client_verdict({"0": in_time, "1": late}, {"0": 0.2, "1": 0.2}).passed is False
    assert client_verdict({"0": in_time}, {"0": 0.9}).passed is False
    assert client_verdict({}, {}).passed is False


def test_counters_are_summed_over_replicas_and_must_not_move() -> None:
    text = "\n".join(
        f'duomo_replica_counter{{counter="{name}",replica="{replica}",role="decode"}} {value}'
        for name, replica, value in (("preemptions", "a", "1.0"), ("preemptions", "b", "2.0"), ("tokens", "a", "9.0"))
    )
    assert counters_in(text) == {"preemptions": 3} and counters_in("vllm:num_preemptions_total 3") is None
    assert [verdict.passed for verdict in counter_verdicts({"preemptions": 3}, {"preemptions": 3})] == [True]
    assert [verdict.passed for verdict in counter_verdicts({}, {"failed_bad_logits": 1})] == [False]
    compiled = {"kernel_compilations_after_ready": 1}
    assert [verdict.passed for verdict in counter_verdicts(compiled, compiled)] == [True, False], "before the soak counts too"
    assert [verdict.passed for verdict in counter_verdicts(None, None)] == [None]


def test_requests_are_the_same_in_every_run_and_ends_are_spread() -> None:
    firsts = [LOAD.body(slot, 0)["max_tokens"] for slot in range(8)]
    assert firsts == [LOAD.body(slot, 0)["max_tokens"] for slot in range(8)]
    assert min(firsts) <= 6 and max(firsts) >= 20 and len(set(firsts)) >= 6
    later = [LOAD.body(slot, turn) for slot in range(8) for turn in (1, 2)]
    assert all(20 <= body["max_tokens"] <= 40 and 4 <= len(body["prompt"]) <= 9 for body in later)
    assert all(10 <= token < 50 for body in later for token in body["prompt"]) and later[0]["prompt"] != later[1]["prompt"]


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (StreamResult(status=503, body=b"busy"), "503"),
        (StreamResult(status=200, token_ids={0: [1, 2]}), "DONE"),
        (StreamResult(status=200, token_ids={0: [1, 2]}, is_done=True), "2 tokens, asked for 3"),
        (StreamResult(status=200, error={"code": "deadline"}), "deadline"),
    ],
)
def test_a_stream_that_is_not_whole_is_a_failure(result: StreamResult, said: str) -> None:
    assert said in (fault_of(result, 3) or "")
    assert fault_of(StreamResult(status=200, token_ids={0: [1, 2, 3]}, is_done=True), 3) is None


class StallingServer:
    """Tokens every 5 ms; two at once in every tenth event, and a stall of 60 ms before it. Every third request is refused."""

    def __init__(self) -> None:
        self.num_requests = 0

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(next(line.split(":")[1] for line in head.splitlines() if line.startswith("Content-Length")))
        body = json.loads(await reader.readexactly(length))
        self.num_requests += 1
        if self.num_requests % 3 == 0:
            writer.write(b"HTTP/1.1 503 busy\r\nContent-Length: 4\r\n\r\nbusy")
        else:
            await self._stream(writer, body["max_tokens"])
        writer.close()

    async def _stream(self, writer: asyncio.StreamWriter, num_left: int) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        event = 0
        while num_left:
            event += 1
            ids = [7] * min(num_left, 2 if event % 10 == 0 else 1)
            await asyncio.sleep(0.06 if event % 10 == 0 else 0.005)
            writer.write(b"data: " + json.dumps({"choices": [{"index": 0, "text": "x", "token_ids": ids}]}).encode() + b"\n\n")
            num_left -= len(ids)
        writer.write(b"data: [DONE]\n\n")


def test_a_client_writes_down_what_a_server_does() -> None:
    arrays, facts = asyncio.run(_soak_a_stalling_server())
    assert facts["num_errors"] >= 1 and "503" in facts["errors"][0] and facts["finished"] >= 2
    doubled = arrays["gap_s"][arrays["gap_tokens"] == 2]
    assert len(doubled) >= 3 and np.median(doubled) >= 0.045, "the gap is what a user waits, however many tokens end it"
    assert np.median(arrays["gap_s"]) < np.median(doubled)
    assert len(arrays["lag_s"]) > 20 and len(arrays["ttft_s"]) >= 2 and (np.diff(np.sort(arrays["gap_end_s"])) >= 0).all()


async def _soak_a_stalling_server() -> Any:
    server = await asyncio.start_server(StallingServer().answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    load = Load(
        url=f"http://127.0.0.1:{port}", model="m", num_streams=2, duration_s=4.0, prompt_tokens=(2, 4), new_tokens=(20, 40), vocab=50
    )
    here, there = multiprocessing.Pipe(duplex=False)

    def client() -> None:
        """Beside this loop, as a client's process is, and none: how long one takes to start is nobody's to know."""
        try:
            run_client(load, range(2), time.monotonic(), there)
        finally:
            there.close()
            gc.enable()

    async with server:
        answer, _ = await asyncio.gather(asyncio.to_thread(here.recv), asyncio.to_thread(client))
    return answer


def seen_of(gap_s: float, samples: list[Sample]) -> Seen:
    count = int((600 - RAMP_S) / gap_s)
    return Seen(
        start_s=0.0,
        gap_end_s=np.linspace(RAMP_S, 600.0, count, endpoint=False),
        gap_s=np.full(count, gap_s),
        gap_tokens=np.ones(count),
        ttft_s=np.full(9, 0.05),
        lag_s={"0": np.full(100, 0.001)},
        cpu_share={"0": 0.1},
        errors=[],
        num_errors=0,
        num_finished=9,
        samples=samples,
    )


def asked(out: Path) -> Asked:
    return Asked(load=LOAD, num_clients=1, pids=[1], max_ratio=1.3, has_plots=True, out=out)


def test_a_report_is_red_by_its_memory_alone_and_is_drawn(tmp_path: Path) -> None:
    at, leaking = drawn(GIB, 1e6, 2e5)
    steady = [Sample(at_s=time_s, rss_bytes={1: GIB}, gpu_bytes=GIB, counters={}) for time_s in at]
    content, _ = report(seen_of(0.01, steady), asked(tmp_path / "soak.json"))
    assert not content["is_red"], content["verdicts"]
    assert content["itl"]["tokens_per_s"] == pytest.approx(100, rel=0.01) and len(content["itl_by_minute"]) == 10
    on_gpu = [Sample(at_s=time_s, rss_bytes={1: GIB}, gpu_bytes=int(value), counters={}) for time_s, value in zip(at, leaking, strict=True)]
    content, _ = report(seen_of(0.01, on_gpu), asked(tmp_path / "soak.json"))
    assert content["is_red"] and [line[:15] for line in content["verdicts"] if line.startswith("RED")] == ["RED   GPU memor"]
    content, _ = report(seen_of(0.01, steady[:-1] + [Sample(at_s=595.0)]), asked(tmp_path / "soak.json"))
    assert content["is_red"] and any("it ended" in line for line in content["verdicts"])
    if importlib.util.find_spec("matplotlib"):
        (tmp_path / "soak.json").write_text(json.dumps(content))
        assert [path.suffix for path in soak_plot.draw(tmp_path / "soak.json")] == [".png", ".svg"]


def test_the_watch_reads_a_tree_and_misses_one_that_has_ended() -> None:
    sample = Watch([1 << 30], None).take(0.0)
    assert sample.rss_bytes == {} and sample.counters is None
    mine = Watch([multiprocessing.current_process().pid or 0], "http://127.0.0.1:9/metrics").take(0.0)
    assert all(size > 1e7 for size in (*mine.rss_bytes.values(), *mine.pss_bytes.values())) and mine.counters is None


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    found = parse(["--model", "m", "--streams", "4", "--prompt-tokens", "8:16", "--pid", "3", "--pid", "4"])
    assert (found.load.num_streams, found.load.prompt_tokens, found.pids) == (4, (8, 16), [3, 4])
    for wrong, said in (
        (["--prompt-tokens", "16:8"], "smaller first"),
        (["--clients", "40"], "--clients 40"),
        (["--duration-s", "9"], "--duration-s 9"),
        (["--vocab", "9"], "--vocab 9"),
    ):
        with pytest.raises(SystemExit):
            parse(["--model", "m", *wrong])
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no server answers"):
        bench_soak.served_model("http://127.0.0.1:9")
