"""NIXL agents of one process: writes and their reports, UCX's word of its settings, page locks, telemetry that nobody understands."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from duomo.errors import TransferError
from services.kv_transfer.agent import PushJob, TransferAgent
from services.kv_transfer.memory import Region
from services.kv_transfer.transport import Span, WriteState
from services.kv_transfer.transport_nixl import NixlTransport
from tests.services.kv_transfer.nixl_rig import SECTION, TCP, offer

ROOT = Path(__file__).parents[3]


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
