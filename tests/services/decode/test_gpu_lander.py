"""A GPU lands messages by and by: a slot is freed and a leg told when the device has said that the hash is right, and not before."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="messages land by a Triton kernel")

from duomo.config import TransferSection
from duomo.engine.gpu_kv_cache import GpuKvCache
from duomo.engine.gpu_kv_messages import GpuKvPacker, LandingMessage
from duomo.engine.kv_cache import KvCache, KvSpec
from duomo.wire.values import Handle
from duomo_kernels.kv_hash_pack import Seal
from services.decode.arrivals import LandedMessage
from services.decode.gpu_lander import GpuLander
from services.decode.landers import OpenTables
from services.kv_transfer import layout
from services.kv_transfer.agent import PushJob, TransferAgent
from services.kv_transfer.device_memory import DeviceRegion
from services.kv_transfer.faults import Fault, FaultPlan, ScriptedFaults
from services.kv_transfer.layout import MessageSpan, messages, trailer_start
from services.kv_transfer.memory import Region
from services.kv_transfer.transport_loopback import LoopbackHub
from tests.interpreter import prepare

prepare()

SPEC = KvSpec(num_layers=4, num_kv_heads=2, head_dim=16, block_tokens=16)
TABLE = [6, 1, 3]
BOUNDS = (0, 2, 4)


@dataclass(eq=False)
class Pair:
    """A consumer with a GPU's pool, one handle for the three blocks of TABLE. The producer is a CPU's; a GPU's where rings lie in it."""

    device: torch.device
    is_in_device: bool = False
    faults: FaultPlan | None = None

    def __post_init__(self) -> None:
        section = TransferSection(slot_bytes=64 * 1024, write_timeout_s=3.0)
        hub = LoopbackHub(self.faults)
        allocate = partial(DeviceRegion, device=self.device) if self.is_in_device else Region
        self.consumer = TransferAgent("d", hub.agent("d"), section, num_send_slots=1, allocate=allocate)
        self.producer = TransferAgent("p", hub.agent("p"), section, num_send_slots=4, allocate=allocate)
        self.producer.attach_ring("d", self.consumer.open_ring("p", 4))
        self.source = KvCache(SPEC, 8)
        self.source.tensor.normal_(generator=torch.Generator().manual_seed(1))
        self.pool, gpu_source = (GpuKvCache(SPEC, 8, self.device) for _ in range(2))
        gpu_source.tensor.copy_(self.source.tensor)
        self.packer = GpuKvPacker(gpu_source)
        self.lander, self.tables = GpuLander(self.pool), OpenTables()

    def offer(self) -> tuple[Handle, tuple[MessageSpan, ...]]:
        spans = messages(range(len(TABLE)), BOUNDS, SPEC.block_bytes, 64 * 1024)
        slots = self.consumer.grant("p", len(spans))
        assert slots is not None and len(slots) == len(spans) == 2
        handle = Handle(
            handle_id=self.consumer.next_handle_id(),
            producer_boot_id="p",
            consumer_boot_id="d",
            model_fingerprint="f",
            request_id="r",
            attempt=0,
            ring_name=self.consumer.ring_name("p"),
            slots=slots,
            num_tokens=40,
            num_blocks=len(TABLE),
        )
        self.tables.open(handle.handle_id, TABLE)
        self.consumer.expect(handle, spans)
        return handle, spans

    def push(self, handle: Handle, span: MessageSpan) -> None:
        blocks, start = TABLE[span.block_lo : span.block_hi], trailer_start(handle.handle_id, span)
        seal = Seal(handle_id=handle.handle_id, group=span.group, message_idx=span.message_idx, start=start)

        def fill(out: memoryview) -> None:
            self.source.pack(span.layers, blocks, out)

        def fill_device(out: torch.Tensor) -> None:
            self.packer.pack(span.layers, blocks, seal, out)

        job = PushJob(handle=handle, span=span, fill=fill_device if self.is_in_device else fill, is_sealed=self.is_in_device)
        self.producer.push(job).result(5)

    def land(self, num_messages: int) -> list[LandedMessage]:
        return self.until(lambda landed: len(landed) >= num_messages)

    def until(self, is_enough: Callable[[list[LandedMessage]], bool]) -> list[LandedMessage]:
        landed: list[LandedMessage] = []
        deadline_s = time.monotonic() + 10
        while not is_enough(landed):
            assert time.monotonic() < deadline_s, landed
            landed += self.lander.land(self.consumer, self.tables)
            time.sleep(0.0005)
        return landed

    def close(self) -> None:
        self.producer.close()
        self.consumer.close()


HAS_CARD = torch.cuda.is_available()
IN_DEVICE = pytest.param(True, id="device", marks=pytest.mark.skipif(HAS_CARD, reason="loopback writes the host's memory alone"))


@pytest.fixture(params=[pytest.param(False, id="host"), IN_DEVICE])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    made = Pair(torch.device("cuda" if HAS_CARD else "cpu"), request.param)
    yield made
    made.close()


def test_what_was_packed_lies_in_the_blocks_of_the_table(pair: Pair) -> None:
    handle, spans = pair.offer()
    for span in spans:
        pair.push(handle, span)
    landed = pair.land(2)
    assert sorted(one.message_idx for one in landed) == [0, 1] and all(one.error is None for one in landed)
    assert sum(one.num_bytes for one in landed) == 4 * 3 * SPEC.block_bytes
    expected = torch.zeros_like(pair.source.tensor)
    expected[:, TABLE] = pair.source.tensor[:, TABLE]
    assert torch.equal(pair.pool.tensor.cpu(), expected)
    counts = pair.consumer.counts()
    assert (counts.num_free_slots, counts.num_open_handles) == (4, 0)


def test_nobody_is_told_before_the_device_has_answered(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    handle, spans = pair.offer()
    pair.push(handle, spans[0])
    is_over = LandingMessage.is_over
    monkeypatch.setattr(LandingMessage, "is_over", lambda self: False)
    for _ in range(20):
        assert pair.lander.land(pair.consumer, pair.tables) == ()
    assert len(pair.lander._under_way) == 1, "launched once"
    assert pair.consumer.missing(handle.handle_id) == (0, 1) and pair.consumer.counts().num_free_slots == 2
    monkeypatch.setattr(LandingMessage, "is_over", is_over)
    (landed,) = pair.land(1)
    assert landed.message_idx == 0 and pair.consumer.missing(handle.handle_id) == (1,)


def test_a_wrong_message_is_an_error_and_its_rewrite_lands(pair: Pair) -> None:
    handle, spans = pair.offer()
    ring = pair.consumer._landing._current["p"]
    pair.push(handle, spans[0])
    slot_bytes: Any = ring.region.slice(handle.slots[0] * (64 * 1024 + 64), 8)
    slot_bytes[0] ^= 0x10
    (landed,) = pair.land(1)
    assert landed.error is not None and landed.error.code == "kv_corrupt"
    assert pair.consumer.counts().counters["messages_corrupt"] == 1
    for span in spans:
        pair.push(handle, span)
    landed_again = pair.land(2)
    assert all(one.error is None for one in landed_again)
    assert torch.equal(pair.pool.tensor[:, TABLE].cpu(), pair.source.tensor[:, TABLE])


def test_a_hint_without_its_message_is_an_error(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    handle, spans = pair.offer()
    pair.push(handle, spans[0])
    ring = pair.consumer._landing._current["p"]
    for awaited in ring.awaited.values():
        for at in range(64):
            awaited.message[layout.trailer_offset(awaited.span.num_bytes) + at] = 0
    launched, launch = list[object](), pair.lander._kv.launch

    def counted(*what: Any) -> LandingMessage:
        launched.append(what)
        return launch(*what)

    monkeypatch.setattr(pair.lander._kv, "launch", counted)
    (landed,) = pair.land(1)
    assert landed.error is not None and landed.message_idx == 0
    assert bool(launched) == pair.is_in_device, "the host's memory is looked at first; a device's by its kernel alone"
    assert pair.consumer.missing(handle.handle_id) == (0, 1)


def test_a_withdrawn_handle_is_not_written_any_more_and_its_verdicts_are_void(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    handle, spans = pair.offer()
    pair.push(handle, spans[0])
    is_over = LandingMessage.is_over
    monkeypatch.setattr(LandingMessage, "is_over", lambda self: False)
    assert pair.lander.land(pair.consumer, pair.tables) == ()
    pair.push(handle, spans[1])
    pair.tables.close(handle.handle_id)
    pair.pool.tensor.zero_()  # whoever got the blocks: queued behind what was launched
    assert pair.lander.land(pair.consumer, pair.tables) == ()
    pair.consumer.abort(handle.handle_id)
    monkeypatch.setattr(LandingMessage, "is_over", is_over)
    for _ in range(3):
        assert pair.lander.land(pair.consumer, pair.tables) == ()
    assert not pair.pool.tensor.any() and not pair.lander._under_way
    assert pair.consumer.counts().num_quarantined_slots == 2
    pair.consumer.fence(handle.handle_id)
    assert pair.consumer.counts().num_free_slots == 4


@pytest.mark.skipif(HAS_CARD, reason="loopback writes the host's memory alone")
def test_a_message_in_a_devices_memory_is_due_when_it_is_announced_and_a_pull_replaces_a_lost_notification() -> None:
    pair = Pair(torch.device("cpu"), True, ScriptedFaults({0: Fault(drops_notification=True)}))
    try:
        handle, spans = pair.offer()
        for span in spans:
            pair.push(handle, span)
        (landed,) = pair.land(1)
        assert landed.message_idx == 1 and pair.consumer.missing(handle.handle_id) == (0,)
        for _ in range(5):
            assert pair.lander.land(pair.consumer, pair.tables) == ()
        pair.consumer.pulled(handle.handle_id, 0)
        pair.push(handle, spans[0])
        (landed,) = pair.land(1)
        assert landed.error is None and pair.consumer.missing(handle.handle_id) == ()
        assert torch.equal(pair.pool.tensor[:, TABLE], pair.source.tensor[:, TABLE])
    finally:
        pair.close()
