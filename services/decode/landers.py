"""Owns how a message that lies in a landing ring gets into its blocks: the seam between rings and devices. Knows no leg, policy or wire.

A lander is told by the agent what may have landed, verifies it, writes it into the blocks of a table that is open, and frees the slot.
This one does so by the processor; gpu_lander.py lets a GPU do it, by and by.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from duomo.config import KvDtype
from duomo.engine.kv_cache import KvCache
from duomo.engine.kv_messages import KvMessages
from services.decode.arrivals import LandedMessage
from services.kv_transfer.agent import Landed, TransferAgent


class OpenTables:
    """Block tables that messages may be written into, by handle. From any thread."""

    def __init__(self) -> None:
        self._tables: dict[int, Sequence[int]] = {}
        self._writing = threading.Lock()

    def open(self, handle_id: int, table: Sequence[int]) -> None:
        """The handle is about to be offered."""
        self._tables[handle_id] = table

    def close(self, handle_id: int) -> None:
        """Waits for whoever holds it; nobody gets it afterwards. Nothing happens where it is closed."""
        with self._writing:
            self._tables.pop(handle_id, None)

    @contextmanager
    def held(self, handle_id: int) -> Iterator[Sequence[int] | None]:
        """The table, which stays open while it is held; None: it is closed."""
        with self._writing:
            yield self._tables.get(handle_id)


class Lander(Protocol):
    """One device's way. Called in the step thread."""

    @property
    def is_writing(self) -> bool:
        """Whether the device has not answered yet for all that it was given. In any thread."""

    def land(self, agent: TransferAgent, tables: OpenTables, *, waits: bool = False) -> tuple[LandedMessage, ...]:
        """Take in what has landed; the messages that are in their blocks now, their slots free, or that are wrong.

        waits: until the device has answered for what it was given, where that takes it no longer than to write it: no step is under way.
        """


class CpuLander:
    """Hashes, then scatters, at once."""

    is_writing = False

    def __init__(self, cache: KvCache, kv_dtype: KvDtype = "model") -> None:
        self._messages = KvMessages(cache, kv_dtype)

    def land(self, agent: TransferAgent, tables: OpenTables, *, waits: bool = False) -> tuple[LandedMessage, ...]:
        landed: list[LandedMessage] = []
        for verified in agent.poll():
            message, span = verified, verified.span
            if message.error is None:
                with tables.held(message.handle_id) as table:
                    if table is None:
                        continue  # given up meanwhile: the agent has quarantined or freed the slot
                    # the slot's own view: torch wraps no read-only memory, and would be given a copy of every message
                    self._messages.scatter(span.layers, table[span.block_lo : span.block_hi], message.awaited.payload, span.heads)
                    message = agent.copied(message)
                if message.error is None:
                    agent.release(message.handle_id, span.message_idx)
            landed.append(landed_message(message))
        return tuple(landed)


def landed_message(message: Landed) -> LandedMessage:
    """What the legs are told, now."""
    return LandedMessage(
        handle_id=message.handle_id,
        message_idx=message.span.message_idx,
        group=message.span.group,
        num_bytes=message.span.num_bytes,
        landed_s=time.monotonic(),
        error=message.error,
    )
