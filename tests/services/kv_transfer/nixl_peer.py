"""A process with a transfer agent on NIXL, the other end of test_transport_nixl.py: obeys JSON lines on stdin, answers each by one.

{"do": name of a method of Peer, its arguments...}. The payload of message m of handle h is default_rng((h, m)).bytes. Its memory is the
host's, or a device's (cpu: the host's, used as a device's is).
"""

from __future__ import annotations

import base64
import json
import sys
from concurrent.futures import Future
from functools import partial
from typing import Any

import msgspec
import numpy as np

from duomo.config import TransferSection
from duomo.errors import DuomoError
from duomo.wire.messages import RingOffered
from duomo.wire.values import Handle
from services.kv_transfer import layout
from services.kv_transfer.agent import Landed, PushJob, PushResult, TransferAgent
from services.kv_transfer.layout import MessageSpan
from services.kv_transfer.memory import Allocate, Region
from services.kv_transfer.sealing import seal
from services.kv_transfer.transport_nixl import NixlTransport


def content(handle_id: int, span: MessageSpan) -> bytes:
    return np.random.default_rng((handle_id, span.message_idx)).bytes(span.num_bytes)


def allocate_on(device: str) -> Allocate:
    """device: "" is the host's memory, which needs no torch."""
    if not device:
        return Region
    import torch

    from services.kv_transfer.device_memory import DeviceRegion

    return partial(DeviceRegion, device=torch.device(device))


def job_of(handle: Handle, span: MessageSpan, device: str, spoilt_byte: int | None = None) -> PushJob:
    """The message, in the host's memory sealed by the agent itself; spoilt_byte: of all of it, which is another than was hashed."""
    if not device and spoilt_byte is None:

        def fill_payload(place: memoryview) -> None:
            place[:] = content(handle.handle_id, span)

        return PushJob(handle=handle, span=span, fill=fill_payload)

    def fill(place: Any) -> None:
        message = memoryview(bytearray(layout.message_bytes(span.num_bytes)))
        message[: span.num_bytes] = content(handle.handle_id, span)
        seal(message, handle.handle_id, span)
        if spoilt_byte is not None:
            message[spoilt_byte] ^= 1
        if not device:
            place[:] = message
            return
        from services.kv_transfer.device_memory import put

        put(place, bytes(message))

    return PushJob(handle=handle, span=span, fill=fill, is_sealed=True)


class Peer:
    """One agent and what was started on it."""

    def __init__(self, boot_id: str, section: TransferSection, device: str) -> None:
        transport = NixlTransport(f"kv-{boot_id}", section)
        assert transport.transport_name == "nixl/UCX"
        self.agent = TransferAgent(boot_id, transport, section, num_send_slots=4, allocate=allocate_on(device))
        self.section, self.device = section, device
        self.pushed: dict[tuple[int, int], Future[PushResult]] = {}
        self.landed: dict[tuple[int, int], Landed] = {}

    def open_ring(self, producer: str, num_slots: int) -> str:
        offer = self.agent.open_ring(producer, num_slots)
        return base64.b64encode(msgspec.msgpack.encode(offer)).decode()

    def attach_ring(self, consumer: str, offer: str) -> None:
        self.agent.attach_ring(consumer, msgspec.msgpack.decode(base64.b64decode(offer), type=RingOffered))

    def push(self, handle: dict[str, object], bounds: list[int], block_bytes: int, spoilt: dict[str, int] | None = None) -> None:
        """All messages. spoilt: bytes of some of them, by message."""
        grant = msgspec.convert(handle, Handle)
        for span in layout.messages(range(grant.num_blocks), bounds, block_bytes, self.section.slot_bytes):
            job = job_of(grant, span, self.device, (spoilt or {}).get(str(span.message_idx)))
            self.pushed[grant.handle_id, span.message_idx] = self.agent.push(job)

    def push_again(self, handle: dict[str, object], bounds: list[int], block_bytes: int, message_idx: int) -> None:
        """One, whose first write has ended."""
        grant = msgspec.convert(handle, Handle)
        span = layout.messages(range(grant.num_blocks), bounds, block_bytes, self.section.slot_bytes)[message_idx]
        self.pushed[grant.handle_id, message_idx] = self.agent.push(job_of(grant, span, self.device))

    def credit(self, handle_id: int, message_idx: int) -> None:
        self.agent.credit(handle_id, message_idx)

    def result(self, handle_id: int, message_idx: int, timeout_s: float) -> str:
        try:
            self.pushed[handle_id, message_idx].result(timeout_s)
        except DuomoError as error:
            return error.code
        return "done"

    def lanes(self, handle_id: int, message_idx: int) -> list[str]:
        report = self.pushed[handle_id, message_idx].result(0).report
        return [] if report is None else list(report.lanes)

    def num_descriptors(self, handle_id: int, message_idx: int) -> int:
        report = self.pushed[handle_id, message_idx].result(0).report
        return 0 if report is None else report.num_descriptors

    def prove(self) -> str:
        try:
            return self.agent.prove().way
        except DuomoError as error:
            return f"{error.code}: {error.detail}"

    def cancel(self, handle_id: int, timeout_s: float) -> None:
        self.agent.cancel(handle_id).result(timeout_s)

    def num_in_flight(self) -> int:
        return self.agent.counts().num_writes_in_flight


def main() -> None:
    boot_id, section = sys.argv[1], TransferSection.model_validate_json(sys.argv[2])
    peer = Peer(boot_id, section, sys.argv[3])
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        answer = getattr(peer, command.pop("do"))(**command)
        print(json.dumps(answer), flush=True)
    peer.agent.close()


if __name__ == "__main__":
    main()
