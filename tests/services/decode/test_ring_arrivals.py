"""The promise of ring arrivals to the loop: once a handle is withdrawn, nothing of it is being written or will be."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from duomo.config import TransferSection
from duomo.engine.kv_cache import KvCache, kv_spec
from duomo.wire.messages import StartDecode, WaveAnnounced
from duomo.wire.values import PeerAddress
from services.decode.arrivals import HandoffTerms, LandedMessage
from services.decode.landers import CpuLander
from services.decode.leg import Leg
from services.decode.producer_rings import ProducerRings
from services.decode.producers import Producers
from services.decode.ring_arrivals import RingArrivals
from services.kv_transfer.agent import PushJob, TransferAgent
from services.kv_transfer.transport_loopback import LoopbackHub
from tests.services.decode.scripted_peers import BLOCK_TOKENS, GREEDY, GROUP_BOUNDS, ids, model


class HeldCache(KvCache):
    """Stands still in scatter until told to go on."""

    def __init__(self) -> None:
        super().__init__(kv_spec(model().config, BLOCK_TOKENS), 8)
        self.entered, self.may_go_on = threading.Event(), threading.Event()

    def scatter(self, layers: range, blocks: Sequence[int], data: memoryview, heads: range | None = None) -> None:
        self.entered.set()
        assert self.may_go_on.wait(60)
        super().scatter(layers, blocks, data, heads)


def granted_leg(blocks: list[int]) -> Leg:
    """Announced by producer "p", holding its blocks."""
    common = {"request_id": "r", "attempt": 0, "traceparent": "", "remaining_s": 9.0}
    start = StartDecode(
        **common,  # type: ignore[arg-type]  # one dict for both
        prompt_ids=ids(len(blocks) * BLOCK_TOKENS),
        sampling=GREEDY,
        choices=(0,),
        prefill=PeerAddress(replica_id="p", boot_id="p", address=""),
    )
    leg = Leg.of(start, leg_id=1, gateway="g", now_s=0.0, max_preemptions=2)
    leg.announced = WaveAnnounced(**common, wave_id=1, num_tokens=leg.num_tokens, group_bounds=GROUP_BOUNDS)  # type: ignore[arg-type]  # one dict for both
    leg.blocks = blocks
    return leg


def test_withdrawing_a_handle_waits_for_its_message_that_is_being_scattered() -> None:
    """The loop frees blocks right after withdraw(): were the scatter still to come, it would go into somebody else's blocks."""
    hub, section = LoopbackHub(), TransferSection(slot_bytes=64 * 1024)
    consumer = TransferAgent("d", hub.agent("d"), section, num_send_slots=1)
    producer = TransferAgent("p", hub.agent("p"), section, num_send_slots=4)
    cache = HeldCache()
    terms = HandoffTerms(
        boot_id="d",
        model_fingerprint="f",
        num_layers=GROUP_BOUNDS[-1],
        num_experts=32,
        block_bytes=cache.spec.block_bytes,
        slot_bytes=section.slot_bytes,
        write_timeout_s=5.0,
        stall_timeout_s=5.0,
    )
    rings = ProducerRings(Producers(), consumer, 4, 5.0, None, lambda: None)
    arrivals = RingArrivals(consumer, CpuLander(cache), rings, terms)
    leg = granted_leg([3, 5])
    try:
        assert arrivals.offer(leg) is None, "no ring, no handle"
        producer.attach_ring("d", consumer.open_ring("p", 4))
        handle = arrivals.offer(leg)
        assert handle is not None and len(leg.spans) == 4 and handle.first_block == 0
        for span in leg.spans[: len(handle.slots)]:
            producer.push(PushJob(handle=handle, span=span, fill=lambda out: out.__setitem__(slice(None), b"\1" * len(out)))).result(60)
        landed: list[LandedMessage] = []
        step = threading.Thread(target=lambda: landed.extend(arrivals.land()))
        withdraw = threading.Thread(target=arrivals.withdraw, args=(handle.handle_id,))
        step.start()
        assert cache.entered.wait(60)
        withdraw.start()
        withdraw.join(0.2)
        assert withdraw.is_alive(), "withdraw() returned while a message was being scattered"
        cache.may_go_on.set()
        withdraw.join(60)
        step.join(60)
        assert not withdraw.is_alive() and len(landed) in (1, 2)
        cache.tensor.zero_()  # whoever got the blocks
        assert arrivals.land() == () and not cache.tensor.any()
    finally:
        cache.may_go_on.set()
        producer.close()
        consumer.close()
