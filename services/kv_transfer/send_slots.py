"""Owns a producer's send slots: registered memory that messages are packed into and written from. Knows no message, thread or lock.

Whoever takes a slot gives it back once nothing reads or writes it any more. The caller (pushing.py) holds its lock at every call.
"""

from __future__ import annotations

from collections.abc import Iterable

from services.kv_transfer import layout
from services.kv_transfer.memory import Allocate, Memory
from services.kv_transfer.transport import Transport

_MAX_REPLACED = 4  # times the first number: slots that stopped peers keep are replaced until there are so many
_MAX_REPLACED_ON_DEVICE = 2  # no plan counts them


class SendSlots:
    """Slots of one size, `num` of them once a peer has said which."""

    def __init__(self, transport: Transport, allocate: Allocate, num: int) -> None:
        self._transport = transport
        self._allocate = allocate
        self._num = num
        self._free: list[Memory] = []
        self._all: list[Memory] = []

    @property
    def num_taken(self) -> int:
        return len(self._all) - len(self._free)

    @property
    def has_free(self) -> bool:
        return bool(self._free)

    @property
    def num_bytes(self) -> int:
        """Of one, once there are any."""
        return self._all[0].num_bytes

    @property
    def is_on_host(self) -> bool:
        return self._all[0].place.kind == "host"

    def make(self, slot_bytes: int) -> None:
        """All that are still missing, for payloads of slot_bytes. Raises TransferError where there is no memory."""
        while len(self._all) < self._num:
            self._add(layout.slot_stride(slot_bytes))

    def take(self) -> Memory:
        return self._free.pop()

    def give(self, slot: Memory) -> None:
        self._free.append(slot)

    def replace_kept(self) -> None:
        """A stopped peer keeps a slot for as long as it likes: others go on with a new one, as long as there are not too many. Raises
        TransferError where there is no memory."""
        if len(self._all) < (_MAX_REPLACED if self.is_on_host else _MAX_REPLACED_ON_DEVICE) * self._num:
            self._add(self.num_bytes)

    def release(self, still_read: Iterable[Memory]) -> None:
        """The process ends: deregister every slot but those that a write which does not end still reads."""
        kept = {id(slot) for slot in still_read}
        for slot in self._all:
            if id(slot) not in kept:
                self._transport.deregister(slot)
        self._all = [slot for slot in self._all if id(slot) in kept]
        self._free = []

    def _add(self, num_bytes: int) -> None:
        slot = self._allocate(num_bytes)
        self._transport.register(slot)
        self._all.append(slot)
        self._free.append(slot)
