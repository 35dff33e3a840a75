"""The gateway's benchmark: a short run of the shipped gateway, and that wrong bytes, lost events and merged ones are found out."""

from __future__ import annotations

import json
import subprocess
import sys
from array import array
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.serve.bench_gateway import parse
from bench.serve.gateway_figures import (
    WrongBytes,
    added_gaps_s,
    added_ttft_s,
    check_counts,
    check_streams,
    delays_s,
    tokens_between,
    without_silent,
)
from bench.serve.host_facts import ROOT
from bench.serve.sse_load import BadAnswer, RawStream, SeenStream, read_stream
from bench.serve.stub_ledger import StubLedger, StubRecord
from bench.serve.stub_story import StubStory

MODEL = ROOT / "models" / "tiny-moe"
STORY = StubStory(MODEL)


def _seen(seed: int, num_tokens: int, times_s: list[float]) -> SeenStream:
    return SeenStream(
        seed=seed,
        asked_s=10.0,
        texts=STORY.pieces(seed, num_tokens),
        num_prompt_tokens=128,
        num_completion_tokens=num_tokens,
        times_s=array("d", times_s),
    )


def test_what_a_gateway_adds_is_the_clients_time_less_the_stubs() -> None:
    records = {3: StubRecord(10.001, 128, array("d", [10.002, 10.022, 10.042]))}
    seen = [_seen(3, 3, [10.004, 10.027, 10.043])]
    assert added_ttft_s(seen, records) == pytest.approx([0.003])
    assert delays_s(seen, records) == pytest.approx([0.002, 0.005, 0.001])
    assert added_gaps_s(seen, records) == pytest.approx([0.003, -0.004])
    assert [tokens_between(seen, *span) for span in ((10.0, 11.0), (10.027, 10.043), (10.005, 10.006))] == [3, 1, 0]


def test_wrong_bytes_a_wrong_prompt_and_a_wrong_number_of_events_are_found_out() -> None:
    records = {3: StubRecord(10.001, 128, array("d", [10.002, 10.022, 10.042]))}
    right = _seen(3, 3, [10.004, 10.027, 10.043])
    check_streams([right], STORY, 128)
    check_counts([right], records)
    for wrong in (
        replace(right, texts=STORY.pieces(4, 3)),
        replace(right, num_completion_tokens=2),
        replace(right, texts=[], num_completion_tokens=0),
    ):
        with pytest.raises(WrongBytes, match="seed 3"):
            check_streams([wrong], STORY, 128)
    with pytest.raises(WrongBytes, match="a prompt of 128 tokens, not 127"):
        check_streams([right], STORY, 127)
    for wrong in (replace(right, times_s=right.times_s[:2]), replace(right, seed=4)):
        with pytest.raises(WrongBytes, match="seed"):
            check_counts([wrong], records)


def test_events_without_text_are_left_out_of_a_peers_on_both_sides() -> None:
    seed = next(seed for seed in range(50) if "" in STORY.pieces(seed, 9)[1:-1])  # a character of several tokens
    pieces = STORY.pieces(seed, 9)
    sent_s = [10.0 + 0.02 * index for index in range(9)]
    records = {seed: StubRecord(9.99, 128, array("d", sent_s))}
    told = [(piece, sent + 0.001) for piece, sent in zip(pieces, sent_s, strict=True) if piece]
    peers = replace(_seen(seed, 9, []), texts=[text for text, _ in told] + [""], times_s=array("d", [at for _, at in told] + [99.0]))
    heard, shown = without_silent([peers], records, STORY)
    check_counts(heard, shown)
    assert delays_s(heard, shown) == pytest.approx([0.001] * len(told)) and len(told) < 9
    merged = replace(peers, texts=["".join(peers.texts)], times_s=array("d", [11.0]))
    with pytest.raises(WrongBytes):
        check_counts(*without_silent([merged], records, STORY))


def test_a_stream_is_read_from_its_pieces_however_they_were_cut() -> None:
    def event(content: dict) -> bytes:
        data = b"data: " + json.dumps(content).encode() + b"\n\n"
        return b"%x\r\n%b\r\n" % (len(data), data)

    def chunk(delta: dict, **more: object) -> dict:
        return {"choices": [{"index": 0, "delta": delta, **more}]}

    whole = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + event(chunk({"role": "assistant", "content": ""}))
    parts = [whole, event(chunk({"content": "naïve "})), event(chunk({"content": ""})), event(chunk({}, finish_reason="length"))]
    parts.append(event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3}}) + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
    raw = b"".join(parts)
    for size in (1, 7, 63, len(raw)):
        pieces = [raw[at : at + size] for at in range(0, len(raw), size)]
        times_s = array("d", range(len(pieces)))
        seen = read_stream(RawStream(7, 0.0, pieces, times_s))
        assert (seen.text, seen.num_prompt_tokens, seen.num_completion_tokens) == ("naïve ", 5, 3)
        ends = [len(b"".join(parts[: number + 1])) - 3 for number in (1, 2, 3)]  # the last byte of its two blank lines
        assert list(seen.times_s) == [end // size for end in ends] or size == 1
    with pytest.raises(BadAnswer, match="DONE"):
        read_stream(RawStream(7, 0.0, [raw[:-30]], array("d", [0.0])))
    with pytest.raises(BadAnswer, match="429"):
        read_stream(RawStream(7, 0.0, [b"HTTP/1.1 429 Too Many Requests\r\n\r\n"], array("d", [0.0])))


def test_a_stub_refuses_a_request_that_comes_twice() -> None:
    ledger = StubLedger()
    ledger.begin(1, 0.0)
    ledger.sent(1, 0.5)
    ledger.end(1)
    with pytest.raises(AssertionError, match="twice"):
        ledger.begin(1, 1.0)
    assert ledger.take()[1].sent_s == array("d", [0.5]) and ledger.take() == {} and ledger.num_tokens == 1


def test_a_peer_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--peer", "litellm=/nowhere/litellm"])
    assert "PROGRAM is litellm's own" in capsys.readouterr().err


@pytest.mark.timeout(650)
def test_a_whole_run_of_the_shipped_gateway(tmp_path: Path) -> None:
    """Short, so that its times mean nothing: what is shown is that every stream is whole and right, and what the file holds."""
    out = tmp_path / "gateway.json"
    command = [sys.executable, "-m", "services.cli", "bench", "gateway", "--repeats", "1", "--seconds", "2", "--streams", "8"]
    subprocess.run([*command, "--warm-seconds", "0.5", "--ttft-requests", "5", "--out", str(out)], check=True, cwd=ROOT, timeout=600)
    content = json.loads(out.read_text())
    (ours,), (bare,) = content["repeats"]["duomo"], content["repeats"]["bare"]
    for one in (ours, bare):
        # The kernel counts CPU time in hundredths of a second: so short a run may take none.
        assert one["num_tokens"] > 0 and 0 <= one["cpu_s"] < 60 and np.isfinite(list(one["added_ttft_ms"].values())).all()
    assert set(content["met"]) == set(content["targets"]) and content["medians"]["duomo"]["tokens_per_cpu_s"] > 0
