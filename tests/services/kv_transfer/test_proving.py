"""A transport that moves bytes proves it, quickly and without a trace; one that does not ends the start with a typed error."""

from __future__ import annotations

import pytest
import torch

from duomo.config import TransferSection
from duomo.errors import TransferError
from services.kv_transfer.agent import TransferAgent
from services.kv_transfer.device_memory import DeviceRegion
from services.kv_transfer.faults import Fault, ScriptedFaults
from services.kv_transfer.transport_loopback import LoopbackHub
from services.kv_transfer.transport_nixl import NixlTransport

SECTION = TransferSection(ucx_net_devices="lo", max_bytes_per_s=1000.0)


def test_a_real_agent_proves_itself_and_still_works_for_others() -> None:
    transport = NixlTransport("proof-test", SECTION)
    agent = TransferAgent("boot", transport, SECTION)
    try:
        seconds = min(agent.prove().seconds, agent.prove().seconds)
        assert seconds < 30, "held up by the cap on the rate, which is for KV: at 1,000 bytes a second it takes minutes"
        assert not transport._registered and not transport._peers
        counts = agent.counts()
        assert (counts.num_slots, counts.num_retired_rings, counts.num_writes_in_flight, counts.counters) == (0, 0, 0, {})
    finally:
        agent.close()


@pytest.mark.parametrize(
    "fault", [Fault(corrupt_byte=5), Fault(kills_writer=True), Fault(truncate_bytes=100)], ids=["corrupt", "failed", "truncated"]
)
def test_a_transport_that_does_not_move_bytes_is_named(fault: Fault) -> None:
    agent = TransferAgent("boot", LoopbackHub(ScriptedFaults({0: fault})).agent("a"), SECTION)
    with pytest.raises(TransferError, match="loopback does not move KV on this machine") as caught:
        agent.prove()
    assert (caught.value.code, caught.value.retryable) == ("transport_broken", False)
    agent.close()


def test_a_transport_that_loses_bytes_is_given_a_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.kv_transfer.proving._TIMEOUT_S", 0.2)
    agent = TransferAgent("boot", LoopbackHub(ScriptedFaults({0: Fault(drops_data=True)})).agent("a"), SECTION)
    with pytest.raises(TransferError, match="did not land within 0.2 s"):
        agent.prove()
    agent.close()


def test_memory_of_a_device_proves_itself_as_the_hosts_does() -> None:
    made: list[DeviceRegion] = []

    def allocate(num_bytes: int) -> DeviceRegion:
        made.append(DeviceRegion(num_bytes, torch.device("cpu")))
        return made[-1]

    agent = TransferAgent("boot", LoopbackHub().agent("a"), SECTION, allocate=allocate)
    agent.prove()
    assert len(made) == 2, "a send slot and a ring"
    agent.close()
