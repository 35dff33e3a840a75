"""`duomo bench goodput`: servers that it starts, loads on them, what it concludes, what it says of a plan that is wrong."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from bench.serve import bench_goodput, goodput_servers
from bench.serve.bench_goodput import check_loads, parse, verdict_of
from bench.serve.goodput_plan import PlanError, read_plan
from bench.serve.goodput_servers import served
from bench.serve.host_facts import ROOT
from bench.serve.make_vllm_model import make

PYTHON = shlex.quote(sys.executable)
TWO_CARDS = ROOT / "bench" / "serve" / "goodput_two_cards.toml"


TOLD = {"limits": [], "date": "2026-11-23", "commit": "c"}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def side(name: str, command: str, url: str, more: str = "") -> str:
    return f"""
[[phases.sides]]
name = "{name}"
urls = ["{url}"]
gpus = 1
start_limit_s = 60.0
processes = [{{ command = '''{command}''', env = {{ MARK = "{{mark}}" }} }}]
loads = [{{ mix = "20:6", rates = "8" }}]
{more}"""


def plan_of(folder: Path, *phases: tuple[str, str], limits_from: str = "peer") -> Path:
    text = f"""
limits_from = "{limits_from}"
limits_mix = "20:6"
options = ["--duration-s", "1", "--warmup-s", "0", "--unloaded-requests", "1", "--drain-s", "5",
           "--slo-ttft", "{{limit}}", "--slo-itl", "{{limit}}"]
[values]
limit = "10s"
mark = "none"
"""
    for name, sides in phases:
        text += f'\n[[phases]]\nname = "{name}"\n{sides}'
    (folder / "plan.toml").write_text(text)
    return folder / "plan.toml"


def small(port: int) -> str:
    return f"{PYTHON} -m tests.bench.small_server {port}"


def marked(mark: str) -> list[psutil.Process]:
    """Processes that a plan's side of this mark has started."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("MARK") == mark:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def await_load(out: Path) -> None:
    """Until the peer's load is about to send: what it was alone is said. It ends with the test's own time limit."""
    said = out / "peer_20x6.txt"
    while not said.exists() or "alone:" not in said.read_text():
        time.sleep(0.1)


def test_sides_are_started_loaded_judged_and_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of three dies at once: it is named with what it said, and the others are measured."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    ports, mark = [free_port() for _ in range(2)], f"goodput-{os.getpid()}"
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    dies = side("dies", f"{PYTHON} -c \"print('no card here'); raise SystemExit(3)\"", "http://127.0.0.1:1")
    plan = plan_of(
        tmp_path,
        ("first", side("peer", small(ports[0]), urls[0], "is_peer = true\nstand_for = 2") + dies),
        ("second", side("ours", small(ports[1]), urls[1])),
    )
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["goodput", str(plan), "--out", str(out), "--set", f"mark={mark}"])
    assert bench_goodput.main() == 1
    said = capsys.readouterr().out
    assert "FAILED dies: ended with 3 before it served: no card here" in said and marked(mark) == []
    rows = json.loads((out / "goodput.json").read_text())["20:6"]
    assert list(rows) == ["peer", "ours"] and (rows["peer"]["gpus"], rows["peer"]["measured_gpus"]) == (2, 1)
    files = {name: json.loads((out / f"{name}_20x6.json").read_text()) for name in ("peer", "ours")}
    assert (
        rows["peer"]["goodput_per_s"] == pytest.approx(2 * files["peer"]["best"]["goodput_per_s"], abs=0.001) and rows["peer"]["rate"] == 16
    )
    assert rows["ours"]["over_best_peer"] == pytest.approx(rows["ours"]["goodput_per_s"] / rows["peer"]["goodput_per_s"], abs=0.001)
    assert files["ours"]["asked"]["limits"]["are_of_another_run"] and (out / "peer_unloaded.json").exists()
    assert "ours" in said and (out / "ours_0.log").exists() and (out / "ours_20x6.txt").read_text()


def test_no_process_is_left_when_the_block_is_left_by_an_exception(tmp_path: Path) -> None:
    """Also of a server that has a child in a session of its own and takes no SIGTERM, once its time is over."""
    mark = f"goodput-exception-{os.getpid()}"
    stubborn = (
        f"{PYTHON} -c \"import signal, subprocess, sys; signal.signal(15, signal.SIG_IGN); subprocess.run(['setsid', 'sleep', '600'])\""
    )
    port = free_port()
    plan = read_plan(
        plan_of(tmp_path, ("a", side("peer", small(port), f"http://127.0.0.1:{port}") + side("stubborn", stubborn, "http://127.0.0.1:1"))),
        {"mark": mark, "out": str(tmp_path)},
    )
    sides = [one.model_copy(update={"start_limit_s": 8.0}) for one in plan.phases[0].sides]
    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyError):
        patched.setattr(goodput_servers, "END_S", 0.5)
        patched.setenv("PYTHONPATH", str(ROOT))
        with served(sides, tmp_path) as (ready, failures):
            assert [one.side.name for one in ready] == ["peer"] and len(marked(mark)) == 1, "who failed is ended at once"
            assert failures[0].startswith("stubborn: does not serve after 8 s: (its log is empty)")
            raise KeyError
    assert marked(mark) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_no_process_is_left_when_the_campaign_is_told_to_end(tmp_path: Path, number: signal.Signals) -> None:
    """In the midst of a load that would go on for longer than a test may, as a shell's background job, which begins deaf to interrupts."""
    mark, port = f"goodput-{number.name}-{os.getpid()}", free_port()
    file = plan_of(tmp_path, ("a", side("peer", small(port), f"http://127.0.0.1:{port}")))
    file.write_text(file.read_text().replace('"--duration-s", "1"', '"--duration-s", "500"'))
    script = str(ROOT / "bench" / "serve" / "bench_goodput.py")
    command = [
        "sh",
        "-c",
        'trap "" INT; exec "$@"',
        "sh",
        sys.executable,
        script,
        str(file),
        "--out",
        str(tmp_path),
        "--set",
        f"mark={mark}",
    ]
    campaign = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(ROOT), "MARK": mark}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        await_load(tmp_path)
        assert len(marked(mark)) >= 3, "itself, the server, the load"
        campaign.send_signal(number)
        assert campaign.wait(60) != 0 and marked(mark) == []
    finally:
        campaign.kill()
        for each in marked(mark):
            each.kill()


def test_another_server_at_the_address_is_not_measured_and_earlier_results_do_not_count(tmp_path: Path) -> None:
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        url = f"http://127.0.0.1:{stranger.getsockname()[1]}"
        asked = parse([str(plan_of(tmp_path, ("a", side("peer", "sleep 600", url)))), "--out", str(tmp_path)])
        for name in ("peer_20x6.json", "peer_unloaded.json"):
            (tmp_path / name).write_text("{}")
        (failure,) = bench_goodput.run_phase(asked, asked.plan.phases[0])
    assert failure == f"peer: something listens at {url} already" and not list(tmp_path.glob("peer_*"))


def test_a_phase_without_limits_starts_nothing(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, ("a", side("peer", "false", "http://x")), ("b", side("ours", "false", "http://y")))
    asked = parse([str(plan), "--out", str(tmp_path), "--only", "b"])
    (failure,) = bench_goodput.run_phase(asked, asked.plan.phases[1])
    assert failure.startswith("b: not run, there are no limits:") and not list(tmp_path.glob("*.log"))


def test_a_server_that_ends_under_load_is_named_and_what_it_could_not_answer_is_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    mark, port = f"goodput-gone-{os.getpid()}", free_port()
    file = plan_of(tmp_path, ("a", side("peer", small(port), f"http://127.0.0.1:{port}")))
    file.write_text(file.read_text().replace('rates = "8" }', 'rates = "8", options = ["--duration-s", "3"] }'))
    asked = parse([str(file), "--out", str(tmp_path), "--set", f"mark={mark}"])

    def kill_once_loaded() -> None:
        await_load(tmp_path)
        for each in marked(mark):
            each.kill()

    killing = threading.Thread(target=kill_once_loaded, daemon=True)
    killing.start()
    failures = bench_goodput.run_phase(asked, asked.plan.phases[0])
    killing.join(10.0)
    assert failures[-1] == "peer: ended with -9 while 20:6 was asked: (its log is empty)"
    assert not (tmp_path / "peer_20x6.json").exists() and verdict_of(asked.plan, tmp_path) == {}


def test_a_phase_whose_preparation_fails_starts_nothing(tmp_path: Path) -> None:
    plan = plan_of(
        tmp_path, ("a", f"prepare = ['''{PYTHON} -c \"raise SystemExit('no tokenizer')\"''']\n" + side("peer", "false", "http://x"))
    )
    asked = parse([str(plan), "--out", str(tmp_path)])
    (failure,) = bench_goodput.run_phase(asked, asked.plan.phases[0])
    assert failure.startswith("a: ") and failure.endswith("no tokenizer") and not (tmp_path / "peer_0.log").exists()


def test_a_side_is_judged_by_what_peers_failed_where_none_kept_the_share(tmp_path: Path) -> None:
    plan = read_plan(
        plan_of(tmp_path, ("a", side("peer", "false", "http://x", "is_peer = true\nstand_for = 2") + side("ours", "false", "http://y"))), {}
    )
    for name, best in (("peer", None), ("ours", {"rate": 3.0, "goodput_per_s": 2.9})):
        (tmp_path / f"{name}_20x6.json").write_text(json.dumps({"best": best, "points": [{"rate": 0.5}, {"rate": 1.0}]} | TOLD))
    rows = verdict_of(plan, tmp_path)["20:6"]
    assert rows["peer"]["goodput_per_s"] is None and rows["peer"]["rates_tried"] == [1.0, 2.0]
    assert rows["ours"]["over_best_peer"] is None and rows["ours"]["lowest_rate_at_which_a_peer_failed"] == 1.0
    assert rows["ours"]["best_peer"] is None and (rows["peer"]["is_highest_tried"], rows["ours"]["is_highest_tried"]) == (False, False)
    (tmp_path / "peer_20x6.json").write_text(
        json.dumps({"best": {"rate": 1.0, "goodput_per_s": 0.9}, "points": [{"rate": 0.5}, {"rate": 1.0}]} | TOLD)
    )
    rows = verdict_of(plan, tmp_path)["20:6"]
    assert rows["peer"]["is_highest_tried"] and (rows["ours"]["best_peer"], rows["ours"]["over_best_peer"]) == ("peer", 1.611)
    assert (rows["peer"]["goodput_per_s"], rows["peer"]["goodput_per_gpu_per_s"]) == (1.8, 0.9)


@pytest.mark.parametrize(
    ("was", "becomes", "said"),
    [
        ("gpus = 1", "cards = 1", "phases.0.sides.0.gpus: Field required"),
        ("start_limit_s = 60.0", "start_limit_s = 60.0\ncolour = 'red'", "phases.0.sides.0.colour: Extra inputs"),
        ('"{mark}"', '"{marks}"', "'{marks}': 'marks' is none of values (limit, mark)"),
        ("'''false'''", "'''echo \"'''", "No closing quotation"),
        ('limits_from = "peer"', 'limits_from = "other"', "limits_from: 'other' is no side of the first phase"),
        ("[values]", "[values", "plan.toml: "),
    ],
)
def test_a_wrong_plan_is_refused_by_its_key(tmp_path: Path, was: str, becomes: str, said: str) -> None:
    file = plan_of(tmp_path, ("a", side("peer", "false", "http://x")))
    assert was in file.read_text()
    file.write_text(file.read_text().replace(was, becomes, 1))
    with pytest.raises(PlanError) as caught:
        read_plan(file, {})
    assert said in str(caught.value) and "plan.toml" in str(caught.value)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--set", "colour=red"], "--set colour"),
        (["--only", "nothing"], "--only nothing"),
        (["--set", "limit=fast"], "limits_mix and options: duomo bench serve: error: argument --slo-ttft"),
    ],
)
def test_options_that_the_plan_does_not_know_are_refused(
    tmp_path: Path, more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse([str(plan_of(tmp_path, ("a", side("peer", "false", "http://x")))), "--out", str(tmp_path), *more])
    assert said in capsys.readouterr().err


def test_the_plan_of_two_cards_is_one_and_its_model_is_made(tmp_path: Path) -> None:
    plan = read_plan(TWO_CARDS, {"out": str(tmp_path), "vllm_path": "/opt/vllm"})
    check_loads(plan)
    assert [one.name for one in plan.sides() if not one.is_peer] == ["colocated", "split"]
    pair = next(one for one in plan.sides() if one.name == "vllm_pair")
    spaced = read_plan(TWO_CARDS, {"out": "/a folder"})
    assert "/a folder/vllm_model" in shlex.split(spaced.sides()[0].processes[0].command)
    transfer = shlex.split(pair.processes[0].command)[-1]
    assert json.loads(transfer) == {"kv_connector": "NixlConnector", "kv_role": "kv_both"}
    assert all(one.processes[0].env["PYTHONPATH"].startswith("/opt/vllm") for one in plan.sides() if one.is_peer)
    make(ROOT / "bench" / "engine" / "models" / "qwen3-30b-a3b", tmp_path / "vllm_model")
    words = json.loads((tmp_path / "vllm_model" / "tokenizer.json").read_text())["model"]["vocab"]
    assert sorted(words.values()) == list(range(151936))
