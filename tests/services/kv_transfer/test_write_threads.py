"""Writes that several threads of NIXL's share: how they are cut; whole, of the right bytes, ended by the peer's death like any other."""

from __future__ import annotations

import base64
import os
import signal
import time
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duomo.config import TransferSection
from duomo.errors import TransferError
from duomo.wire.messages import RingOffered
from duomo.wire.values import Handle
from services.kv_transfer import layout, ucx_routes
from services.kv_transfer.agent import PushJob, TransferAgent
from services.kv_transfer.transport_nixl import NixlTransport
from services.kv_transfer.write_pieces import MIN_SPLIT_BYTES, PIECES_A_THREAD, has_threads, pieces_of
from tests.services.kv_transfer.nixl_rig import BLOCK_BYTES, BOUNDS, SECTION, Process, land, offer, push, start

THREADS = 2
MIB = 1024 * 1024
LARGE = SECTION.model_copy(update={"slot_bytes": 32 * MIB, "num_write_threads": THREADS})
NUM_BLOCKS = 700  # messages of 17 and 29 MB
CMA = ("cma/memory",)


@given(
    num_bytes=st.integers(min_value=1, max_value=1 << 40),
    num_threads=st.integers(min_value=1, max_value=64),
    lanes=st.sampled_from([CMA, ("tcp/lo",), (), ("cma/memory", "tcp/lo"), ("cuda_ipc/cuda",), ("rc_mlx5/mlx5_0:1",)]),
)
def test_pieces_lie_end_to_end_and_only_long_writes_by_cma_are_cut(num_bytes: int, num_threads: int, lanes: tuple[str, ...]) -> None:
    pieces = pieces_of(num_bytes, num_threads, lanes)
    ends = [start + length for start, length in pieces]
    assert [start for start, _ in pieces] == [0, *ends[:-1]] and ends[-1] == num_bytes and min(length for _, length in pieces) > 0
    is_cut = num_threads > 1 and num_bytes >= MIN_SPLIT_BYTES and lanes == CMA
    assert len(pieces) == (PIECES_A_THREAD * num_threads if is_cut else 1)
    assert all(start % 4096 == 0 for start, _ in pieces), "a page is copied by one thread"


@pytest.mark.parametrize(("num_threads", "slot_bytes", "has"), [(1, 1 << 30, False), (2, 1 << 20, False), (2, MIN_SPLIT_BYTES, True)])
def test_threads_are_started_only_where_messages_can_be_long_enough(num_threads: int, slot_bytes: int, has: bool) -> None:
    assert has_threads(num_threads, slot_bytes) is has
    threaded = SECTION.model_copy(update={"num_write_threads": num_threads, "slot_bytes": slot_bytes})
    _, plain, more = num_started(SECTION), num_started(SECTION), num_started(threaded)  # the first starts what a process has once
    assert more - plain == (num_threads if has else 0)


def num_started(section: TransferSection) -> int:
    """Threads of this process that an agent starts."""
    before = len(os.listdir("/proc/self/task"))
    transport = NixlTransport(f"kv-threads-{time.monotonic_ns()}", section)
    started = len(os.listdir("/proc/self/task")) - before
    transport.close()
    return started


@pytest.fixture
def large() -> Iterator[TransferAgent]:
    transport = NixlTransport(f"kv-large-{time.monotonic_ns()}", LARGE)
    agent = TransferAgent(f"large-{time.monotonic_ns()}", transport, LARGE, num_send_slots=2)
    yield agent
    agent.close()


def test_messages_that_threads_share_come_whole_between_processes(processes: list[Process], large: TransferAgent) -> None:
    """The first one tells by which way UCX writes. Each is verified by its hash and byte by byte once its notification is here."""
    peer = start(processes, large, "p-large", LARGE, num_slots=4)
    counts = []
    for _ in range(4):
        handle, spans = offer(large, "p-large", NUM_BLOCKS, 2, LARGE)
        assert min(span.num_bytes for span in spans) >= MIN_SPLIT_BYTES
        push(peer, handle)
        assert land(large, peer, handle, len(spans)) == len(spans)
        for span in spans:
            told = {"handle_id": handle.handle_id, "message_idx": span.message_idx}
            assert peer.ask("result", timeout_s=60, **told) == "done"
            is_cma = ucx_routes.is_met("cma", peer.ask("lanes", **told))
            counts.append((is_cma, peer.ask("num_descriptors", **told)))
        peer.ask("cancel", handle_id=handle.handle_id, timeout_s=60)
    assert counts[0][1] == 1
    assert [num for _, num in counts[2:]] == [PIECES_A_THREAD * THREADS if is_cma else 1 for is_cma, _ in counts[2:]]
    rest = large.counts()
    assert (rest.num_free_slots, rest.num_open_handles) == (rest.num_slots, 0)


@pytest.mark.parametrize("num_before", [1, 3], ids=["threads not connected", "threads connected"])
def test_a_long_write_to_a_peer_that_stops_and_dies_ends_and_the_next_peer_has_its_own(
    processes: list[Process], large: TransferAgent, monkeypatch: pytest.MonkeyPatch, num_before: int
) -> None:
    """num_before: messages that arrived; the first of them was not cut."""
    monkeypatch.setattr(large._pusher, "_section", LARGE.model_copy(update={"write_timeout_s": 1.0}))
    for name, first_id in (("d-stops", 1), ("d-next", 100)):
        peer = Process(name, LARGE)
        processes.append(peer)
        ring = msgspec.msgpack.decode(base64.b64decode(peer.ask("open_ring", producer=large.boot_id, num_slots=4)), type=RingOffered)
        large.attach_ring(name, ring)
        for number in range(num_before):
            large.push(job(large, name, ring, first_id + number)).result(60)
        if name == "d-stops":
            peer.send(signal.SIGSTOP)
            pushed = large.push(job(large, name, ring, 77))
            try:
                pushed.result(60)  # the kernel copies into a process that stands still
            except TransferError as error:
                assert error.code == "write_timeout"
            fence = large.cancel(77)
            peer.send(signal.SIGKILL)
            large.detach(name)
            fence.result(60)
            assert large.counts().num_writes_in_flight == 0


def job(agent: TransferAgent, consumer: str, ring: RingOffered, handle_id: int) -> PushJob:
    """One message of 17 MB."""
    span = layout.messages(range(NUM_BLOCKS), BOUNDS, BLOCK_BYTES, LARGE.slot_bytes)[0]
    handle = Handle(
        handle_id=handle_id,
        producer_boot_id=agent.boot_id,
        consumer_boot_id=consumer,
        model_fingerprint="f",
        request_id="r",
        attempt=0,
        ring_name=ring.ring_name,
        slots=(0, 1),
        num_tokens=NUM_BLOCKS * 16,
        num_blocks=NUM_BLOCKS,
    )
    return PushJob(handle=handle, span=span, fill=lambda place: None)
