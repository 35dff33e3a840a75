"""Owns the pushing of KV into landing rings: messages of a group out, credits and pulls in, fences at the end. Knows no policy and no wave.

A leg's blocks are read, by the agent's writer thread or a device, until every push ended (Handoff.num_in_flight). Its handoff is
**terminal** once the agent says that no write is or will be in flight; a message may still be packed then. A message stays **leased** (may
be pulled again) until D has released it.
"""

from __future__ import annotations

import asyncio
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from duomo.errors import DuomoError, TransferError
from duomo.telemetry.handoff_histograms import HANDOFF_RATE
from duomo.telemetry.tracing import Tracing
from duomo.wire.messages import GroupLanded, HandleOffered, PullKv, TransferFenced
from duomo.wire.values import Handle
from services.kv_transfer import layout
from services.kv_transfer.agent import PushJob, PushResult, TransferAgent
from services.kv_transfer.layout import MessageSpan
from services.prefill.decode_peers import DecodePeers
from services.prefill.group_push import GroupPush
from services.prefill.leg import Handoff, Leg
from services.prefill.pending import Pending
from services.prefill.worker import WaveWorker


class RingHandoffs:
    """The producer side of all handles of this replica.

    worker: its pack() writes a message from the KV cache, in the writer thread. on_change: a leg's handoff moved (a push ended,
    a message landed, it became terminal). on_failed: a push failed for good. counters: the replica's, which its report carries.
    """

    sends = True

    def __init__(
        self,
        agent: TransferAgent,
        peers: DecodePeers,
        worker: WaveWorker,
        tracing: Tracing,
        on_change: Callable[[Leg], None],
        on_failed: Callable[[Leg, TransferError], None],
        counters: Counter[str],
    ) -> None:
        self._agent = agent
        self._peers = peers
        self._worker = worker
        self._tracing = tracing
        self._on_change = on_change
        self._on_failed = on_failed
        self._counters = counters
        self._legs: dict[int, Leg] = {}

    @property
    def num_open(self) -> int:
        return len(self._legs)

    def reaches(self, consumer_boot_id: str) -> bool:
        return True

    def accept(self, leg: Leg, handle: Handle) -> bool:
        """Cut what is to be sent into messages, as D did. False where its ring is not attached, or its blocks are not the prompt's."""
        slot_bytes = self._peers.slot_bytes(handle.consumer_boot_id, handle.ring_name)
        if slot_bytes is None or not 0 <= handle.first_block <= handle.num_blocks:
            return False
        to_send = range(handle.first_block, handle.num_blocks)
        spans = layout.messages(to_send, self._worker.group_bounds, self._worker.block_bytes, slot_bytes)
        leg.handoff = Handoff(handle=handle, spans=spans, unlanded={span.message_idx for span in spans})
        self._legs[handle.handle_id] = leg
        return True

    def refuse(self, offer: HandleOffered) -> None:
        """A grant that nobody wants any more. It may be one of an earlier socket, whose last write has not ended: fenced when it has."""
        loop = asyncio.get_running_loop()
        fenced: Future[None] = self._agent.cancel(offer.handle.handle_id)
        fenced.add_done_callback(lambda _: _call_soon(loop, self._fence, offer.handle, offer.traceparent))

    def groups_launched(self, legs: Sequence[Leg], groups: Sequence[tuple[int, Pending[float]]]) -> None:
        """Push already what the device will pack as soon as each group ends, without a word from the host. But not while messages wait for
        their turn: they would stand behind these, with the writer and in the device's stream, until the groups end."""
        if self._worker.packs_ahead and not self._agent.num_waiting():
            for group, computed in groups:
                for leg in legs:
                    self._push_group(leg, group, computed).begun.add(group)

    def group_computed(self, leg: Leg, group: int) -> None:
        """Push every message of a computed group, unless it was when the group was launched. The writer thread packs and writes while the
        next group computes."""
        assert leg.handoff is not None
        if group not in leg.handoff.begun:
            self._push_group(leg, group, None)

    def landed(self, message: GroupLanded) -> None:
        """D released a message: its slot is a credit again, and the message is no longer leased."""
        leg = self._legs.get(message.handle_id)
        self._agent.credit(message.handle_id, message.message_idx)
        if leg is not None and leg.handoff is not None:
            leg.handoff.unlanded.discard(message.message_idx)
            self._on_change(leg)

    def pull(self, message: PullKv) -> bool:
        """Write a message again; whether it is still leased. A pull may overtake the end of its own push: then it waits for it."""
        leg = self._legs.get(message.handle_id)
        handoff = leg.handoff if leg is not None else None
        if leg is None or handoff is None or handoff.is_abandoned or message.message_idx not in handoff.unlanded:
            return False
        if message.message_idx in handoff.pushed:
            handoff.pushed.discard(message.message_idx)
            span = handoff.spans[message.message_idx]
            self._push(leg, handoff, span, GroupPush(group=span.group, num_left=1, is_rewrite=True))
        else:
            handoff.pulls.append(message)
        return True

    def close(self, leg: Leg) -> None:
        """Stop pushing. Calls on_change once nothing reads the leg's blocks and, unless everything landed, D was sent the fence."""
        handoff = leg.handoff
        if handoff is None or handoff.is_abandoned:
            return
        handoff.is_abandoned = True
        handle_id = handoff.handle.handle_id
        loop = asyncio.get_running_loop()
        fenced: Future[None] = self._agent.cancel(handle_id)
        fenced.add_done_callback(lambda _: _call_soon(loop, self._fenced, leg, handoff))

    def _push_group(self, leg: Leg, group: int, computed: Pending[float] | None) -> Handoff:
        handoff = leg.handoff
        assert handoff is not None and not handoff.is_abandoned
        spans = [span for span in handoff.spans if span.group == group]
        push = GroupPush(group=group, num_left=len(spans))
        for span in spans:
            self._push(leg, handoff, span, push, computed)
        return handoff

    def _push(self, leg: Leg, handoff: Handoff, span: MessageSpan, push: GroupPush, computed: Pending[float] | None = None) -> None:
        """push: what it is one of. computed: what its packing has to wait for."""
        loop = asyncio.get_running_loop()
        handoff.num_in_flight += 1
        fill = functools.partial(self._worker.pack, handoff.handle.handle_id, span, leg.blocks)
        if computed is not None:
            fill = functools.partial(fill, after=computed)
        job = PushJob(handle=handoff.handle, span=span, fill=fill, is_sealed=self._worker.seals_messages)
        pushed: Future[PushResult] = self._agent.push(job)
        pushed.add_done_callback(lambda done: _call_soon(loop, self._pushed, leg, handoff, span, push, done))

    def _pushed(self, leg: Leg, handoff: Handoff, span: MessageSpan, push: GroupPush, done: Future[PushResult]) -> None:
        handoff.num_in_flight -= 1
        try:
            result = done.result()
        except DuomoError as error:
            # "cancelled": the message landed before it was written again, or its peer is gone, which is told elsewhere.
            if not handoff.is_abandoned and error.code != "cancelled":
                failure = TransferError(error.detail, code=error.code, retryable=True)
                self._on_failed(leg, failure)
            self._settle(leg, handoff)
            return
        handoff.pushed.add(span.message_idx)
        self._measure(leg, push, result)
        pulls = [pull for pull in handoff.pulls if pull.message_idx == span.message_idx]
        if pulls and not handoff.is_abandoned:
            handoff.pulls = [pull for pull in handoff.pulls if pull.message_idx != span.message_idx]
            self.pull(pulls[0])
        self._settle(leg, handoff)

    def _measure(self, leg: Leg, push: GroupPush, result: PushResult) -> None:
        push.add(result)
        if push.num_left:
            return
        if push.bytes_per_s > 0:
            HANDOFF_RATE.count(push.bytes_per_s, self._counters)
        if self._tracing.is_on:
            parent = leg.compute_span.traceparent if leg.compute_span is not None else leg.request.traceparent
            self._tracing.record_span("kv.push", parent, push.started_s, push.ended_s, push.attributes(self._agent.transport_name))

    def _fenced(self, leg: Leg, handoff: Handoff) -> None:
        del self._legs[handoff.handle.handle_id]
        handoff.is_terminal = True
        if handoff.unlanded:
            self._fence(handoff.handle, leg.request.traceparent)
        self._settle(leg, handoff)

    def _fence(self, handle: Handle, traceparent: str) -> None:
        fence = TransferFenced(
            request_id=handle.request_id, attempt=handle.attempt, traceparent=traceparent, remaining_s=0.0, handle_id=handle.handle_id
        )
        self._peers.post(handle.consumer_boot_id, fence)

    def _settle(self, leg: Leg, handoff: Handoff) -> None:
        if leg.handoff is handoff:
            self._on_change(leg)


def _call_soon(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *arguments: object) -> None:
    """From any thread; nothing happens once the loop is closed (the process ends)."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(call, *arguments)
