"""`duomo bench serve` against a small OpenAI-like server over HTTP: what it asks, sees, finds, refuses and writes down."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from bench.serve import bench_serve, serve_compare
from bench.serve.rest_client import payload_of
from bench.serve.serve_client import play_alone
from bench.serve.serve_options import Asked, parse
from bench.serve.serve_plan import Piece
from bench.serve.serve_plan import Request as Planned
from bench.serve.server_facts import meet

TTFT_S, ITL_S = 0.02, 0.004


@dataclass
class SmallServer:
    """Answers of one token an event. slots: answers at a time; what comes beyond waits. vocab: ids below are taken.

    forbidden: fields that it refuses. counting: how it tells tokens; the text of an event is empty where it is not by events.
    framing: between events. fails_every: the n-th streamed request of more than two tokens breaks off. bears: of requests whose prompts
    begin with the same 20 ids it answers so many, and is too busy for more.
    """

    slots: int = 64
    vocab: int = 8000
    context: int = 4096
    forbidden: tuple[str, ...] = ()
    has_completions: bool = True
    framing: str = "\n"
    fails_every: int = 0
    counting: str = "usage"
    bears: int = 1 << 30
    has_models: bool = True
    load_sizes: Counter[tuple[int, ...]] = field(default_factory=Counter)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    num_long: int = 0

    def app(self) -> Starlette:
        self._free = asyncio.Semaphore(self.slots)
        return Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/version", self.version),
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
            ]
        )

    async def models(self, request: Request) -> Response:
        if not self.has_models:
            return Response(status_code=404)
        return JSONResponse({"data": [{"id": "small", "owned_by": "tests", "max_model_len": self.context}]})

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": "1.2"})

    async def completions(self, request: Request) -> Response:
        body = await request.json()
        if not self.has_completions:
            return _refusal("prompt must be a string")
        if any(not 0 <= each < self.vocab for each in body["prompt"]):
            return _refusal(f"token ids go from 0 to {self.vocab - 1}")
        beginning = tuple(body["prompt"][:20])
        self.load_sizes[beginning] += 1
        if self.load_sizes[beginning] > self.bears:
            return Response("busy", status_code=503)
        return self._answer(request, body, len(body["prompt"]))

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        return self._answer(request, body, 7 + 2 * len(body["messages"][0]["content"].split()))

    def _answer(self, request: Request, body: dict[str, Any], prompt_tokens: int) -> Response:
        if refused := [name for name in self.forbidden if name in body | body["stream_options"]]:
            return _refusal(f"'{refused[0]}' is not known")
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        return StreamingResponse(self._events(body, prompt_tokens), media_type="text/event-stream")

    async def _events(self, body: dict[str, Any], prompt_tokens: int) -> AsyncIterator[str]:
        count = body["max_tokens"]
        self.num_long += count > 2
        breaks_off = count > 2 and self.fails_every and self.num_long % self.fails_every == 0
        yield f": ping{self.framing * 2}"
        async with self._free:
            for number in range(count):
                await asyncio.sleep(ITL_S if number else TTFT_S)
                if breaks_off and number == 2:
                    return
                yield self._event(self._choice(body, number))
        yield self._event({"choices": [], "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": count}})
        yield f"data: [DONE]{self.framing * 2}"

    def _choice(self, body: dict[str, Any], number: int) -> dict[str, Any]:
        text = "x " if self.counting == "events" else ""
        said = {"delta": {"content": text}} if "messages" in body else {"text": text}
        ids = {"token_ids": [7]} if body.get("return_token_ids") and self.counting == "ids" else {}
        is_told = body["stream_options"].get("continuous_usage_stats") and self.counting == "usage"
        usage = {"usage": {"completion_tokens": number + 1}} if is_told else {}
        return {"choices": [{"index": 0, "finish_reason": "length" if number == body["max_tokens"] - 1 else None} | said | ids]} | usage

    def _event(self, what: dict[str, Any]) -> str:
        return f"data: {json.dumps(what)}{self.framing * 2}"


def _refusal(why: str) -> Response:
    return JSONResponse({"error": {"message": why, "type": "invalid_request_error"}}, status_code=400)


@contextmanager
def serving(small: SmallServer) -> Iterator[str]:
    """Its address, while it runs in a thread of this process."""
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    # asyncio's loop sleeps at least as long as it is asked to; uvloop's may wake a millisecond before.
    server = uvicorn.Server(uvicorn.Config(small.app(), loop="asyncio", log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.005)
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60.0)
        bound.close()


def run(url: str, out: Path, *options: str) -> dict[str, Any]:
    """A run's result file, by way of the command's own main."""
    quick = ["--clients", "1", "--warmup-s", "0", "--unloaded-requests", "2", "--drain-s", "100", "--mix", "40:8"]
    sys.argv = ["bench_serve", "--url", url, *quick, *options, "--out", str(out)]
    bench_serve.main()
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_a_sweep_reports_what_users_saw(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    small = SmallServer(framing="\r\n")
    with serving(small) as url:
        options = ["--rates", "40,80", "--duration-s", "0.5", "--rows", "--warmup-s", "0.1", "--clients", "2", "--arrivals", "constant"]
        content = run(url, tmp_path / "small.json", *options, "--gpus", "2", "--slo-ttft", "5x", "--slo-itl", "30ms", "--no-plots")
    assert content["server"]["version"] == "1.2" and content["server"]["model"]["id"] == "small" and not content["notes"]
    alone = content["unloaded"][0]
    assert alone["prompt_tokens"] == 40 and alone["ttft_s"] >= TTFT_S and alone["itl_s"] >= ITL_S
    assert content["limits"][0]["ttft_s"] == pytest.approx(5 * alone["ttft_s"]) and content["limits"][0]["itl_s"] == 0.03
    assert [point["rate"] for point in content["points"]] == [40, 80]
    for point, count in zip(content["points"], (18, 36), strict=True):  # of the last 0.45 s
        figures = point["figures"]
        assert (figures["num_requests"], figures["num_failed"], figures["events_with_several_tokens"]) == (count, 0, 0)
        assert figures["ttft"]["p50_s"] >= TTFT_S and figures["itl"]["count"] == 7 * count and figures["itl"]["p50_s"] >= ITL_S
        assert figures["e2e"]["p50_s"] >= TTFT_S + 7 * ITL_S and figures["tpot"]["p50_s"] >= ITL_S
        assert 0.0 <= figures["kept_share"] <= 1.0 and figures["goodput_per_s"] == pytest.approx(figures["kept_share"] * count / 0.45)
    rows = [json.loads(line) for line in (tmp_path / "small_rows.jsonl").read_text().splitlines()]
    assert len(rows) == 20 + 40 and {len(row["event_s"]) for row in rows} == {8} and {row["finish_reason"] for row in rows} == {"length"}
    loads = [body for body in small.bodies if body["max_tokens"] == 8]
    assert {len(body["prompt"]) for body in loads} == {40} and all(10 <= each < 8000 for body in loads for each in body["prompt"])
    assert len({tuple(body["prompt"]) for body in loads}) == len(loads), "no prompt twice: none is in a cache"
    assert all(body["ignore_eos"] and body["temperature"] == 0 for body in loads)
    assert {headers["authorization"] for headers in small.headers} == {"Bearer sesame"} and "sesame" not in json.dumps(content)
    said = capsys.readouterr().out
    assert said.index("written:") < said.index("output tok/s") < said.index("TTFT p50") and "a GPU" in said


def test_a_search_finds_what_the_server_can_bear(tmp_path: Path) -> None:
    """Twenty requests a load, told by the prefix that its prompts share: of 23 that is too little."""
    with serving(SmallServer(bears=20)) as url:
        options = ["--search", "16:256", "--precision", "0.5", "--duration-s", "0.5", "--arrivals", "constant", "--ramp-s", "0"]
        options += ["--prefix-share", "0.5", "--slo-ttft", "60s", "--slo-itl", "60s", "--no-plots"]
        content = run(url, tmp_path / "searched.json", *options)
    shares = {point["rate"]: point["figures"]["kept_share"] for point in content["points"]}
    assert shares == pytest.approx({16: 1.0, 32: 1.0, 45.25: 20 / 23, 64: 20 / 32})
    assert content["best"] == {"rate": 32, "goodput_per_s": 32} and content["found"].startswith("32 requests/s; 45.25/s fails with 87%")
    assert content["points"][-1]["figures"]["errors"] == {"status 503: busy": 12}


def test_another_run_sends_other_prompts_and_one_of_its_salt_the_same(tmp_path: Path) -> None:
    """A server that keeps prefixes would else answer a second run's unloaded requests from its cache."""

    def prompts_of(*options: str) -> tuple[str, list[tuple[int, ...]]]:
        small = SmallServer()
        with serving(small) as url:
            content = run(url, tmp_path / "salted.json", "--rates", "20", "--duration-s", "0.2", "--ramp-s", "0", "--no-plots", *options)
        return content["salt"], sorted(tuple(body["prompt"]) for body in small.bodies if body["max_tokens"] == 8)

    (salt, first), (other_salt, second) = prompts_of(), prompts_of()
    assert salt != other_salt and len(first) == len(second) == 3 + 4 and not set(first) & set(second)
    assert prompts_of("--salt", salt) == (salt, first)


def test_an_open_loop_asks_no_slower_when_the_server_stalls(tmp_path: Path) -> None:
    with serving(SmallServer(slots=1)) as url:
        options = ["--rates", "120", "--duration-s", "0.5", "--drain-s", "0.2", "--arrivals", "gamma:0.5", "--ramp-s", "0", "--no-plots"]
        figures = run(url, tmp_path / "stalled.json", *options)["points"][0]["figures"]
    assert figures["offered_per_s"] > 60 and figures["finished_per_s"] <= 22, "sent when due, not when there is room"
    assert figures["errors"].keys() == {"unfinished when the load was cut off"} and figures["num_failed"] >= 10
    assert figures["kept_share"] < 0.7


def test_answers_that_break_off_are_failures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(SmallServer(fails_every=4)) as url:
        point = run(url, tmp_path / "broken.json", "--rates", "40", "--duration-s", "0.5", "--no-plots")["points"][0]
    assert 2 <= point["figures"]["num_failed"] <= point["figures"]["num_requests"] / 3
    assert list(point["figures"]["errors"]) == ["ended without [DONE] after 2 tokens"] and "DONE" in capsys.readouterr().out


def test_a_trace_with_shared_blocks_is_played_at_its_own_pace(tmp_path: Path) -> None:
    lines = [{"timestamp": 40 * n, "input_length": 600, "output_length": 3, "hash_ids": [0, n + 1]} for n in range(10)]
    lines.append({"timestamp": 450, "input_length": 9000, "output_length": 3})
    (tmp_path / "trace.jsonl").write_text("\n".join(map(json.dumps, lines)))
    small = SmallServer()
    with serving(small) as url:
        content = run(url, tmp_path / "played.json", "--trace", str(tmp_path / "trace.jsonl"), "--no-plots", "--ramp-s", "0")
    assert content["notes"] == ["1 of 11 requests of the trace are left out: the server's context holds 4096 tokens"]
    assert content["points"][0]["figures"]["num_requests"] == 10 and content["points"][0]["figures"]["window_s"] == pytest.approx(0.36)
    prompts = [body["prompt"] for body in small.bodies[-10:]]
    assert len({tuple(prompt[:512]) for prompt in prompts}) == 1 and len({tuple(prompt[512:]) for prompt in prompts}) == 10


def test_a_trace_of_one_request_counts_it(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text('{"arrival_s": 3.0, "prompt_tokens": 30, "output_tokens": 3}')
    with serving(SmallServer()) as url:
        options = ["--trace", str(tmp_path / "one.jsonl"), "--duration-s", "2", "--slo-ttft", "60s", "--slo-itl", "60s", "--no-plots"]
        figures = run(url, tmp_path / "played.json", *options)["points"][0]["figures"]
    assert (figures["num_requests"], figures["kept_share"], figures["goodput_per_s"], figures["finished_per_s"]) == (1, 1.0, 0.5, 0.5)


def test_a_load_that_counts_nothing_is_refused_and_those_before_are_kept(tmp_path: Path) -> None:
    options = ["--rates", "40,1", "--duration-s", "0.5", "--ramp-s", "0.1", "--arrivals", "constant", "--no-plots", "--rows"]
    with (
        serving(SmallServer()) as url,
        pytest.raises(SystemExit, match=r"no request in the window: at 1/s for 0\.5 s the last is due at 0 s"),
    ):
        run(url, tmp_path / "kept.json", *options)
    content = json.loads((tmp_path / "kept.json").read_text())
    assert [point["rate"] for point in content["points"]] == [40] and content["has_ended"] is False
    assert len((tmp_path / "kept_rows.jsonl").read_text().splitlines()) == 20
    assert "its run was cut short" in serve_compare.tables([content]) and not list(tmp_path.glob("*.part"))


def test_text_through_chat_where_ids_are_not_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = SmallServer(has_completions=False, forbidden=("return_token_ids",), counting="events")
    with serving(small) as url:
        with pytest.raises(SystemExit, match=r"--api completions.*prompt must be a string.*--api chat"):
            meet([url], "", "completions", None, {})
        content = run(url, tmp_path / "chat.json", "--rates", "20", "--duration-s", "0.5", "--no-plots")
    assert "text through chat" in content["notes"][0] and "one each, where there is text" in content["notes"][1]
    assert content["server"]["dialect"]["tokens_per_word"] == 2.0 and content["server"]["dialect"]["fixed_tokens"] == 7.0
    words = {len(body["messages"][0]["content"].split()) for body in small.bodies if body["max_tokens"] == 8}
    assert words == {16}, "(40 - 7) / 2"
    assert content["points"][0]["figures"]["num_failed"] == 0 and content["points"][0]["figures"]["itl"]["count"] > 0
    assert content["points"][0]["figures"]["output_tokens_per_s"] > 0


@pytest.mark.parametrize(
    ("small", "dialect"),
    [
        (SmallServer(), ("usage", True)),
        (SmallServer(counting="ids"), ("ids", True)),
        (SmallServer(counting="ids", forbidden=("continuous_usage_stats",)), ("ids", True)),
        (SmallServer(counting="events", forbidden=("ignore_eos", "return_token_ids")), ("events", False)),
    ],
)
def test_a_server_is_spoken_to_as_it_understands(small: SmallServer, dialect: tuple[str, bool]) -> None:
    with serving(small) as url:
        server = meet([url], "small", "completions", None, {})
        assert (server.target.dialect.counting, server.target.dialect.ignores_eos) == dialect
        (seen,) = play_alone(server.target, [Planned(0, 0.0, 5, (Piece("a", 4),))], 30.0, print)
    assert (seen.error, seen.num_tokens, seen.event_tokens) == ("", 5, (1, 1, 1, 1, 1)) and seen.ttft_s >= TTFT_S
    assert len(server.notes) == (dialect[0] == "events") + (not dialect[1])


def test_replicas_are_asked_in_turn(tmp_path: Path) -> None:
    first, second = SmallServer(), SmallServer(has_models=False)
    with serving(first) as url, serving(second) as other:
        with pytest.raises(SystemExit, match="/v1/models answers 404"):
            meet([other], "", "auto", None, {})
        content = run(url, tmp_path / "two.json", "--url", other, "--rates", "40", "--duration-s", "0.5", "--no-plots")
    assert content["server"]["urls"] == [url, other] and content["points"][0]["figures"]["num_failed"] == 0
    assert (first.num_long, second.num_long) == (2 + 10, 1 + 10), "three alone, twenty of the load"


def test_what_stands_in_the_way_is_said(tmp_path: Path) -> None:
    with serving(SmallServer(vocab=100, context=64)) as url:
        with pytest.raises(SystemExit, match="--model big: .* has 'small'"):
            meet([url], "big", "auto", None, {})
        with pytest.raises(SystemExit, match="--vocab 8000: .*from 0 to 99"):
            meet([url], "", "auto", None, {})
        with pytest.raises(SystemExit, match="--mix 60:8: up to 68 tokens, and the server's context holds 64"):
            run(url, tmp_path / "none.json", "--vocab", "100", "--mix", "60:8")
    with serving(SmallServer(forbidden=("stream",))) as url, pytest.raises(SystemExit, match="no way to ask .*'stream' is not known"):
        meet([url], "", "auto", None, {})
    with pytest.raises(SystemExit, match="no server answers"):
        meet(["http://127.0.0.1:9"], "", "auto", None, {})


def test_files_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(SmallServer()) as url:
        options = ["--rates", "20", "--duration-s", "0.5", "--no-plots", "--slo-ttft", "2000x", "--slo-itl", "2000x"]
        first = run(url, tmp_path / "first.json", *options)
    found = parse(["--slo-from", str(tmp_path / "first.json")], None)
    assert isinstance(found, Asked) and [asdict(each) for each in found.limits_from] == first["unloaded"]
    (point,) = first["points"]
    slower = {kind: {name: 2 * value for name, value in point["figures"][kind].items()} for kind in ("ttft", "itl", "tpot", "e2e")}
    second = first | {"label": "second", "points": [point | {"figures": point["figures"] | slower}]}
    (tmp_path / "second.json").write_text(json.dumps(second))
    capsys.readouterr()
    sys.argv = ["bench_serve", "--compare", str(tmp_path / "first.json"), str(tmp_path / "second.json"), "--out", str(tmp_path / "both")]
    assert bench_serve.main() == 0
    said = capsys.readouterr().out
    (row,) = (line for line in said.splitlines() if "second" in line and line.startswith("20 "))
    assert row.count("2.00x") == 6 and row.count("1.00x") == 2 and "not alike" not in said, "times twice as long, the rest the same"
    changed = second | {"asked": second["asked"] | {"duration_s": 9.0}, "best": None}
    told = serve_compare.tables([first, changed])
    assert "! not alike: seconds a load: 0.5 | 9" in told and "cut short" not in told
    if importlib.util.find_spec("matplotlib"):
        assert {path.name for path in tmp_path.glob("both*")} == {
            f"both_{kind}.{end}" for kind in ("pareto", "goodput") for end in ("png", "svg")
        }


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--url", "localhost:8000"], "--url localhost:8000: such as http"),
        (["--mix", "2048"], "PROMPT:OUTPUT"),
        (["--arrivals", "bursts"], "gamma:BURSTINESS"),
        (["--rates", "1,1"], "each once"),
        (["--search", "8:2"], "LOWEST:HIGHEST"),
        (["--rates", "1", "--search", "1:2"], "not allowed with"),
        (["--slo-ttft", "fast"], "a multiple of the unloaded server's such as 4x"),
        (["--duration-s", "0.1"], "--duration-s 0.1: at least 0.2"),
        (["--ramp-s", "40"], "--ramp-s 40: at most half"),
        (["--prefix-share", "1.5"], "a share from 0 to 1"),
        (["--spread", "1"], "--spread 1: below 1"),
        (["--clients", "0"], "a whole number from 1 on"),
        (["--trace", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--slo-from", __file__], "--slo-from"),
        (["--compare", __file__], "--compare"),
    ],
)
def test_options_that_are_wrong_are_refused(wrong: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(wrong, None)
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_a_bad_line_of_a_trace_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "bad.jsonl"
    trace.write_text(
        '{"arrival_s": 0, "prompt_tokens": 3, "output_tokens": 2}\n\n{"arrival_s": 1, "prompt_tokens": 0, "output_tokens": 2}\n'
    )
    with pytest.raises(SystemExit):
        parse(["--trace", str(trace)], None)
    assert f"{trace}:3: prompt_tokens is 0; a whole number from 1 on" in capsys.readouterr().err


def test_help_begins_with_what_the_command_owns_and_does_not_know() -> None:
    first = str(bench_serve.__doc__).splitlines()[0]
    assert "Owns " in first and "Knows no " in first


def test_defaults_are_those_that_help_names() -> None:
    found = parse([], None)
    assert isinstance(found, Asked) and found.rates == (1.0,) and (str(found.ttft), str(found.itl)) == ("4x", "1.5x")
    assert found.ramp_s == pytest.approx(6.0) and found.share == 0.9 and found.headers == {}


def test_frames_of_events() -> None:
    assert payload_of(b"data: {}") == payload_of(b"data:{}") == payload_of(b"event: x\ndata: {}\nid: 3") == b"{}"
    assert payload_of(b": ping") == payload_of(b"") == b"" and payload_of(b"data: [1,\ndata: 2]") == b"[1,\n2]"
