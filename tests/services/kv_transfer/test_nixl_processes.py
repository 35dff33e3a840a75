"""KV between real processes over NIXL: right bytes, death in a write, restart, a stopped peer on either side, spoilt and late messages.

Each in the host's memory, in a tensor's there, and from card to card (one card, where there is no second).
"""

from __future__ import annotations

import base64
import os
import signal
import time
from pathlib import Path

import msgspec
import pytest

from duomo.errors import TransferError
from duomo.wire.messages import RingOffered
from duomo.wire.values import Handle
from services.kv_transfer import layout
from services.kv_transfer.agent import PushJob, TransferAgent
from tests.services.kv_transfer.nixl_rig import BLOCK_BYTES, BOUNDS, SECTION, TCP, Process, attach, land, of_peer, offer, push, start


def test_kv_moves_between_processes_and_a_killed_producer_is_followed_by_another(
    processes: list[Process], agent: TransferAgent, device: str
) -> None:
    slow = SECTION.model_copy(update={"max_bytes_per_s": 2e6})
    peer = start(processes, agent, "p-one", slow, device)
    handle, spans = offer(agent, "p-one", 40, want_slots=3)
    assert peer.process.pid != os.getpid() and len(spans) > 10
    push(peer, handle)
    assert land(agent, peer, handle, 3) >= 3
    peer.send(signal.SIGKILL)
    agent.abort(handle.handle_id)
    assert agent.counts().num_quarantined_slots == 3
    assert agent.peer_dead("p-one") == (handle.handle_id,)
    assert (agent.counts().num_slots, agent.counts().num_quarantined_slots) == (0, 0)

    peer = start(processes, agent, "p-two", device=device)
    for num_blocks, want_slots in ((1, 1), (7, 1), (63, 4)):
        handle, spans = offer(agent, "p-two", num_blocks, want_slots)
        push(peer, handle)
        assert land(agent, peer, handle, len(spans)) == len(spans)
        assert {peer.ask("result", handle_id=handle.handle_id, message_idx=m, timeout_s=60) for m in range(len(spans))} == {"done"}
        peer.ask("cancel", handle_id=handle.handle_id, timeout_s=60)
    counts = agent.counts()
    assert (counts.num_free_slots, counts.num_open_handles) == (counts.num_slots, 0)


def test_a_stopped_producer_keeps_its_slots_in_quarantine_until_its_fence(
    processes: list[Process], agent: TransferAgent, device: str
) -> None:
    peer = start(processes, agent, "p-slow", SECTION.model_copy(update={"max_bytes_per_s": 1e6}), device)
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
    processes: list[Process], monkeypatch: pytest.MonkeyPatch, agent: TransferAgent, device: str
) -> None:
    monkeypatch.setattr(agent._pusher, "_section", SECTION.model_copy(update={"write_timeout_s": 0.5}))
    peer = Process("d-stopped", device=of_peer(device))
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
    pushed = agent.push(PushJob(handle=handle, span=spans[0], fill=lambda place: None, is_sealed=bool(device)))
    with pytest.raises(TransferError, match="write_timeout"):
        pushed.result(60)
    fence = agent.cancel(77)
    time.sleep(0.2)
    assert not fence.done() and agent.counts().num_writes_in_flight == 1, "the stopped process may still take the bytes"
    peer.send(signal.SIGKILL)
    agent.detach("d-stopped")
    fence.result(60)
    assert agent.counts().num_writes_in_flight == 0


def test_a_spoilt_message_is_refused_and_right_when_it_is_written_again(
    processes: list[Process], agent: TransferAgent, device: str
) -> None:
    peer = start(processes, agent, "p-spoils", device=device)
    handle, spans = offer(agent, "p-spoils", 40, want_slots=4)
    hash_byte = layout.trailer_offset(spans[2].num_bytes) + len(layout.trailer_start(handle.handle_id, spans[2]))
    push(peer, handle, spoilt={"0": 5, "1": spans[1].num_bytes - 1, "2": hash_byte})
    seen: dict[int, str] = {}
    deadline_s = time.monotonic() + 60
    while len(seen) < 4 and time.monotonic() < deadline_s:
        for landed in agent.poll():
            seen[landed.span.message_idx] = "right" if landed.error is None else landed.error.code
            if landed.error is None:
                agent.release(handle.handle_id, landed.span.message_idx)  # nobody tells its writer: no more come
    assert seen == {0: "kv_corrupt", 1: "kv_corrupt", 2: "kv_corrupt", 3: "right"}
    peer.ask("credit", handle_id=handle.handle_id, message_idx=3)
    for message_idx in range(3):
        agent.pulled(handle.handle_id, message_idx)
        peer.ask("push_again", handle=msgspec.to_builtins(handle), bounds=BOUNDS, block_bytes=BLOCK_BYTES, message_idx=message_idx)
    assert land(agent, peer, handle, len(spans) - 1) == len(spans) - 1
    counts = agent.counts()
    assert (counts.num_free_slots, counts.num_open_handles, counts.counters["messages_corrupt"]) == (counts.num_slots, 0, 3)


def test_messages_that_come_after_their_handle_was_given_up_harm_nobody_and_the_ring_is_replaced(
    processes: list[Process], agent: TransferAgent, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """No fence comes: the slots stay in quarantine, the ring is replaced under another name, and what is late lands in the old one."""
    monkeypatch.setattr("services.kv_transfer.policy.RING_PATIENCE_S", 0.1)
    peer = start(processes, agent, "p-late", SECTION.model_copy(update={"max_bytes_per_s": 1e6}), device)
    late, spans = offer(agent, "p-late", 40, want_slots=4)
    push(peer, late)
    assert land(agent, peer, late, 1) >= 1
    agent.abort(late.handle_id)
    deadline_s = time.monotonic() + 60
    while not agent.has_stuck_rings() and time.monotonic() < deadline_s:
        time.sleep(0.01)
    ((producer, ring),) = agent.replace_stuck_rings()
    assert (producer, agent.counts().num_retired_rings) == ("p-late", 1) and ring.ring_name != late.ring_name
    attach(peer, agent, ring)
    handle, spans = offer(agent, "p-late", 7, want_slots=2)
    assert handle.ring_name == ring.ring_name
    push(peer, handle)
    assert land(agent, peer, handle, len(spans)) == len(spans)
    were_written = {peer.ask("result", handle_id=late.handle_id, message_idx=number, timeout_s=60) for number in range(4)}
    assert were_written == {"done"}, "all that had slots, though their handle was given up"
    peer.ask("cancel", handle_id=late.handle_id, timeout_s=60)
    agent.fence(late.handle_id)
    counts = agent.counts()
    assert (counts.num_retired_rings, counts.num_quarantined_slots, counts.num_free_slots) == (0, 0, counts.num_slots)
    assert counts.counters["messages_landed"] >= 1 + len(spans) and agent.poll() == []


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


def may_write_into_others() -> bool:
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    return not scope.exists() or scope.read_text().strip() == "0"
