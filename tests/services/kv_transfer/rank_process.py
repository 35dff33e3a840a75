"""One rank of a replica in a process of its own, for test_rank_handoff.py: a KV cache of its heads, and a transfer agent on NIXL.

serve() obeys (name of a method of Rank, its arguments) from a pipe and answers (True, result) or (False, traceback). What the ranks do not
know of each other is what the wire would carry: RingOffered and Handle as they are, and whose rank they are.
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
import torch
from numpy.typing import NDArray

from duomo.config import TransferSection
from duomo.engine.kv_cache import KvCache, KvSpec
from duomo.wire.messages import RingOffered
from duomo.wire.values import Handle
from services.decode.landers import CpuLander, OpenTables
from services.kv_transfer import layout
from services.kv_transfer.agent import PushJob, SlotCounts, TransferAgent
from services.kv_transfer.head_slices import HeadSlice, head_slices
from services.kv_transfer.transport_nixl import NixlTransport

SECTION = TransferSection(slot_bytes=64 * 1024, ucx_net_devices="lo")
BLOCK_TOKENS, HEAD_DIM, BOUNDS = 16, 24, (0, 2, 5)
HEAD_BYTES = BLOCK_TOKENS * HEAD_DIM * 4
RING_SLOTS = 4  # a handle is granted two of them: most have more messages
POOL_BLOCKS = 20
UNWRITTEN = 0x7FC0_BAD0


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt whose KV passes from producer_tp ranks to consumer_tp ranks; the first first_block of its blocks decode has."""

    num_heads: int
    producer_tp: int
    consumer_tp: int
    num_blocks: int
    first_block: int
    seed: int

    def whole_kv(self) -> NDArray[np.uint32]:
        """What a rank with all heads would hold: any bits, [layer][block][k, v][kv head][block token][head dim]."""
        shape = (BOUNDS[-1], self.num_blocks, 2, self.num_heads, BLOCK_TOKENS, HEAD_DIM)
        return np.random.default_rng(self.seed).integers(0, 2**32, shape, dtype=np.uint32)

    def slices(self, *, producer: int | None = None, consumer: int | None = None) -> list[HeadSlice]:
        """The pairs of one rank, as it finds them alone."""
        parts = head_slices(self.num_heads, self.producer_tp, self.consumer_tp)
        return [part for part in parts if producer in (None, part.producer_rank) and consumer in (None, part.consumer_rank)]


class Rank:
    """Rank `rank` of a prefill or of a decode replica."""

    def __init__(self, boot_id: str, rank: int) -> None:
        transport = NixlTransport(f"kv-{boot_id}", SECTION)
        assert transport.transport_name == "nixl/UCX"
        self.rank = rank
        self.agent = TransferAgent(boot_id, transport, SECTION, num_send_slots=4)
        self.producer_ranks: dict[int, int] = {}
        self.num_left: dict[int, int] = {}

    def close(self) -> None:
        self.agent.close()

    def hold(self, heads: Sequence[int], prompt: Prompt, is_computed: bool) -> None:
        """A pool of these heads. Some of its blocks are the prompt's: written by the engine, or by nobody yet."""
        spec = KvSpec(num_layers=BOUNDS[-1], num_kv_heads=len(heads), head_dim=HEAD_DIM, block_tokens=BLOCK_TOKENS)
        self.cache = KvCache(spec, POOL_BLOCKS)
        self.tables, self.lander = OpenTables(), CpuLander(self.cache)
        self.table = np.random.default_rng((prompt.seed, self.rank, is_computed)).permutation(POOL_BLOCKS)[: prompt.num_blocks].tolist()
        pool = self.words()
        pool[:] = UNWRITTEN
        if is_computed:
            pool[:, self.table] = prompt.whole_kv()[:, :, :, list(heads)]

    def words(self) -> NDArray[np.uint32]:
        """The pool's bits, [layer][block of the pool][k, v][kv head][block token][head dim]."""
        bits: NDArray[np.uint32] = self.cache.tensor.numpy().view(np.uint32)
        return bits

    def held(self) -> tuple[list[int], NDArray[np.uint32]]:
        """The prompt's block table, and the pool."""
        return self.table, self.words()

    def counts(self) -> SlotCounts:
        return self.agent.counts()

    # a decode rank

    def open_ring(self, producer_boot_id: str) -> RingOffered:
        return self.agent.open_ring(producer_boot_id, RING_SLOTS)

    def grant(self, prompt: Prompt, producer_boot_ids: Sequence[str]) -> list[tuple[int, Handle]]:
        """(producer rank, handle) for every pair of this rank."""
        return [
            (part.producer_rank, self._grant(prompt, part, producer_boot_ids[part.producer_rank]))
            for part in prompt.slices(consumer=self.rank)
        ]

    def _grant(self, prompt: Prompt, part: HeadSlice, producer: str) -> Handle:
        blocks = range(prompt.first_block, prompt.num_blocks)
        spans = layout.messages(blocks, BOUNDS, part.block_bytes(HEAD_BYTES), SECTION.slot_bytes, part.in_consumer.heads)
        slots = self.agent.grant(producer, len(spans))
        assert slots is not None
        handle = Handle(
            handle_id=self.agent.next_handle_id(),
            producer_boot_id=producer,
            consumer_boot_id=self.agent.boot_id,
            model_fingerprint="f",
            request_id="r",
            attempt=0,
            ring_name=self.agent.ring_name(producer),
            slots=slots,
            num_tokens=prompt.num_blocks * BLOCK_TOKENS,
            num_blocks=prompt.num_blocks,
            first_block=prompt.first_block,
        )
        self.tables.open(handle.handle_id, self.table)
        self.agent.expect(handle, spans)
        self.producer_ranks[handle.handle_id], self.num_left[handle.handle_id] = part.producer_rank, len(spans)
        return handle

    def land(self) -> tuple[list[tuple[int, int, int]], int]:
        """([(producer rank, handle, message) that landed, verified, since the last call], how many are still to come)."""
        landed = []
        for message in self.lander.land(self.agent, self.tables):
            assert message.error is None, message.error
            self.num_left[message.handle_id] -= 1
            landed.append((self.producer_ranks[message.handle_id], message.handle_id, message.message_idx))
        return landed, sum(self.num_left.values())

    # a prefill rank

    def attach_ring(self, consumer_boot_id: str, offer: RingOffered) -> None:
        self.agent.attach_ring(consumer_boot_id, offer)

    def push(self, prompt: Prompt, handle: Handle, consumer_rank: int) -> int:
        """Push all groups of a pair, in order; how many messages."""
        (part,) = prompt.slices(producer=self.rank, consumer=consumer_rank)
        blocks = range(handle.first_block, handle.num_blocks)
        spans = layout.messages(blocks, BOUNDS, part.block_bytes(HEAD_BYTES), SECTION.slot_bytes, part.in_producer.heads)
        for span in spans:
            fill = functools.partial(self._fill, span)
            self.agent.push(PushJob(handle=handle, span=span, fill=fill))
        return len(spans)

    def _fill(self, span: layout.MessageSpan, place: memoryview) -> None:
        assert self.cache.pack(span.layers, self.table[span.block_lo : span.block_hi], place, span.heads) == span.num_bytes

    def credit(self, handle_id: int, message_idx: int) -> None:
        self.agent.credit(handle_id, message_idx)

    def end(self, handle_id: int) -> None:
        """Returns when no write of the handle is in flight."""
        self.agent.cancel(handle_id).result(60)


def serve(pipe: Connection, boot_id: str, rank: int) -> None:
    """Until the pipe says "close"."""
    torch.set_num_threads(1)
    process = Rank(boot_id, rank)
    pipe.send((True, None))
    what = ""
    while what != "close":
        what, arguments = pipe.recv()
        try:
            pipe.send((True, getattr(process, what)(*arguments)))
        except Exception:  # the test is told, and fails
            pipe.send((False, traceback.format_exc()))
