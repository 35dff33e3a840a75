"""Two producers and two consumers with small rings, random delays, cancels and lost notifications: nobody waits for ever."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from duomo.config import TransferSection
from duomo.wire.values import Handle
from services.kv_transfer import layout
from services.kv_transfer.agent import PushJob, TransferAgent
from services.kv_transfer.faults import SeededFaults
from services.kv_transfer.layout import MessageSpan
from services.kv_transfer.transport_loopback import LoopbackHub
from tests.services.kv_transfer.looked_clock import LookedClock

SECTION = TransferSection(slot_bytes=64 * 1024)


@dataclass
class Lane:
    """One producer's prompts for one consumer: their numbers of blocks wait in line, one handle or more is under way."""

    producer: TransferAgent
    consumer: TransferAgent
    waiting: deque[int]
    spans: dict[int, tuple[MessageSpan, ...]] = field(default_factory=dict)
    left: dict[int, set[int]] = field(default_factory=dict)

    def grant(self, draw: random.Random) -> None:
        while self.waiting:
            spans = layout.messages(range(self.waiting[0]), (0, 1, 3), 4096, SECTION.slot_bytes)
            slots = self.consumer.grant(self.producer.boot_id, draw.randint(1, len(spans)))
            if slots is None:
                return
            num_blocks = self.waiting.popleft()
            handle = Handle(
                handle_id=self.consumer.next_handle_id(),
                producer_boot_id=self.producer.boot_id,
                consumer_boot_id=self.consumer.boot_id,
                model_fingerprint="",
                request_id="",
                attempt=0,
                ring_name=self.consumer.ring_name(self.producer.boot_id),
                slots=slots,
                num_tokens=num_blocks * 16,
                num_blocks=num_blocks,
            )
            self.consumer.expect(handle, spans)
            self.spans[handle.handle_id], self.left[handle.handle_id] = spans, {span.message_idx for span in spans}
            for span in spans:
                self.producer.push(PushJob(handle=handle, span=span, fill=filler(handle.handle_id, span)))
            if draw.random() < 0.2:
                self.cancel(handle.handle_id)

    def cancel(self, handle_id: int) -> None:
        del self.left[handle_id]
        self.consumer.abort(handle_id)
        self.producer.cancel(handle_id).add_done_callback(lambda _: self.consumer.fence(handle_id))


def filler(handle_id: int, span: MessageSpan) -> Callable[[memoryview], None]:
    def fill(place: memoryview) -> None:
        np.frombuffer(place, dtype=np.uint8)[:] = (handle_id + span.message_idx) % 251

    return fill


@pytest.mark.parametrize("seed", range(3))
def test_every_prompt_lands_or_is_cancelled_and_all_slots_come_back(seed: int) -> None:
    draw = random.Random(seed)
    clock = LookedClock()
    hub = LoopbackHub(SeededFaults(seed=seed, max_delay_s=0.004, chance_drop_notification=0.3, chance_announce_early=0.2), clock=clock)
    producers = [TransferAgent(f"p{i}", hub.agent(f"kv-p{i}"), SECTION, num_send_slots=2) for i in range(2)]
    consumers = [TransferAgent(f"d{i}", hub.agent(f"kv-d{i}"), SECTION, now_s=clock) for i in range(2)]
    lanes = [Lane(p, d, deque(draw.randint(1, 40) for _ in range(8))) for p in producers for d in consumers]
    for lane in lanes:
        lane.producer.attach_ring(lane.consumer.boot_id, lane.consumer.open_ring(lane.producer.boot_id, draw.randint(1, 4)))
    deadline_s = time.monotonic() + 100
    try:
        while any(lane.waiting or lane.left for lane in lanes):
            assert time.monotonic() < deadline_s, [(lane.waiting, lane.left, lane.consumer.counts()) for lane in lanes]
            for lane in lanes:
                lane.grant(draw)
            for consumer in consumers:
                for landed in consumer.poll():
                    handle_id, message = landed.handle_id, landed.span.message_idx
                    assert landed.error is None and set(landed.payload) == {(handle_id + message) % 251}
                    (lane,) = (lane for lane in lanes if handle_id in lane.left)
                    consumer.release(handle_id, message)
                    lane.producer.credit(handle_id, message)
                    lane.left[handle_id].discard(message)
                    if not lane.left[handle_id]:
                        del lane.left[handle_id]
                        lane.producer.cancel(handle_id)
            time.sleep(0.0005)
        while any(consumer.counts().num_open_handles for consumer in consumers):
            assert time.monotonic() < deadline_s
            time.sleep(0.001)
        for counts in (consumer.counts() for consumer in consumers):
            assert (counts.num_free_slots, counts.num_quarantined_slots, counts.num_retired_rings) == (counts.num_slots, 0, 0)
    finally:
        for agent in (*producers, *consumers):
            agent.close()
