"""Peers of prefill: a ring that cannot be attached, and processes that left. Real sockets, a real agent on the loopback transport."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from duomo.config import TransferSection, WireSection
from duomo.errors import PeerError
from duomo.wire.connection import Connection, Identity, Listener, connect, new_boot_id
from duomo.wire.messages import RingOffered, Role
from duomo.wire.values import PeerAddress
from services.kv_transfer.agent import TransferAgent
from services.kv_transfer.transport_loopback import LoopbackHub
from services.prefill.decode_peers import MAX_GONE_PEERS, DecodePeers

WIRE = WireSection()


def _identity(role: Role, address: str) -> Identity:
    return Identity(replica_id=role, boot_id=new_boot_id(), role=role, model_fingerprint="f", address=address, secret="")


class Rig:
    """One prefill side; decode processes are listeners that end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lost: list[PeerError] = []
        self.me = _identity("prefill", "")
        self.hub = LoopbackHub()
        self.agent = TransferAgent(self.me.boot_id, self.hub.agent("producer"), TransferSection(transport="loopback"), num_send_slots=1)
        self.peers = DecodePeers(self.agent, self.dial, lambda boot_id: None, lambda boot_id, error: self.lost.append(error))

    async def dial(self, address: str) -> Connection:
        return await connect(address, self.me, WIRE)

    async def decode(self, number: int) -> tuple[Listener, Identity, Connection]:
        address = f"unix:{self.folder / f'd{number}.sock'}"
        identity = _identity("decode", address)
        ended = asyncio.Event()

        async def serve(connection: Connection) -> None:
            await ended.wait()

        listener = Listener(address, identity, WIRE, serve)
        await listener.start()
        peer = PeerAddress(replica_id="decode", boot_id=identity.boot_id, address=address)
        self.peers.want(peer)
        while (connection := self.peers._peers[identity.boot_id].connection) is None:
            await asyncio.sleep(0.001)
        return listener, identity, connection


def test_grants_behind_a_ring_that_cannot_be_attached_are_not_forgotten(tmp_path: Path) -> None:
    async def run() -> None:
        rig = Rig(tmp_path)
        listener, identity, connection = await rig.decode(0)
        nobody = RingOffered(ring_name="nobody", agent_metadata=b"nobody", base_address=4096, slot_bytes=65536, num_slots=1)
        acted: list[str] = []
        rig.peers.ring_offered(connection, nobody)
        rig.peers.when_attached(connection, lambda: acted.append("handle"))
        assert not acted
        async with asyncio.timeout(30):
            while not acted:
                await asyncio.sleep(0.001)
        assert rig.lost and not rig.peers.is_reachable(identity.boot_id)
        with pytest.raises(PeerError, match="no_ring"):
            connection.check_open()  # or it would be the peer's socket for ever, without a ring
        await rig.peers.close()
        await connection.close()
        await listener.close()
        rig.agent.close()

    asyncio.run(run())


def test_a_ring_that_was_replaced_while_it_was_attached_costs_no_socket(tmp_path: Path) -> None:
    async def run() -> None:
        rig = Rig(tmp_path)
        listener, identity, connection = await rig.decode(0)
        consumer = TransferAgent("consumer", rig.hub.agent("consumer"), TransferSection(transport="loopback"))
        newer = consumer.open_ring(rig.me.boot_id, 2)
        rig.peers.ring_offered(connection, msgspec.structs.replace(newer, ring_name="gone", agent_metadata=b"gone"))
        rig.peers.ring_offered(connection, newer)
        async with asyncio.timeout(30):
            while not rig.peers.is_reachable(identity.boot_id):
                await asyncio.sleep(0.001)
        connection.check_open()
        assert rig.lost, "what was granted in the first is over"
        await rig.peers.close()
        await connection.close()
        await listener.close()
        rig.agent.close()
        consumer.close()

    asyncio.run(run())


def test_a_decode_replica_told_of_another_kv_dtype_is_refused_by_name_and_not_connected_to_again(tmp_path: Path) -> None:
    async def run() -> None:
        rig = Rig(tmp_path)
        listener, identity, connection = await rig.decode(0)
        section = TransferSection(transport="loopback", kv_dtype="fp8_e4m3")
        consumer = TransferAgent("consumer", rig.hub.agent("consumer"), section)
        rig.peers.ring_offered(connection, consumer.open_ring(rig.me.boot_id, 2))
        async with asyncio.timeout(30):
            while not rig.lost:
                await asyncio.sleep(0.001)
        (lost,) = rig.lost
        assert lost.code == "kv_dtype_mismatch" and lost.retryable and lost.phase == "kv.handoff"
        assert "kv_transfer.kv_dtype is model in prefill and fp8_e4m3 in decode" in lost.detail
        with pytest.raises(PeerError, match="no_ring"):
            connection.check_open()
        rig.peers.left(connection)
        rig.lost.clear()
        rig.peers.want(PeerAddress(replica_id="decode", boot_id=identity.boot_id, address=identity.address))
        assert not rig.lost, "whoever wants it has to hear of it behind what he is doing"
        await asyncio.sleep(0)
        assert [error.code for error in rig.lost] == ["kv_dtype_mismatch"]
        assert rig.peers._peers[identity.boot_id].connection is None and rig.peers._peers[identity.boot_id].connecting is None
        await rig.peers.close()
        await connection.close()
        await listener.close()
        rig.agent.close()
        consumer.close()

    asyncio.run(run())


def test_peers_that_left_are_forgotten_in_the_end(tmp_path: Path) -> None:
    async def run() -> None:
        rig = Rig(tmp_path)
        for number in range(MAX_GONE_PEERS + 5):
            listener, _, connection = await rig.decode(number)
            rig.peers.left(connection)
            await connection.close()
            await listener.close()
        assert len(rig.peers._peers) <= MAX_GONE_PEERS
        await rig.peers.close()
        rig.agent.close()

    asyncio.run(run())


def test_a_decode_replica_that_cannot_be_dialled_is_the_pair_s_fault(tmp_path: Path) -> None:
    """Nobody knows whose else: the gateway tries another of both."""

    async def run() -> None:
        rig = Rig(tmp_path)
        rig.peers.want(PeerAddress(replica_id="decode", boot_id=new_boot_id(), address=f"unix:{tmp_path / 'nobody.sock'}"))
        while not rig.lost:
            await asyncio.sleep(0.001)
        (lost,) = rig.lost
        assert lost.phase == "kv.handoff" and "nobody.sock" in lost.detail
        await rig.peers.close()
        rig.agent.close()

    asyncio.run(run())
