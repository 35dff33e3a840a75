"""Owns the landing of messages in a GPU's pool: scattered and verified on the stream of the steps. Knows no leg, policy or wire.

A message is launched in one call of land() and answered in a later one, when the device has said that its hash is right: only then is its
slot free and its leg told, so no step reads a block whose bytes are not proven. A wrong message has been written into blocks that its leg
alone holds and nobody reads; it is looked at again, then pulled, as on a CPU.

Why a launched message cannot hurt others once its handle is withdrawn: everything that writes blocks of this pool (steps, block copies,
messages) is queued by the step thread on one stream. A withdrawal waits for a launch that is being made and lets none follow; whoever gets
the blocks next has its writes queued behind. The slot may be written again while the scatter from it is still queued: those are bytes for
blocks that have no reader, in front of their new owner's. A ring in the host's memory stays until then: it is unlocked before it is freed,
which waits for the device's copies (duomo/engine/gpu_page_locks.py), and where it is not locked the copy is over when it is queued. One in
the card's own is torch's again when it is freed, and what is read of it then goes nowhere.
"""

from __future__ import annotations

from collections import deque

from duomo.config import KvDtype
from duomo.engine.gpu_kv_cache import GpuKvCache
from duomo.engine.gpu_kv_messages import GpuKvLander, LandingMessage
from duomo_kernels.kv_hash_pack import Seal
from services.decode.arrivals import LandedMessage
from services.decode.landers import OpenTables, landed_message
from services.kv_transfer.agent import Awaited, TransferAgent


class GpuLander:
    """A Lander; of one step thread."""

    def __init__(self, cache: GpuKvCache, kv_dtype: KvDtype = "model") -> None:
        self._kv = GpuKvLander(cache, kv_dtype)
        self._under_way: deque[tuple[Awaited, LandingMessage]] = deque()

    @property
    def is_writing(self) -> bool:
        return bool(self._under_way)

    def land(self, agent: TransferAgent, tables: OpenTables, *, waits: bool = False) -> tuple[LandedMessage, ...]:
        """Answers come in the order of the launches. waits: for the answers to what is under way, too."""
        landed = [one for awaited in agent.due() if (one := self._launch(awaited, agent, tables)) is not None]
        if waits and self._under_way:
            self._under_way[-1][1].wait()
        while self._under_way and self._under_way[0][1].is_over():
            awaited, landing = self._under_way.popleft()
            message = agent.judged(awaited, landing.is_right())
            self._kv.give_back(landing)
            if message is None:
                continue  # looked at again soon; or its handle was given up meanwhile
            if message.error is None:
                agent.release(message.handle_id, message.span.message_idx)
            landed.append(landed_message(message))
        return tuple(landed)

    def _launch(self, awaited: Awaited, agent: TransferAgent, tables: OpenTables) -> LandedMessage | None:
        """The message's error, where it was announced and is still not there."""
        if not awaited.may_be_there():
            message = agent.judged(awaited, False)
            return None if message is None else landed_message(message)
        span = awaited.span
        with tables.held(awaited.handle_id) as table:
            if table is not None:
                seal = Seal(handle_id=awaited.handle_id, group=span.group, message_idx=span.message_idx, start=awaited.start)
                landing = self._kv.launch(span.layers, table[span.block_lo : span.block_hi], seal, awaited.message)
                self._under_way.append((awaited, landing))
        return None
