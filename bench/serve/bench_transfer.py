"""Measures KV transfer between two processes over NIXL: rate, latency of one message, cost of polling. Writes bench/results.

    python bench/serve/bench_transfer.py [--repeats 5] [--out bench/results/transfer.json]

A producer process pushes 16 MiB in 1 MiB messages (hash on, packed by a copy), and single messages of 64 KiB; this process lands them,
copies each payload out and credits it through a pipe. A wrong byte ends the run without a report.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import numpy as np

from duomo.config import TransferSection
from duomo.wire.messages import Handle, RingOffered
from services.kv_transfer import layout
from services.kv_transfer.agent import PushJob, TransferAgent
from services.kv_transfer.hashing import message_hash
from services.kv_transfer.layout import MessageSpan
from services.kv_transfer.transport_nixl import NixlTransport

MIB = 1 << 20
SECTION = TransferSection(slot_bytes=MIB, ucx_net_devices=os.environ.get("UCX_NET_DEVICES", "lo"))


def produce(pipe: Connection) -> None:
    """The producer process: pushes the handles that come through the pipe, takes credits."""
    agent = TransferAgent("bench-p", NixlTransport("kv-bench-p", SECTION), SECTION)
    agent.attach_ring("bench-d", msgspec.msgpack.decode(pipe.recv_bytes(), type=RingOffered))
    source = np.arange(MIB // 4, dtype=np.uint32)
    while (kind := pipe.recv_bytes()) != b"end":
        if kind == b"credit":
            agent.credit(*pipe.recv())
            continue
        handle = msgspec.msgpack.decode(pipe.recv_bytes(), type=Handle)
        spans = layout.messages(range(handle.num_blocks), (0, 1), *pipe.recv())

        def fill(place: memoryview) -> None:
            np.frombuffer(place, dtype=np.uint32)[:] = source[: len(place) // 4]

        for span in spans:
            agent.push(PushJob(handle=handle, span=span, fill=fill))
    agent.close()


def transfer(agent: TransferAgent, pipe: Connection, num_messages: int, message_bytes: int) -> float:
    """Seconds from offering a handle until its last message is landed, verified and copied out."""
    spans: tuple[MessageSpan, ...] = layout.messages(range(num_messages), (0, 1), message_bytes, message_bytes)
    slots = agent.grant("bench-p", num_messages)
    assert slots is not None
    handle = Handle(
        handle_id=agent.next_handle_id(),
        producer_boot_id="bench-p",
        consumer_boot_id="bench-d",
        model_fingerprint="",
        request_id="",
        attempt=0,
        ring_name=agent.ring_name("bench-p"),
        slots=slots,
        num_tokens=0,
        num_blocks=num_messages,
    )
    agent.expect(handle, spans)
    target = np.empty(message_bytes, dtype=np.uint8)
    pipe.send_bytes(b"push")
    started_s = time.perf_counter()
    pipe.send_bytes(msgspec.msgpack.encode(handle))
    pipe.send((message_bytes, message_bytes))
    num_left = num_messages
    while num_left:
        for landed in agent.poll():
            assert landed.error is None, landed.error
            target[:] = np.frombuffer(landed.payload, dtype=np.uint8)
            agent.release(handle.handle_id, landed.span.message_idx)
            pipe.send_bytes(b"credit")
            pipe.send((handle.handle_id, landed.span.message_idx))
            num_left -= 1
        time.sleep(0.00005)
    took_s = time.perf_counter() - started_s
    assert (target.view(np.uint32) == np.arange(message_bytes // 4, dtype=np.uint32)).all(), "wrong bytes: nothing is reported"
    return took_s


def poll_s(agent: TransferAgent) -> float:
    started_s = time.perf_counter()
    for _ in range(2000):
        agent.poll()
    return (time.perf_counter() - started_s) / 2000


def hash_s() -> float:
    payload = memoryview(np.random.default_rng(0).bytes(MIB))
    started_s = time.perf_counter()
    for i in range(16):
        message_hash(payload, 1, 1, i)
    return (time.perf_counter() - started_s) / 16


def measure(repeats: int) -> dict[str, object]:
    agent = TransferAgent("bench-d", NixlTransport("kv-bench-d", SECTION), SECTION)
    offer = agent.open_ring("bench-p", 32)
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    producer = multiprocessing.get_context("spawn").Process(target=produce, args=(theirs,), daemon=True)
    producer.start()
    ours.send_bytes(msgspec.msgpack.encode(offer))
    try:
        for message_bytes in (64 * 1024, MIB):
            transfer(agent, ours, 16, message_bytes)
        whole_s = [transfer(agent, ours, 16, MIB) for _ in range(repeats)]
        single_s = [transfer(agent, ours, 1, 64 * 1024) for _ in range(repeats * 20)]
        idle_s = min(poll_s(agent) for _ in range(repeats))
    finally:
        ours.send_bytes(b"end")
        producer.join(5)
        agent.close()
    return {
        "push_16MiB_in_1MiB_slots_gb_per_s": {"median": 16 * MIB / statistics.median(whole_s) / 1e9, "best": 16 * MIB / min(whole_s) / 1e9},
        "message_64KiB_ms": {"median": statistics.median(single_s) * 1e3, "p99": sorted(single_s)[int(len(single_s) * 0.99)] * 1e3},
        "poll_idle_us": idle_s * 1e6,
        "hash_gb_per_s": MIB / min(hash_s() for _ in range(repeats)) / 1e9,
        "repeats": repeats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    hardware = f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    report = {"bench": "transfer", "hardware": hardware, "commit": commit, **measure(options.repeats)}
    print(json.dumps(report, indent=2))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
