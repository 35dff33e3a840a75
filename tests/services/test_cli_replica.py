"""One process without Ray: what its role says, and that it ends within seconds whatever of its start it is in."""

from __future__ import annotations

import ast
import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from duomo.config import DuomoConfig, load_config
from services import cli_replica
from services.cli_replica import interrupted_before, run_one
from services.kv_transfer import ending

MODEL = Path(__file__).parents[2] / "models" / "tiny-moe"

STUCK = """
import asyncio, sys, time
from duomo.config import load_config
from services import cli_replica, colocated

async def run_replica(config, replica_id, stop):
    print("starting", flush=True)
    try:
        await asyncio.to_thread(time.sleep, 300)
    finally:
        await asyncio.to_thread(time.sleep, 300)

colocated.run_replica = run_replica
options = {"model.path": sys.argv[1], "redis.url": "redis://127.0.0.1:1", "model.device": "cpu"}
sys.exit(cli_replica.run_one(load_config(None, options), "engine", "e0"))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_start_that_is_deep_in_a_call_ends_within_seconds(number: signal.Signals) -> None:
    """Loading and capturing hear of no cancellation, nor does what closes their thread."""
    process = subprocess.Popen([sys.executable, "-c", STUCK, str(MODEL)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    try:
        assert process.stdout.readline() == "starting\n"
        process.send_signal(number)
        assert process.wait(100) == 130, process.stderr.read()  # not the 300 s that its calls take
        assert "before it was ready" in process.stderr.read()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


ENDLESS = """
import asyncio, sys, threading, time
from duomo.config import load_config
from services import cli_replica, colocated
from services.kv_transfer import registration

async def run_replica(config, replica_id, stop):
    await stop.wait()
    if sys.argv[2] == "loop":
        time.sleep(300)
    threading.Thread(target=time.sleep, args=(300,)).start()

async def registered(*_):
    pass

colocated.run_replica = run_replica
registration.until_registered = registered
cli_replica.freeze_started = lambda: print("ready", flush=True)
cli_replica.END_LIMIT_S = cli_replica.EXIT_LIMIT_S = 3.0
options = {"model.path": sys.argv[1], "redis.url": "redis://127.0.0.1:1", "model.device": "cpu", "gateway.request_deadline_s": 0.5}
sys.exit(cli_replica.run_one(load_config(None, options), "engine", "e0"))
"""


@pytest.mark.parametrize(("held_by", "place"), [("loop", "in run_replica"), ("thread", "in _shutdown")])
def test_an_end_that_does_not_end_is_left_by_force_with_its_stacks(held_by: str, place: str) -> None:
    """Whatever holds it: a call on the loop that does not return, or a thread that the interpreter waits for."""
    command = [sys.executable, "-c", ENDLESS, str(MODEL), held_by]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGINT)
            assert process.wait(100) == 1
            said = process.stderr.read()
            assert "Timeout (0:00:0" in said and place in said, said
        finally:
            process.kill()


def limits_of_steps(file: Path) -> float:
    """What all calls of ending.closed in a file may take, one after the other: a loop's for each that it goes over, if written out."""
    tree = ast.parse(file.read_text())
    times = {
        inner: len(each.iter.elts)
        for each in ast.walk(tree)
        if isinstance(each, ast.For) and isinstance(each.iter, ast.Tuple)
        for inner in ast.walk(each)
    }
    found = 0.0
    for call in (each for each in ast.walk(tree) if isinstance(each, ast.Call)):
        heads = [index for index, each in enumerate([call.func, *call.args]) if isinstance(each, ast.Name) and each.id == "closed"]
        for head in heads:
            limit = call.args[head + 2 :]
            limit_s = eval(ast.unparse(limit[0]), vars(ending)) if limit else ending.STEP_LIMIT_S
            found += times.get(call, 1) * limit_s
    return found


@pytest.mark.parametrize("room", ["colocated.py", "prefill/service.py", "decode/replica.py"])
def test_a_process_is_ended_by_force_only_after_all_that_its_steps_may_take(room: str) -> None:
    steps_s = limits_of_steps(Path(cli_replica.__file__).parent / room)
    assert 5 * ending.STEP_LIMIT_S < steps_s <= ending.REPLICA_LIMIT_S < cli_replica.END_LIMIT_S


def test_only_what_is_not_ready_is_interrupted() -> None:
    async def serve(stop: asyncio.Event, drained: list[str]) -> None:
        await stop.wait()
        await asyncio.sleep(0.05)
        drained.append("drained")

    async def ready_after(delay_s: float) -> None:
        await asyncio.sleep(delay_s)

    async def played(ready_s: float) -> tuple[bool, list[str]]:
        stop, drained = asyncio.Event(), list[str]()
        serving = asyncio.create_task(serve(stop, drained))
        if ready_s > 0:
            asyncio.get_running_loop().call_later(0.05, stop.set)
        was_interrupted = await interrupted_before(ready_after(ready_s), serving, stop)
        if not was_interrupted:
            stop.set()
            await serving
        assert serving.cancelled() == was_interrupted and asyncio.all_tasks() == {asyncio.current_task()}
        return was_interrupted, drained

    assert asyncio.run(played(0.0)) == (False, ["drained"])
    assert asyncio.run(played(60.0)) == (True, [])


def test_a_replica_that_fails_while_it_starts_raises_what_it_found() -> None:
    async def fail() -> None:
        raise ValueError("no such folder")

    async def main() -> None:
        serving = asyncio.create_task(fail())
        assert not await interrupted_before(asyncio.sleep(60), serving, asyncio.Event())
        with pytest.raises(ValueError, match="no such folder"):
            await serving

    asyncio.run(main())


@pytest.mark.parametrize(
    ("role", "room", "layout"), [("engine", "services.colocated", "colocated"), ("decode", "services.decode.replica", "split")]
)
def test_a_replicas_role_says_the_layout_that_auto_leaves_open(role: str, room: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    served = []

    async def run(config: DuomoConfig, replica_id: str, stop: asyncio.Event) -> None:
        served.append((config.layout, config.model.device))

    monkeypatch.setattr(f"{room}.run_replica", run)
    monkeypatch.setattr("duomo.telemetry.logging.configure", lambda *_: None)
    monkeypatch.setattr("services.cli_replica.freeze_started", lambda: None)  # this process goes on to other tests
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # run_one's own, gone again afterwards
    options = {"model.path": str(MODEL), "redis.url": "redis://nowhere"}
    assert run_one(load_config(None, {**options, "model.device": "cpu"}), role, "r0") == 0
    assert served == [(layout, "cpu")]


def test_what_a_ready_replica_holds_is_set_apart_from_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under Ray (service_thread.py): a full collection would stop every stream."""
    happened: list[str] = []

    async def run(config: DuomoConfig, replica_id: str, stop: asyncio.Event) -> None:
        async with asyncio.timeout(60):
            while "set apart" not in happened:
                await asyncio.sleep(0.01)

    async def registered(*_: object) -> None:
        happened.append("registered")

    monkeypatch.setattr("services.decode.replica.run_replica", run)
    monkeypatch.setattr("services.kv_transfer.registration.until_registered", registered)
    monkeypatch.setattr("services.cli_replica.freeze_started", lambda: happened.append("set apart"))
    monkeypatch.setattr("duomo.telemetry.logging.configure", lambda *_: None)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    options: dict[str, object] = {"model.path": str(MODEL), "redis.url": "redis://nowhere", "model.device": "cpu"}
    assert run_one(load_config(None, options), "decode", "r0") == 0
    assert happened == ["registered", "set apart"]
