"""The decode worker's promise to the loop: once a handle is forgotten, nothing of it is being written or will be."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from duomo.config import TransferSection
from duomo.engine.kv_cache import KvCache, kv_spec
from duomo.wire.messages import Handle
from services.decode.worker import DecodeWorker, LandedMessage
from services.kv_transfer.agent import PushJob, TransferAgent
from services.kv_transfer.layout import messages
from services.kv_transfer.transport_loopback import LoopbackHub
from tests.services.decode.scripted_peers import BLOCK_TOKENS, GROUP_BOUNDS, model


class HeldCache(KvCache):
    """Stands still in scatter until told to go on."""

    def __init__(self) -> None:
        super().__init__(kv_spec(model().config, BLOCK_TOKENS), 8)
        self.entered, self.may_go_on = threading.Event(), threading.Event()

    def scatter(self, layers: range, blocks: Sequence[int], data: memoryview) -> None:
        self.entered.set()
        assert self.may_go_on.wait(5)
        super().scatter(layers, blocks, data)


def test_forgetting_a_handle_waits_for_its_message_that_is_being_scattered() -> None:
    """The loop frees blocks right after forget(): were the scatter still to come, it would go into somebody else's blocks."""
    hub, section = LoopbackHub(), TransferSection(slot_bytes=64 * 1024)
    consumer = TransferAgent("d", hub.agent("d"), section, num_send_slots=1)
    producer = TransferAgent("p", hub.agent("p"), section, num_send_slots=4)
    worker = DecodeWorker(model(), num_blocks=8, block_tokens=BLOCK_TOKENS, torch_threads=1, agent=consumer)
    worker.cache = cache = HeldCache()
    try:
        producer.attach_ring("d", consumer.open_ring("p", 4))
        spans = messages(range(2), GROUP_BOUNDS, worker.block_bytes, section.slot_bytes)
        slots = consumer.grant("p", len(spans))
        assert slots is not None and len(spans) == 4
        handle = Handle(
            handle_id=consumer.next_handle_id(),
            producer_boot_id="p",
            consumer_boot_id="d",
            model_fingerprint="f",
            request_id="r",
            attempt=0,
            ring_name=consumer.ring_name("p"),
            slots=slots,
            num_tokens=2 * BLOCK_TOKENS,
            num_blocks=2,
        )
        worker.expect(handle.handle_id, [3, 5])
        consumer.expect(handle, spans)
        for span in spans[:2]:
            producer.push(PushJob(handle=handle, span=span, fill=lambda out: out.__setitem__(slice(None), b"\1" * len(out)))).result(5)
        landed: list[LandedMessage] = []
        step = threading.Thread(target=lambda: landed.extend(worker.land()))
        forget = threading.Thread(target=worker.forget, args=(handle.handle_id,))
        step.start()
        assert cache.entered.wait(5)
        forget.start()
        forget.join(0.2)
        assert forget.is_alive(), "forget() returned while a message was being scattered"
        cache.may_go_on.set()
        forget.join(5)
        step.join(5)
        assert not forget.is_alive() and len(landed) in (1, 2)
        consumer.abort(handle.handle_id)
        cache.tensor.zero_()  # whoever got the blocks
        assert worker.land() == () and not cache.tensor.any()
    finally:
        cache.may_go_on.set()
        producer.close()
        consumer.close()
