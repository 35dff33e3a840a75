"""The other process of a handoff over NIXL (nixl_peer.py), and what both sides of one do with it. Owns processes, judges nothing."""

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
from pathlib import Path
from typing import Any

import msgspec

from duomo.config import TransferSection
from duomo.wire.messages import RingOffered
from duomo.wire.values import Handle
from services.kv_transfer import layout
from services.kv_transfer.agent import TransferAgent
from services.kv_transfer.layout import MessageSpan
from tests.services.kv_transfer.nixl_peer import content

TCP = "tcp,self,cuda_copy" if Path("/proc/driver/nvidia").exists() else "tcp,self"  # with a GPU NIXL refuses a list without CUDA
SECTION = TransferSection(slot_bytes=128 * 1024, ucx_net_devices="lo", write_timeout_s=60.0)
BOUNDS, BLOCK_BYTES = (0, 3, 8), 8192


class Process:
    """nixl_peer.py in a process of its own; device: where its memory lies."""

    def __init__(self, boot_id: str, section: TransferSection = SECTION, device: str = "") -> None:
        environment = os.environ | {"UCX_NET_DEVICES": "lo", "PYTHONPATH": os.pathsep.join(sys.path)}
        program = [sys.executable, "-m", "tests.services.kv_transfer.nixl_peer", boot_id, section.model_dump_json(), device]
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


def of_peer(device: str) -> str:
    """Where the other process has its memory."""
    if device != "cuda":
        return device
    import torch

    return f"cuda:{torch.cuda.device_count() - 1}"


def offer(
    agent: TransferAgent, producer: str, num_blocks: int, want_slots: int, section: TransferSection = SECTION
) -> tuple[Handle, tuple[MessageSpan, ...]]:
    spans = layout.messages(range(num_blocks), BOUNDS, BLOCK_BYTES, section.slot_bytes)
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
            assert landed.error is None and bytes(landed.awaited.payload) == content(handle.handle_id, landed.span)
            agent.release(handle.handle_id, landed.span.message_idx)
            peer.ask("credit", handle_id=handle.handle_id, message_idx=landed.span.message_idx)
            num_landed += 1
        time.sleep(0.001)
    return num_landed


def start(
    processes: list[Process], agent: TransferAgent, boot_id: str, section: TransferSection = SECTION, device: str = "", num_slots: int = 8
) -> Process:
    """A producer process attached to our ring."""
    peer = Process(boot_id, section, of_peer(device))
    processes.append(peer)
    attach(peer, agent, agent.open_ring(boot_id, num_slots))
    return peer


def attach(peer: Process, agent: TransferAgent, ring: RingOffered) -> None:
    peer.ask("attach_ring", consumer=agent.boot_id, offer=base64.b64encode(msgspec.msgpack.encode(ring)).decode())


def push(peer: Process, handle: Handle, **more: object) -> None:
    peer.ask("push", handle=msgspec.to_builtins(handle), bounds=BOUNDS, block_bytes=BLOCK_BYTES, **more)
