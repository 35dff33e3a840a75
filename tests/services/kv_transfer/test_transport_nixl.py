"""KV between real processes over NIXL: right bytes, death in a write, restart, a stopped peer on either side."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from duomo.config import TransferSection
from duomo.errors import TransferError
from duomo.wire.messages import RingOffered
from duomo.wire.values import Handle
from services.kv_transfer import layout
from services.kv_transfer.agent import PushJob, TransferAgent
from services.kv_transfer.layout import MessageSpan
from services.kv_transfer.memory import Region
from services.kv_transfer.transport import Span, WriteState
from services.kv_transfer.transport_nixl import NixlTransport

ROOT = Path(__file__).parents[3]
TCP = "tcp,self,cuda_copy" if Path("/proc/driver/nvidia").exists() else "tcp,self"  # with a GPU NIXL refuses a list without CUDA
SECTION = TransferSection(slot_bytes=128 * 1024, ucx_net_devices="lo", write_timeout_s=60.0)
BOUNDS, BLOCK_BYTES = (0, 3, 8), 8192


class Process:
    """nixl_peer.py in a process of its own."""

    def __init__(self, boot_id: str, section: TransferSection = SECTION) -> None:
        environment = os.environ | {"UCX_NET_DEVICES": "lo"}
        program = [sys.executable, str(Path(__file__).with_name("nixl_peer.py")), boot_id, section.model_dump_json()]
        self.process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True, bufsize=1)
        self._answers: queue.Queue[Any] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        assert self._answer(100.0) == "ready"

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(("{", '"', "[", "n")) or line.strip().isdigit():
                self._answers.put(json.loads(line))

    def _answer(self, wait_s: float) -> Any:
        return self._answers.get(timeout=wait_s)

    def ask(self, what: str, **arguments: object) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": what} | arguments) + "\n")
        return self._answer(100.0)

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)
        if number is signal.SIGSTOP:
            os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)  # all its threads: none takes another byte
        if number is signal.SIGKILL:
            self.process.wait(60)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            assert self.process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(60)


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    started: list[Process] = []
    yield started
    for process in started:
        process.close()


@pytest.fixture
def agent() -> Iterator[TransferAgent]:
    agent = TransferAgent(
        f"here-{time.monotonic_ns()}", NixlTransport(f"kv-here-{time.monotonic_ns()}", SECTION), SECTION, num_send_slots=4
    )
    assert agent.transport_name == "nixl/UCX"
    yield agent
    agent.close()


def content(handle_id: int, span: MessageSpan) -> bytes:
    return np.random.default_rng((handle_id, span.message_idx)).bytes(span.num_bytes)


def offer(agent: TransferAgent, producer: str, num_blocks: int, want_slots: int) -> tuple[Handle, tuple[MessageSpan, ...]]:
    spans = layout.messages(range(num_blocks), BOUNDS, BLOCK_BYTES, SECTION.slot_bytes)
    slots = agent.grant(producer, want_slots)
    assert slots is not None
    handle = Handle(
        handle_id=agent.next_handle_id(),
        producer_boot_id=producer,
        consumer_boot_id=agent.boot_id,
        model_fingerprint="f",
        request_id="r",
        attempt=0,
        ring_name=agent.ring_name(producer),
        slots=slots,
        num_tokens=num_blocks * 16,
        num_blocks=num_blocks,
    )
    agent.expect(handle, spans)
    return handle, spans


def land(agent: TransferAgent, peer: Process, handle: Handle, num_messages: int, timeout_s: float = 60.0) -> int:
    """Land num_messages, and what came beside the last of them, verified byte by byte; how many came."""
    deadline_s, num_landed = time.monotonic() + timeout_s, 0
    while num_landed < num_messages and time.monotonic() < deadline_s:
        for landed in agent.poll():
            assert landed.error is None and bytes(landed.payload) == content(handle.handle_id, landed.span)
            agent.release(handle.handle_id, landed.span.message_idx)
            peer.ask("credit", handle_id=handle.handle_id, message_idx=landed.span.message_idx)
            num_landed += 1
        time.sleep(0.001)
    return num_landed


def start(processes: list[Process], agent: TransferAgent, boot_id: str, section: TransferSection = SECTION) -> Process:
    """A producer process attached to our ring."""
    peer = Process(boot_id, section)
    processes.append(peer)
    ring = base64.b64encode(msgspec.msgpack.encode(agent.open_ring(boot_id, 8))).decode()
    peer.ask("attach_ring", consumer=agent.boot_id, offer=ring)
    return peer


def push(peer: Process, handle: Handle) -> None:
    peer.ask("push", handle=msgspec.to_builtins(handle), bounds=BOUNDS, block_bytes=BLOCK_BYTES)


def test_kv_moves_between_processes_and_a_killed_producer_is_followed_by_another(processes: list[Process], agent: TransferAgent) -> None:
    slow = SECTION.model_copy(update={"max_bytes_per_s": 2e6})
    peer = start(processes, agent, "p-one", slow)
    handle, spans = offer(agent, "p-one", 40, want_slots=3)
    assert peer.process.pid != os.getpid() and len(spans) > 10
    push(peer, handle)
    assert land(agent, peer, handle, 3) >= 3
    peer.send(signal.SIGKILL)
    agent.abort(handle.handle_id)
    assert agent.counts().num_quarantined_slots == 3
    assert agent.peer_dead("p-one") == (handle.handle_id,)
    assert (agent.counts().num_slots, agent.counts().num_quarantined_slots) == (0, 0)

    peer = start(processes, agent, "p-two")
    for num_blocks, want_slots in ((1, 1), (7, 1), (63, 4)):
        handle, spans = offer(agent, "p-two", num_blocks, want_slots)
        push(peer, handle)
        assert land(agent, peer, handle, len(spans)) == len(spans)
        assert {peer.ask("result", handle_id=handle.handle_id, message_idx=m, timeout_s=60) for m in range(len(spans))} == {"done"}
        peer.ask("cancel", handle_id=handle.handle_id, timeout_s=60)
    counts = agent.counts()
    assert (counts.num_free_slots, counts.num_open_handles) == (counts.num_slots, 0)


def test_a_stopped_producer_keeps_its_slots_in_quarantine_until_its_fence(processes: list[Process], agent: TransferAgent) -> None:
    peer = start(processes, agent, "p-slow", SECTION.model_copy(update={"max_bytes_per_s": 1e6}))
    handle, spans = offer(agent, "p-slow", 40, want_slots=2)
    push(peer, handle)
    assert land(agent, peer, handle, 1) >= 1
    peer.send(signal.SIGSTOP)
    time.sleep(0.3)
    while agent.poll():  # what was under way
        pass
    agent.abort(handle.handle_id)  # waits for nobody
    assert agent.counts().num_quarantined_slots == 2
    peer.send(signal.SIGCONT)
    peer.ask("cancel", handle_id=handle.handle_id, timeout_s=60)
    assert agent.counts().num_quarantined_slots == 2, "only the fence frees"
    agent.fence(handle.handle_id)
    counts = agent.counts()
    assert (counts.num_quarantined_slots, counts.num_free_slots) == (0, counts.num_slots) and agent.poll() == []


def test_a_write_to_a_stopped_consumer_ends_at_our_deadline_and_is_fenced_by_its_death(
    processes: list[Process], monkeypatch: pytest.MonkeyPatch, agent: TransferAgent
) -> None:
    monkeypatch.setattr(agent._pusher, "_section", SECTION.model_copy(update={"write_timeout_s": 0.5}))
    peer = Process("d-stopped")
    processes.append(peer)
    ring = msgspec.msgpack.decode(base64.b64decode(peer.ask("open_ring", producer=agent.boot_id, num_slots=4)), type=RingOffered)
    agent.attach_ring("d-stopped", ring)
    peer.send(signal.SIGSTOP)
    spans = layout.messages(range(8), BOUNDS, BLOCK_BYTES, SECTION.slot_bytes)
    handle = Handle(
        handle_id=77,
        producer_boot_id=agent.boot_id,
        consumer_boot_id="d-stopped",
        model_fingerprint="f",
        request_id="r",
        attempt=0,
        ring_name=ring.ring_name,
        slots=(0, 1),
        num_tokens=128,
        num_blocks=8,
    )
    pushed = agent.push(PushJob(handle=handle, span=spans[0], fill=lambda place: None))
    with pytest.raises(TransferError, match="write_timeout"):
        pushed.result(60)
    fence = agent.cancel(77)
    time.sleep(0.2)
    assert not fence.done() and agent.counts().num_writes_in_flight == 1, "the stopped process may still take the bytes"
    peer.send(signal.SIGKILL)
    agent.detach("d-stopped")
    fence.result(60)
    assert agent.counts().num_writes_in_flight == 0


@pytest.mark.parametrize(("ucx_tls", "lane"), [("", "cma/memory"), (TCP, "tcp/lo")])
def test_a_handoff_is_right_over_each_transport_and_says_which_it_was(
    processes: list[Process], agent: TransferAgent, ucx_tls: str, lane: str
) -> None:
    if lane == "cma/memory" and not may_write_into_others():
        pytest.skip("this kernel lets no process write into its parent (kernel.yama.ptrace_scope)")
    peer = start(processes, agent, "p-lane", SECTION.model_copy(update={"ucx_tls": ucx_tls, "require_transport": lane.partition("/")[0]}))
    handle, spans = offer(agent, "p-lane", 40, want_slots=4)
    push(peer, handle)
    assert land(agent, peer, handle, len(spans)) == len(spans) > 10
    for span in spans:
        assert peer.ask("result", handle_id=handle.handle_id, message_idx=span.message_idx, timeout_s=60) == "done"
        assert peer.ask("lanes", handle_id=handle.handle_id, message_idx=span.message_idx) == [lane]
    assert peer.ask("prove") == f"nixl/UCX: {lane}", "two agents of one process are joined as two processes of a host are"


def test_another_transport_than_required_is_refused_at_the_start_and_with_each_peer(processes: list[Process], agent: TransferAgent) -> None:
    peer = start(processes, agent, "p-wrong", SECTION.model_copy(update={"ucx_tls": TCP, "require_transport": "cma"}))
    assert peer.ask("prove").startswith("wrong_transport: kv_transfer.require_transport is cma, but UCX writes by tcp/lo")
    handle, spans = offer(agent, "p-wrong", 1, want_slots=1)
    push(peer, handle)
    assert peer.ask("result", handle_id=handle.handle_id, message_idx=0, timeout_s=60) == "transfer_failed"


def test_what_ucx_says_beside_its_tables_is_in_our_log(tmp_path: Path) -> None:
    program = """
import logging
from duomo.config import TransferSection
from services.kv_transfer.transport_nixl import NixlTransport
logging.basicConfig(format="{levelname} {message}", style="{")
left, right = NixlTransport("kv-log", TransferSection(ucx_tls="%s,nonsense")), NixlTransport("kv-log-2", TransferSection())
left.add_peer(right.metadata())
"""
    program %= TCP
    ended = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    assert "WARNING UCX says:" in ended.stderr and "nonsense" in ended.stderr and "ucp_put" not in ended.stdout + ended.stderr


def may_write_into_others() -> bool:
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    return not scope.exists() or scope.read_text().strip() == "0"


def test_two_agents_write_and_a_finished_write_stays_finished() -> None:
    left, right = NixlTransport("kv-left", SECTION), NixlTransport("kv-right", SECTION)
    source, target = Region(4096), Region(4096)
    left.register(source)
    right.register(target)
    assert left.add_peer(right.metadata()) == "kv-right" == left.add_peer(right.metadata())
    source.view[:5] = b"hello"
    write = left.write(Span(source.address, 65), "kv-right", Span(target.address + 7, 65), b"note\0\xff")
    deadline_s = time.monotonic() + 60
    while left.poll(write) is WriteState.IN_FLIGHT and time.monotonic() < deadline_s:
        time.sleep(0.0005)
    assert [left.poll(write) for _ in range(3)] == [WriteState.DONE] * 3 and write.detail == ""
    notes: list[bytes] = []
    while not notes and time.monotonic() < deadline_s:
        notes = right.notifications()
    assert notes == [b"note\0\xff"] and bytes(target.slice(5, 9)) == b"\0\0hello\0\0"
    report = write.report
    assert report is not None and (report.backend, report.num_bytes, report.num_descriptors) == ("UCX", 65, 1)
    assert 0 < report.post_s <= report.transfer_s
    later = Region(8192)
    right.register(later)
    assert left.add_peer(right.metadata()) == "kv-right", "memory registered later is learned by adding the peer again"
    write = left.write(Span(source.address, 64), "kv-right", Span(later.address, 64), b"x")
    while left.poll(write) is WriteState.IN_FLIGHT and time.monotonic() < deadline_s:
        time.sleep(0.0005)
    assert bytes(later.slice(0, 5)) == b"hello"
    for transport in (left, right):
        transport.close()


class Locked:
    """PageLocks that remembers what is locked."""

    def __init__(self) -> None:
        self.addresses: set[int] = set()

    def lock(self, address: int, num_bytes: int) -> None:
        self.addresses.add(address)

    def unlock(self, address: int) -> None:
        self.addresses.remove(address)


def test_memory_is_locked_for_the_card_exactly_while_it_is_registered() -> None:
    """Also where NIXL refuses it: a region that goes away locked takes its addresses out of use."""
    locks = Locked()
    transport, regions = NixlTransport("kv-locks", SECTION, locks), [Region(4096) for _ in range(3)]
    first, second, refused = (region.address for region in regions)
    transport.register(regions[0])
    transport.register(regions[1])
    assert locks.addresses == {first, second}

    def refuse(*_: object) -> None:
        raise transport._errors[0]("no memory")

    registers, transport._agent.register_memory = transport._agent.register_memory, refuse
    with pytest.raises(TransferError, match="cannot be registered"):
        transport.register(regions[2])
    assert refused not in locks.addresses
    transport._agent.register_memory = registers
    transport.deregister(regions[0])
    assert locks.addresses == {second}
    transport.close()
    assert not locks.addresses


@pytest.mark.parametrize(
    "telemetry", [SimpleNamespace(totalBytes=65), SimpleNamespace(totalBytes=None), None], ids=["less", "null", "none"]
)
def test_a_write_whose_telemetry_nobody_understands_counts_and_ends_nothing(
    agent: TransferAgent, telemetry: object, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    transport = NixlTransport(f"kv-unmeasured-{time.monotonic_ns()}", SECTION)

    def tell(handle: object) -> object:
        if telemetry is None:
            raise transport._api.nixlBind.nixlNoTelemetryError("none was captured")
        return telemetry

    monkeypatch.setattr(transport._agent, "get_xfer_telemetry", tell)
    producer = TransferAgent("unmeasured", transport, SECTION, num_send_slots=2)
    producer.attach_ring(agent.boot_id, agent.open_ring("unmeasured", 4))
    handle, spans = offer(agent, "unmeasured", 1, 2)
    for span in spans:
        assert producer.push(PushJob(handle=handle, span=span, fill=lambda place: None)).result(60).report is None
    counters = producer.counts().counters
    assert (counters["messages_pushed"], counters["transport_unmeasured"]) == (len(spans), len(spans)) == (2, 2)
    assert producer.failure is None and "transport_bytes" not in counters
    assert [record.levelname for record in caplog.records if "measured" in record.message] == ["WARNING"], "told once"
    producer.close()
    transport.close()
