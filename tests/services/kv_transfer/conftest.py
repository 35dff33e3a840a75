"""A producer and a consumer agent on one loopback hub, and a handle taken from grant to landed as the two services do it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import pytest

from duomo.config import TransferSection
from duomo.wire.values import Handle
from services.kv_transfer import layout
from services.kv_transfer.agent import PushJob, PushResult, TransferAgent
from services.kv_transfer.faults import FaultPlan
from services.kv_transfer.layout import MessageSpan
from services.kv_transfer.transport_loopback import LoopbackHub
from services.kv_transfer.transport_nixl import NixlTransport
from tests.services.kv_transfer.looked_clock import LookedClock
from tests.services.kv_transfer.nixl_peer import allocate_on
from tests.services.kv_transfer.nixl_rig import SECTION, Process

SLOT_BYTES = 64 * 1024
BLOCK_BYTES = 3000
BOUNDS = (0, 2, 5, 8)


LOOK_S = 0.0005
PULL_LOOKS = 600  # without a message, before those that are missing are pulled

Offer = tuple[Handle, tuple[MessageSpan, ...]]
# A writer that gives a write up soon, where the test is of that.
IMPATIENT = TransferSection(slot_bytes=SLOT_BYTES, write_timeout_s=0.3)


@dataclass(eq=False)
class Pair:
    """`producer` writes to `consumer`; nothing between them but method calls, so a test decides what is told when.

    clock: the medium's and the consumer's, which a stall of this machine does not move.
    """

    faults: FaultPlan | None = None
    num_slots: int = 8
    section: TransferSection = field(default_factory=lambda: TransferSection(slot_bytes=SLOT_BYTES, write_timeout_s=60.0))
    producer_boot_id: str = "p-boot"
    clock: LookedClock = field(default_factory=LookedClock)

    def __post_init__(self) -> None:
        self.hub = LoopbackHub(self.faults, clock=self.clock)
        self.consumer = TransferAgent("d-boot", self.hub.agent("kv-d"), self.section, now_s=self.clock)
        self.start_producer(self.producer_boot_id)

    def start_producer(self, boot_id: str) -> None:
        """A (new) producer process."""
        self.producer_boot_id = boot_id
        self.producer = TransferAgent(boot_id, self.hub.agent(f"kv-{boot_id}"), self.section, num_send_slots=4)
        self.producer.attach_ring("d-boot", self.consumer.open_ring(boot_id, self.num_slots))

    @staticmethod
    def content(handle_id: int, span: MessageSpan) -> bytes:
        """The KV of a message: the same bytes wherever it is asked for."""
        return np.random.default_rng((handle_id, span.message_idx)).bytes(span.num_bytes)

    def offer(self, num_blocks: int, want_slots: int = 3) -> tuple[Handle, tuple[MessageSpan, ...]]:
        """A handle from grant to expect."""
        spans = layout.messages(range(num_blocks), BOUNDS, BLOCK_BYTES, SLOT_BYTES)
        slots = self.consumer.grant(self.producer_boot_id, want_slots)
        assert slots is not None
        handle = Handle(
            handle_id=self.consumer.next_handle_id(),
            producer_boot_id=self.producer_boot_id,
            consumer_boot_id="d-boot",
            model_fingerprint="f",
            request_id="r",
            attempt=0,
            ring_name=self.consumer.ring_name(self.producer_boot_id),
            slots=slots,
            num_tokens=num_blocks * 16,
            num_blocks=num_blocks,
        )
        self.consumer.expect(handle, spans)
        return handle, spans

    def job(self, handle: Handle, span: MessageSpan) -> PushJob:
        def fill(place: memoryview) -> None:
            place[:] = self.content(handle.handle_id, span)

        return PushJob(handle=handle, span=span, fill=fill)

    def push(self, handle: Handle, spans: Sequence[MessageSpan]) -> list[Future[PushResult]]:
        return [self.producer.push(self.job(handle, span)) for span in spans]

    def until_in_flight(self) -> None:
        """Wait for the writer thread to have posted a write."""
        deadline_s = time.monotonic() + 60
        while self.producer.counts().num_writes_in_flight == 0:
            assert time.monotonic() < deadline_s
            time.sleep(0.001)

    def land(self, *offers: Offer, timeout_s: float = 20.0, pulls: bool = True) -> list[str]:
        """Poll, verify against content(), release, credit until all is here; missing or corrupt messages are pulled.

        Returns the codes of the errors on the way. timeout_s: in looks.
        """
        left = {(handle.handle_id, span.message_idx): (handle, span) for handle, spans in offers for span in spans}
        errors: list[str] = []
        for look in itertools.count(1):
            if not left:
                break
            assert look * LOOK_S < timeout_s, f"{sorted(left)} did not land; {self.consumer.counts()} {self.producer.counts()}"
            again: list[tuple[int, int]] = []
            for landed in self.consumer.poll():
                key = landed.handle_id, landed.span.message_idx
                if landed.error is not None:
                    errors.append(landed.error.code)
                    again.append(key)
                    continue
                assert bytes(landed.payload) == self.content(landed.handle_id, landed.span), "verified, but not what was sent"
                del left[key]
                self.consumer.release(*key)
                self.producer.credit(*key)
            if look % PULL_LOOKS == 0:
                for handle, _ in offers:
                    again += [(handle.handle_id, m) for m in self.consumer.missing(handle.handle_id)[: len(handle.slots)]]
            for handle, span in (left[key] for key in dict.fromkeys(again) if pulls and key in left):
                self.push(handle, [span])
            time.sleep(LOOK_S)
        return errors

    def assert_idle(self) -> None:
        counts = self.consumer.counts()
        assert (counts.num_free_slots, counts.num_quarantined_slots, counts.num_open_handles) == (counts.num_slots, 0, 0), counts

    def close(self) -> None:
        self.producer.close()
        self.consumer.close()


@pytest.fixture
def pair_of() -> Iterator[Callable[..., Pair]]:
    """Makes pairs; closes them when the test ends."""
    pairs: list[Pair] = []

    def make(*arguments: object, **options: object) -> Pair:
        pairs.append(Pair(*arguments, **options))  # type: ignore[arg-type]  # a test's options, checked by the dataclass
        return pairs[-1]

    yield make
    for pair in pairs:
        pair.close()


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    started: list[Process] = []
    yield started
    for process in started:
        process.close()


@pytest.fixture(params=["", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)], ids=["host", "tensor", "card"])
def device(request: pytest.FixtureRequest) -> str:
    """Where this process has its memory: "" is the host's, and so is the cpu's, which is used as a device's."""
    return str(request.param)


@pytest.fixture
def agent(request: pytest.FixtureRequest) -> Iterator[TransferAgent]:
    """In the host's memory, unless the test goes through devices."""
    device = request.getfixturevalue("device") if "device" in request.fixturenames else ""
    transport = NixlTransport(f"kv-here-{time.monotonic_ns()}", SECTION)
    agent = TransferAgent(f"here-{time.monotonic_ns()}", transport, SECTION, num_send_slots=4, allocate=allocate_on(device))
    assert agent.transport_name == "nixl/UCX"
    yield agent
    agent.close()
